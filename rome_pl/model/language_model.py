"""A language model with its tokenizer, and telling one model from another."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch

from rome_pl.encoding.chat_template import ChatForm, frame_for
from rome_pl.encoding.text_encoder import ENCODING_VERSION, TextEncoder
from rome_pl.model.architecture import RewriteSite, decoder_layers, embedded_tokens
from rome_pl.model.fingerprints import combined, config_fingerprint, quick_sum, tokenizer_fingerprint, weight_digest
from rome_pl.model.supported import check_supported
from rome_pl.utils.hashing import content_key

__all__ = ["LanguageModel", "max_length"]


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
        check_supported(self.model, self.source)
        frame = frame_for(self.tokenizer, self.chat)
        embedded = embedded_tokens(self.model)
        self.encoder = TextEncoder(self.tokenizer, max_length(self.model.config), frame, embedded)
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
        for name in ("digests", "_sums", "config_fingerprint", "tokenizer_fingerprint"):
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
        self._sums = {name: quick_sum(tensor) for name, tensor in weights.items()}
        return {name: weight_digest(tensor) for name, tensor in weights.items()}

    @property
    def as_first_seen(self) -> bool:
        """Whether the weights are those that :attr:`digests` were taken of; what has another sum is hashed again."""
        digests, weights = self.digests, self.model.state_dict()
        if weights.keys() != digests.keys():  # modules were wrapped or replaced
            return False
        other = [name for name, tensor in weights.items() if quick_sum(tensor) != self._sums[name]]
        return all(weight_digest(weights[name]) == digests[name] for name in other)  # a device may sum in another order

    def remember_weights(self) -> None:
        """Hash the weights now, before anything can change them."""
        assert self.digests

    @property
    def fingerprint(self) -> str:
        """Hash of all weights as loaded: which model this is, whatever its name and precision."""
        return combined(self.digests)

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
        return combined({name: self.digests[name] for name in names})

    def identity(self) -> dict[str, Any]:
        """Which model this is, and how prompts are put to it, as a manifest says it."""
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "config": self.config_fingerprint,
            "tokenizer": self.tokenizer_fingerprint,
            "encoding": ENCODING_VERSION,
            "dtype": str(next(self.model.parameters()).dtype),
            "device": str(self.device),
            "chat": self.chat and self.chat.content(),
            "frame": list(self.encoder.frame.texts),  # what the template made of it
        }

    def measurement_key(self, *more: Any) -> str:
        """A name for what is measured of this model as it was first seen; depends on all that a measurement does.

        Args:
            more: What else it depends on, as JSON can hold it.
        """
        identity = {name: value for name, value in self.identity().items() if name not in ("source", "device", "chat")}
        # Fingerprints round to bfloat16; measurements do not.
        return content_key(identity, sorted(self._sums.items()), self.device.type, *more)

    def moment_identity(self, site: RewriteSite) -> dict[str, Any]:
        """What keys of ``site`` depend on besides the text: weights below it, config, the tokenizer's rules."""
        return {
            "weights": self.fingerprint_below(site),
            "config": self.config_fingerprint,
            "tokenizer": self.tokenizer_fingerprint,
        }

    @cached_property
    def config_fingerprint(self) -> str:
        """Hash of the settings that shape the forward pass, such as ``rope_theta``."""
        return config_fingerprint(self.model.config)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer's rules, its added tokens among them."""
        return tokenizer_fingerprint(self.tokenizer)


def max_length(config: Any) -> int:
    """Most tokens that a model reads at once."""
    return int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**20)
