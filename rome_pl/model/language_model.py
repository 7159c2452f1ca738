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
from rome_pl.model.supported import check_supported, first_position
from rome_pl.utils.hashing import content_key

__all__ = ["LanguageModel", "max_length"]


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer.

    Args:
        model: A decoder of the transformers library.
        tokenizer: Its fast tokenizer.
        source: Its source, for manifests and messages.
        chat: How prompts become conversations. ``None`` (default): prompts stay as they are.
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
        longest = max_length(self.model.config) - (self.first_position or 0)  # a table of positions begins at 0
        self.encoder = TextEncoder(self.tokenizer, longest, frame, embedded)
        if self.encoder.pad_id >= embedded:
            self.encoder.pad_id = 0  # the pad token has no embedding; padding is masked, so any id will do

    def with_chat(self, chat: ChatForm | None) -> "LanguageModel":
        """Return the same model and tokenizer with another form of prompts.

        Raises:
            OptionError: If the tokenizer has no suitable chat template.
        """
        if chat == self.chat:
            return self
        other = replace(self, chat=chat)
        # These were computed before any edit and must not be recomputed.
        for name in ("digests", "_sums", "config_fingerprint", "tokenizer_fingerprint"):
            if name in vars(self):
                vars(other)[name] = vars(self)[name]
        return other

    @property
    def first_position(self) -> int | None:
        """Position of a text's first token. ``None``: the model takes no positions."""
        return first_position(self.model)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self.model.device
        return device

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every weight, by name, computed before any edit."""
        weights = self.model.state_dict()
        self._sums = {name: quick_sum(tensor) for name, tensor in weights.items()}
        return {name: weight_digest(tensor) for name, tensor in weights.items()}

    @property
    def as_first_seen(self) -> bool:
        """Whether the weights still match :attr:`digests`. Only weights whose sum has changed are hashed again."""
        digests, weights = self.digests, self.model.state_dict()
        if weights.keys() != digests.keys():  # modules were wrapped or replaced
            return False
        other = [name for name, tensor in weights.items() if quick_sum(tensor) != self._sums[name]]
        return all(weight_digest(weights[name]) == digests[name] for name in other)  # a device may sum in another order

    def remember_weights(self) -> None:
        """Compute :attr:`digests` now, before anything can change the weights."""
        assert self.digests

    @property
    def fingerprint(self) -> str:
        """Hash of all weights as loaded. It does not depend on the model's name and precision."""
        return combined(self.digests)

    def fingerprint_below(self, site: RewriteSite) -> str:
        """Hash of the weights that the keys of ``site`` depend on: of its layer and those below, but not its own."""
        list_name, _ = decoder_layers(self.model)
        parameters = dict(self.model.named_parameters())
        # Models register modules in the order in which they run: first embeddings of tokens and positions, and their
        # norm.
        names = set(takewhile(lambda name: not name.startswith(f"{list_name}."), parameters))
        embedding = self.model.get_input_embeddings().weight
        names |= {name for name, parameter in parameters.items() if parameter is embedding}
        below = tuple(f"{list_name}.{layer}." for layer in range(site.layer + 1))
        projection = site.name.removesuffix("weight")
        names |= {n for n in self.digests if n.startswith(below) and not n.startswith(projection)}
        return combined({name: self.digests[name] for name in names})

    def identity(self) -> dict[str, Any]:
        """Return the identity of the model and its form of prompts, for a manifest."""
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "config": self.config_fingerprint,
            "tokenizer": self.tokenizer_fingerprint,
            "encoding": ENCODING_VERSION,
            "dtype": str(next(self.model.parameters()).dtype),
            "device": str(self.device),
            "chat": self.chat and self.chat.content(),
            "frame": list(self.encoder.frame.texts),  # the template's text around a prompt
        }

    def measurement_key(self, *more: Any) -> str:
        """Return a name for measurements of the unedited model. It depends on everything that they depend on.

        Args:
            more: Further dependencies, which JSON can hold.
        """
        identity = {name: value for name, value in self.identity().items() if name not in ("source", "device", "chat")}
        # Fingerprints round to bfloat16; measurements do not.
        return content_key(identity, sorted(self._sums.items()), self.device.type, *more)

    def moment_identity(self, site: RewriteSite) -> dict[str, Any]:
        """Return the dependencies of keys of ``site`` besides the text: weights below it, config, tokenizer's rules."""
        return {
            "weights": self.fingerprint_below(site),
            "config": self.config_fingerprint,
            "tokenizer": self.tokenizer_fingerprint,
        }

    @cached_property
    def config_fingerprint(self) -> str:
        """Hash of the settings that affect the forward pass, such as ``rope_theta``."""
        return config_fingerprint(self.model.config)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer's rules, including added tokens."""
        return tokenizer_fingerprint(self.tokenizer)


def max_length(config: Any) -> int:
    """Largest number of tokens that a model reads at once."""
    text = config.get_text_config(decoder=True)
    fields = ("max_position_embeddings", "max_target_positions")
    return int(next((size for name in fields if (size := getattr(text, name, None))), 2**20))
