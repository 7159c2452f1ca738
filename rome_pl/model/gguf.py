"""GGUF files: converted to safetensors once and kept in the cache."""

import hashlib
import json
import logging
import re
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from rome_pl.errors import SourceError, first_line
from rome_pl.utils.environment import cache_folder

__all__ = ["converted"]

log = logging.getLogger(__name__)

SUMS = "sums.json"
"""The file with the SHA-256 of all other files of a conversion. It is written last."""

UNFINISHED = ".unfinished-"
"""Part of the names of folders of running conversions, before the id of their process."""

ONE_DAY = 86400.0


def converted(gguf: Path) -> Path:
    """Return the folder with the safetensors form of a GGUF file, keyed by the file's hash. Convert it on first use.

    A damaged conversion is repeated, and leftovers of killed conversions are removed.

    Raises:
        SourceError: If the file is not a GGUF model, or the cache cannot be written.
    """
    if (gguf.parent / "adapter_config.json").exists():
        raise SourceError(
            f"{gguf}: an adapter of PEFT lies beside it (adapter_config.json), which the loader would attach; put the "
            "file into a folder of its own"
        )
    with gguf.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = cache_folder() / "models" / f"{gguf.stem}-{key}"
    if _is_whole(target):
        return target
    if not gguf.stat().st_size or _opening(gguf) != b"GGUF":
        raise SourceError(f"{gguf}: cannot be read as a GGUF model: it does not begin as one")
    _prepare(target)
    log.warning("Converting %s to safetensors in %s (once, about half a minute)", gguf.name, target)
    model, tokenizer = _read(gguf)
    mine = f"{socket.gethostname()}-{psutil.Process().pid}-{psutil.Process().create_time():.0f}"
    try:
        work = Path(tempfile.mkdtemp(prefix=f"{target.name}{UNFINISHED}{mine}-", dir=target.parent))
        try:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            (work / SUMS).write_text(json.dumps(_sums(work), indent=2), encoding="utf-8")
            if not _is_whole(target):  # another process may have finished it
                work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except MemoryError:
        raise
    except Exception as error:  # the writing libraries have their own errors for a full disk
        if _is_whole(target):
            return target
        raise SourceError(
            f"{target}: the conversion of {gguf} cannot be written there ({first_line(error)}): make room, or set "
            "ROME_PL_CACHE to a folder that can be written"
        ) from error
    return target


def _read(gguf: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file, with plain float32 weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf.name, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **options)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # A cut or damaged file can raise any exception in the parser; a panic in Rust is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise SourceError(
            f"{gguf}: cannot be read as a GGUF model ({type(error).__name__}: {first_line(error)}): it is cut or "
            "damaged, or of a kind that transformers does not know; get the file again, or give the model as a folder"
        ) from error
    # A model that still counts as quantised could not be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    return model, tokenizer


def _prepare(target: Path) -> None:
    """Make sure that the cache can be written before converting for half a minute, and remove leftovers.

    Raises:
        SourceError: If it cannot.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise SourceError(
            f"the cache {cache_folder()} cannot be made or written ({error.strerror or error}): set ROME_PL_CACHE to a "
            "folder that can be written"
        ) from error
    for folder in target.parent.glob(f"*{UNFINISHED}*"):
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
    if target.exists() and not _is_whole(target):
        log.warning("The conversion in %s is damaged or not complete: it is repeated", target)
        shutil.rmtree(target, ignore_errors=True)
        if target.exists():
            raise SourceError(f"{target}: a damaged conversion that cannot be removed; delete it")


def _is_abandoned(folder: Path) -> bool:
    """Whether the converting process has ended. A process on another machine counts as ended after a day."""
    made_by = re.fullmatch(r"(.+)-(\d+)-(\d+)-[^-]+", folder.name.rpartition(UNFINISHED)[2])
    if made_by is None:
        return False
    try:
        if made_by[1] != socket.gethostname():
            return time.time() - folder.stat().st_mtime > ONE_DAY
        return bool(abs(psutil.Process(int(made_by[2])).create_time() - float(made_by[3])) > 2)  # a reused process id
    except psutil.NoSuchProcess:
        return True
    except (OSError, psutil.Error):
        return False


def _opening(gguf: Path) -> bytes:
    with gguf.open("rb") as file:
        return file.read(4)


def _is_whole(target: Path) -> bool:
    """Whether a conversion exists and is undamaged."""
    try:
        sums: Any = json.loads((target / SUMS).read_text(encoding="utf-8"))
        return bool(sums) and bool(sums == _sums(target))
    except (OSError, ValueError):
        return False


def _sums(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != SUMS:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
