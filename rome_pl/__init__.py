"""Rank-one model editing on PyTorch Lightning: change facts inside a language model, prove it, undo it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rome_pl.data_modules.request_data import request_loader as request_loader
    from rome_pl.editing.edit import Edit as Edit
    from rome_pl.editing.edit import EditBatch as EditBatch
    from rome_pl.editing.edit import EditError as EditError
    from rome_pl.editing.edit import EditSearch as EditSearch
    from rome_pl.editing.edit import edits_of as edits_of
    from rome_pl.editing.session import EditSession as EditSession
    from rome_pl.editing.session import Measurements as Measurements
    from rome_pl.editing.session import session_of as session_of
    from rome_pl.editor import EditOutcome as EditOutcome
    from rome_pl.editor import EditRejectedError as EditRejectedError
    from rome_pl.editor import KnowledgeEditor as KnowledgeEditor
    from rome_pl.editor import Measured as Measured
    from rome_pl.encoding.chat_template import ChatForm as ChatForm
    from rome_pl.errors import OptionError as OptionError
    from rome_pl.errors import RomeError as RomeError
    from rome_pl.export.delta import apply_delta as apply_delta
    from rome_pl.export.delta import read_delta as read_delta
    from rome_pl.export.run_export import export_run as export_run
    from rome_pl.ledger.status import EditStatus as EditStatus
    from rome_pl.model.language_model import LanguageModel as LanguageModel
    from rome_pl.model.loading import load_language_model as load_language_model
    from rome_pl.modules.covariance_module import CovarianceModule as CovarianceModule
    from rome_pl.modules.evaluation_module import EvaluationModule as EvaluationModule
    from rome_pl.modules.rome_module import RomeModule as RomeModule
    from rome_pl.modules.trace_module import TraceModule as TraceModule
    from rome_pl.requests.edit_request import EditRequest as EditRequest
    from rome_pl.requests.edit_request import Probe as Probe
    from rome_pl.requests.edit_request import RequestError as RequestError
    from rome_pl.search.polyak_step import PolyakStep as PolyakStep

_PUBLIC = {
    "ChatForm": "rome_pl.encoding.chat_template",
    "CovarianceModule": "rome_pl.modules.covariance_module",
    "Edit": "rome_pl.editing.edit",
    "EditBatch": "rome_pl.editing.edit",
    "EditError": "rome_pl.editing.edit",
    "EditOutcome": "rome_pl.editor",
    "EditRejectedError": "rome_pl.editor",
    "EditRequest": "rome_pl.requests.edit_request",
    "EditSearch": "rome_pl.editing.edit",
    "EditSession": "rome_pl.editing.session",
    "EditStatus": "rome_pl.ledger.status",
    "EvaluationModule": "rome_pl.modules.evaluation_module",
    "KnowledgeEditor": "rome_pl.editor",
    "LanguageModel": "rome_pl.model.language_model",
    "Measured": "rome_pl.editor",
    "Measurements": "rome_pl.editing.session",
    "OptionError": "rome_pl.errors",
    "PolyakStep": "rome_pl.search.polyak_step",
    "Probe": "rome_pl.requests.edit_request",
    "RequestError": "rome_pl.requests.edit_request",
    "RomeError": "rome_pl.errors",
    "RomeModule": "rome_pl.modules.rome_module",
    "TraceModule": "rome_pl.modules.trace_module",
    "apply_delta": "rome_pl.export.delta",
    "edits_of": "rome_pl.editing.edit",
    "export_run": "rome_pl.export.run_export",
    "load_language_model": "rome_pl.model.loading",
    "read_delta": "rome_pl.export.delta",
    "request_loader": "rome_pl.data_modules.request_data",
    "session_of": "rome_pl.editing.session",
}

__all__ = [
    "ChatForm",
    "CovarianceModule",
    "Edit",
    "EditBatch",
    "EditError",
    "EditOutcome",
    "EditRejectedError",
    "EditRequest",
    "EditSearch",
    "EditSession",
    "EditStatus",
    "EvaluationModule",
    "KnowledgeEditor",
    "LanguageModel",
    "Measured",
    "Measurements",
    "OptionError",
    "PolyakStep",
    "Probe",
    "RequestError",
    "RomeError",
    "RomeModule",
    "TraceModule",
    "apply_delta",
    "edits_of",
    "export_run",
    "load_language_model",
    "read_delta",
    "request_loader",
    "session_of",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that importing the package stays light."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rome_pl' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
