"""What a run has edited, for use elsewhere: a Hugging Face checkpoint, the change alone, or a LoRA adapter.

Nothing is optimised. The edits are put into the base model from the ledger, written in the form asked for, and taken
out again.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rome_pl.errors import OptionError
from rome_pl.export.checkpoint import save_checkpoint
from rome_pl.export.delta import ABOUT, VERSION, save_delta
from rome_pl.export.lora_adapter import AdapterPart, save_adapter
from rome_pl.export.model_card import model_card
from rome_pl.files.checksums import sealed
from rome_pl.files.whole_files import check_free, plain, whole_folder
from rome_pl.ledger.edit_log import LedgerError
from rome_pl.ledger.replay import read_edits, read_manifest, replay
from rome_pl.ledger.undo import pick
from rome_pl.model.language_model import LanguageModel
from rome_pl.utils.did_you_mean import did_you_mean
from rome_pl.write.edited_layers import EditedLayers

__all__ = ["EXPORT_FORMS", "Exported", "check_export", "export_run"]

EXPORT_FORMS = ("hf", "delta", "peft")
"""Forms of an export: a merged Hugging Face checkpoint, the change alone, a LoRA adapter."""


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Args:
        folder: Where it lies.
        num_edits: Number of edits.
        num_bytes: Size of all files.
        adapter: What an adapter holds of each layer; empty in other forms.
    """

    folder: Path
    num_edits: int
    num_bytes: int
    adapter: tuple[AdapterPart, ...]


def check_export(form: str, folder: Path, rank: int | None = None, max_shard_size: str | None = None) -> None:
    """Refuse what cannot be meant, before a model is loaded; arguments as those of :func:`export_run`.

    Raises:
        OptionError: With what to do.
    """
    if form not in EXPORT_FORMS:
        raise OptionError(
            f"format: expected one of {', '.join(EXPORT_FORMS)}, got {form!r}{did_you_mean(form, EXPORT_FORMS)}"
        )
    if rank is not None and form != "peft":
        raise OptionError(f"rank: only an adapter (format peft) has one; leave it out with format {form}")
    if rank is not None and rank < 1:
        raise OptionError(f"rank: expected a number from 1 on, got {rank}")
    if max_shard_size is not None and form != "hf":
        raise OptionError(f"max_shard_size: only a checkpoint (format hf) has shards; leave it out with format {form}")
    if max_shard_size is not None and not re.fullmatch(r"[1-9]\d*[KMGT]B", max_shard_size, re.IGNORECASE):
        raise OptionError(f"max_shard_size: expected a size such as 500MB or 5GB, got {max_shard_size!r}")
    check_free(folder, "output")


def export_run(
    language_model: LanguageModel,
    run: Path,
    folder: Path,
    form: str = "hf",
    *,
    rank: int | None = None,
    max_shard_size: str | None = None,
    cases: Sequence[str] | None = None,
    statistics: Sequence[Path] = (),
) -> Exported:
    """Write the edits of a sequential run to a folder of their own, with ``README.md`` and ``rome_pl.json``.

    Args:
        language_model: The unedited model that the run began with, in the dtype of the run; it is so again afterwards,
            bit for bit, whatever happens.
        run: The run's folder.
        folder: Where to; it does not exist, or is empty. After an exception it is as it was.
        form: One of :data:`EXPORT_FORMS`.
        rank: Most factors an adapter has a layer; nothing makes it exact.
        max_shard_size: Largest file of a checkpoint, such as ``5GB``; nothing leaves it to transformers.
        cases: The edits, by ``case_id``; nothing takes all that are in the weights. The others are left out by solving
            for these anew, as ``rome-pl pick`` does.
        statistics: The run's second moments where ``cases`` needs them and they are neither shipped nor in the cache.

    Raises:
        OptionError: As :func:`check_export`.
        LedgerError: If no edit is in the weights, or the ledger cannot be used; see
            :func:`rome_pl.ledger.replay.read_writes`.
        OSError: If the folder cannot be written.
        SavedModelError: If a checkpoint does not hold the model; see :func:`rome_pl.export.checkpoint.save_checkpoint`.
    """
    check_export(form, folder, rank, max_shard_size)
    about = _about(run, form, cases)
    parts: list[AdapterPart] = []
    with _edited(language_model, run, cases, statistics) as layers, whole_folder(folder) as work:
        edited = [weight.site for weight in layers.weights if weight.written]
        about["rewrite"] = {"layers": [site.layer for site in edited], "weights": [site.name for site in edited]}
        if form == "hf":
            save_checkpoint(language_model, work, max_shard_size)
        elif form == "delta":
            about |= save_delta(work, layers)
        else:
            parts = save_adapter(work, layers, about["base"]["source"], rank)
            about["adapter"] = [asdict(part) for part in parts]
        text = json.dumps(sealed(plain(about)), indent=2, ensure_ascii=False, allow_nan=False)
        for name, content in ((ABOUT, text), ("README.md", model_card(about))):
            (work / name).write_text(content, encoding="utf-8", errors="replace", newline="")
        num_bytes = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
        num_edits = len(layers.names)
    return Exported(folder, num_edits, num_bytes, tuple(parts))


@contextmanager
def _edited(
    language_model: LanguageModel, run: Path, cases: Sequence[str] | None, statistics: Sequence[Path]
) -> Iterator[EditedLayers]:
    """The model with a run's edits inside; without any after, whatever happens."""
    layers = replay(language_model, run) if cases is None else pick(language_model, run, cases, statistics)
    try:
        if not layers.names:
            raise LedgerError(f"{run}: no edit is in the weights; see rome-pl show --ledger {run}")
        yield layers
    finally:
        layers.remove(layers.names)


def _about(run: Path, form: str, cases: Sequence[str] | None) -> dict[str, Any]:
    """What an export is, as JSON can hold it."""
    manifest, edits = read_manifest(run), read_edits(run)
    model = manifest["model"]
    base: dict[str, Any] = {name: model.get(name) for name in ("source", "fingerprint", "config", "tokenizer", "chat")}
    base |= {"folder": model["folder"]} if "folder" in model else {}
    base["dtype"] = str(model["dtype"]).removeprefix("torch.")
    return {
        "format": form,
        "version": VERSION,
        "base": base,
        "preset": manifest.get("preset"),
        "versions": manifest.get("versions", {}),
        "edits": [_shown(edit) for edit in edits if cases is None or str(edit["case_id"]) in cases],
    }


def _shown(edit: Mapping[str, Any]) -> dict[str, Any]:
    request = {name: edit["request"].get(name) for name in ("prompt", "subject", "target_true", "target_new")}
    return {
        "case_id": edit["case_id"],
        "status": edit["status"],
        "reason": edit.get("reason"),
        "request": request,
        "probability": edit["probability"],
    }
