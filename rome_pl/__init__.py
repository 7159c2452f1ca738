"""Rank-one model editing on PyTorch Lightning: change facts inside a language model, prove it, undo it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rome_pl.chat import ChatForm as ChatForm
    from rome_pl.covariance_module import CovarianceModule as CovarianceModule
    from rome_pl.edit_module import RomeModule as RomeModule
    from rome_pl.editor import KnowledgeEditor as KnowledgeEditor
    from rome_pl.evaluation_module import EvaluationModule as EvaluationModule
    from rome_pl.language_model import LanguageModel as LanguageModel
    from rome_pl.loading import load_language_model as load_language_model
    from rome_pl.optimizers import PolyakStep as PolyakStep
    from rome_pl.requests import EditRequest as EditRequest
    from rome_pl.run_export import export_run as export_run
    from rome_pl.trace_module import TraceModule as TraceModule

_PUBLIC = {
    "ChatForm": "rome_pl.chat",
    "CovarianceModule": "rome_pl.covariance_module",
    "EditRequest": "rome_pl.requests",
    "EvaluationModule": "rome_pl.evaluation_module",
    "KnowledgeEditor": "rome_pl.editor",
    "LanguageModel": "rome_pl.language_model",
    "PolyakStep": "rome_pl.optimizers",
    "RomeModule": "rome_pl.edit_module",
    "export_run": "rome_pl.run_export",
    "TraceModule": "rome_pl.trace_module",
    "load_language_model": "rome_pl.loading",
}

__all__ = [
    "ChatForm",
    "CovarianceModule",
    "EditRequest",
    "EvaluationModule",
    "KnowledgeEditor",
    "LanguageModel",
    "PolyakStep",
    "RomeModule",
    "TraceModule",
    "export_run",
    "load_language_model",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that importing the package stays light."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rome_pl' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
