"""GGUF files: converted once to safetensors, and kept in the cache."""

import hashlib
import logging
import shutil
import tempfile
from pathlib import Path

import torch

from rome_pl.errors import SourceError, first_line
from rome_pl.language_model import cache_folder

__all__ = ["converted"]

log = logging.getLogger(__name__)


def converted(gguf: Path) -> Path:
    """Folder with the safetensors form of a GGUF file; written once, keyed by the file's hash."""
    with gguf.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = cache_folder() / "models" / f"{gguf.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.warning("Converting %s to safetensors in %s (once, about half a minute)", gguf.name, target)
    options = {"gguf_file": gguf.name, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **options)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise SourceError(f"{gguf}: cannot be read as a GGUF model: {first_line(error)}") from error
    # The weights are plain float32 now; what still calls the model quantised would keep it from being saved.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        if not target.exists():
            work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
