"""Callbacks around an edit, one duty each. Their order matters; :func:`default_callbacks` gives it."""

if __name__ != "rome_pl.callbacks":
    raise ImportError("import these callbacks as rome_pl.callbacks: under two names each class would exist twice")

from lightning.pytorch import Callback

from rome_pl.callbacks.commit import EditCommit as EditCommit
from rome_pl.callbacks.evaluation_report import EvaluationReport as EvaluationReport
from rome_pl.callbacks.moment_report import MomentReport as MomentReport
from rome_pl.callbacks.probe_evaluation import ProbeEvaluation as ProbeEvaluation
from rome_pl.callbacks.progress import EditProgressBar as EditProgressBar
from rome_pl.callbacks.progress import EvaluationProgressBar as EvaluationProgressBar
from rome_pl.callbacks.progress import MomentProgressBar as MomentProgressBar
from rome_pl.callbacks.progress import ProgressLines as ProgressLines
from rome_pl.callbacks.progress import TraceProgressBar as TraceProgressBar
from rome_pl.callbacks.rank_one_writer import RankOneWriter as RankOneWriter
from rome_pl.callbacks.representation_check import RepresentationCheck as RepresentationCheck
from rome_pl.callbacks.retention import RetentionCheck as RetentionCheck
from rome_pl.callbacks.run_report import RunReport as RunReport
from rome_pl.callbacks.state_check import StateCheck as StateCheck
from rome_pl.callbacks.tensorboard_report import TensorBoardReport as TensorBoardReport
from rome_pl.callbacks.trace_report import TraceReport as TraceReport
from rome_pl.callbacks.verification import Verification as Verification


def default_callbacks() -> list[Callback]:
    """Check, write, verify, evaluate, commit and watch the state: what every run needs, in the order that works."""
    return [
        RepresentationCheck(),
        RankOneWriter(),
        Verification(),
        ProbeEvaluation(),
        EditCommit(),
        StateCheck(),
        RetentionCheck(),
    ]
