"""Comparing the loaded model with the one that a file was made with."""

import logging
from collections.abc import Mapping
from typing import Any

from rome_pl.errors import RomeError
from rome_pl.model.language_model import LanguageModel

__all__ = ["refuse_another_model"]

log = logging.getLogger(__name__)


def refuse_another_model(
    theirs: Mapping[str, Any], language_model: LanguageModel, error: type[RomeError], what: str, advice: str
) -> None:
    """Refuse a model with other weights, another config or another tokenizer.

    Args:
        theirs: The recorded identity of the other model; see :meth:`LanguageModel.identity`.
        language_model: The loaded model.
        error: The class of error to raise.
        what: The recorded object for messages, such as ``run: a ledger``.
        advice: What to do, for messages.

    Raises:
        RomeError: If the models differ, with the difference.
    """
    loaded = f"than the one loaded ({language_model.source}, {language_model.fingerprint[:12]})"
    if theirs["fingerprint"] != language_model.fingerprint:
        raise error(
            f"{what} of another model ({theirs['source']}, {str(theirs['fingerprint'])[:12]}) {loaded}; {advice}"
        )
    if theirs.get("config") is None:
        log.warning(
            "%s of an earlier version (%s): the model's config and the tokenizer's rules are not on record and not "
            "compared, only its weights",
            what,
            theirs["source"],
        )
        return
    ours = {"config": language_model.config_fingerprint, "tokenizer": language_model.tokenizer_fingerprint}
    for name, value in ours.items():
        if theirs[name] != value:
            detail = {"config": "config.json", "tokenizer": "rules, merges or added tokens"}[name]
            raise error(
                f"{what} of the same weights with another {name} ({detail}: {theirs[name][:12]}, now {value[:12]}) "
                f"{loaded}; {advice}"
            )
