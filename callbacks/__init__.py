"""Callbacks around an edit, one duty each. Their order matters; :func:`default_callbacks` gives it."""

if __name__ != "rome_pl.callbacks":
    raise ImportError("import these callbacks as rome_pl.callbacks: under two names each class would exist twice")

from typing import Any

from lightning.pytorch import Callback

from rome_pl.callbacks.commit import EditCommit as EditCommit
from rome_pl.callbacks.damage_check import DamageCheck as DamageCheck
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

EDIT_CALLBACKS: dict[str, type[Callback]] = {
    "representation_check": RepresentationCheck,
    "rank_one_writer": RankOneWriter,
    "verification": Verification,
    "probe_evaluation": ProbeEvaluation,
    "damage_check": DamageCheck,
    "commit": EditCommit,
    "state_check": StateCheck,
    "retention_check": RetentionCheck,
    "tensorboard_report": TensorBoardReport,
    "run_report": RunReport,
}
"""The callbacks of a run of edits in the order that works, by their sections in a configuration."""


def default_callbacks(
    *,
    least_probability: float = 0.05,
    ledger: bool = False,
    resume: bool = False,
    evaluate: bool = True,
    measure_perplexity: bool = True,
    watch: bool = True,
) -> list[Callback]:
    """Check, write, verify, evaluate, commit and watch the state, in the order that works.

    Args:
        least_probability: Least probability of the target for an edit to be kept; see :class:`Verification`.
        ledger: Whether to keep a ledger below the Trainer's ``default_root_dir``; see :class:`EditCommit`.
        resume: Whether to resume from a ledger that is there.
        evaluate: Whether probes are measured before and after each edit; see :class:`ProbeEvaluation`.
        measure_perplexity: Whether held-out perplexity is measured too.
        watch: Whether damage, the state of the model and earlier edits are checked between edits; see
            :class:`DamageCheck`, :class:`StateCheck` and :class:`RetentionCheck`.
    """
    options: dict[str, dict[str, Any]] = {
        "representation_check": {},
        "rank_one_writer": {},
        "verification": {"least_probability": least_probability},
        "probe_evaluation": {"measure_perplexity": measure_perplexity},
        "damage_check": {} if measure_perplexity else {"largest_divergence": None},
        "commit": {"ledger": ledger, "resume": resume},
        "state_check": {},
        "retention_check": {"measure_perplexity": measure_perplexity},
    }
    left_out = {
        "probe_evaluation": not evaluate,
        "damage_check": not (evaluate and watch),
        "state_check": not watch,
        "retention_check": not watch,
    }
    return [
        EDIT_CALLBACKS[name](**options[name])
        for name in EDIT_CALLBACKS
        if name in options and not left_out.get(name, False)
    ]
