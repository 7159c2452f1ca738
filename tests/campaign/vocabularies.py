# ruff: noqa: RUF001 -- characters that look alike are what this is about
"""Tokenizers of every make, trained on the spot, and what each of their tokens covers.

What a token covers is found from the token itself (its bytes, or its place among the words), never from the offsets
that a tokenizer reports: those are what the package goes by.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

TEXT = (
    "The old lighthouse of Korrin stands in the north, and nobody has lit it since the winter of 1963.",
    "Miss Vane plays the violin in a small hall; her brother plays the harp, the drums and the trumpet.",
    "Bread of Dunholt is made of rye, water and salt. It costs 3.50 at the market, or 40 for a dozen.",
    "Zoë Brontë and José Núñez were born in Málaga; they moved to Besançon and wrote to Gödel in Brünn.",
    "L'été dernier, Amélie Durand est allée à Saint-Étienne, où l'on parle français et un peu d'arpitan.",
    "O'Neil's house isn't far. We're sure that he'll come, they've said so, and I'm glad she'd agree.",
    "北京是一座古老的城市。王小明住在上海,他会弹钢琴,也会说法语和德语。这条河流过南京。",
    "東京は日本の首都です。山田さくらはピアノを弾きます。大阪の城はとても大きいです。カメラを買いました。",
    "กรุงเทพเป็นเมืองใหญ่ เชียงใหม่อยู่ทางเหนือ สมชายพูดภาษาไทยและภาษาลาว แม่น้ำไหลผ่านเมือง",
    "القاهرة مدينة كبيرة على النهر. ولد سليم في دمشق ويتكلم العربية والفرنسية ويعزف على العود.",
    "दिल्ली एक बड़ा शहर है। मीरा हिन्दी और उर्दू बोलती है और सितार बजाती है। नदी उत्तर से आती है।",
    "서울은 한국의 수도이다. 김민수는 피아노를 치고 한국어와 일본어를 말한다. 부산에는 바다가 있다.",
    "Москва стоит на реке. Анна Петрова играет на скрипке и говорит по-русски, по-польски и по-чешски.",
    "🙂 is a face, 👍 a thumb, 👩‍🚀 an astronaut, 👨‍👩‍👧 a family, 🇫🇷 and 🇯🇵 are flags, ❤️ is a heart.",
    "In 1990–1995 it was -27 degrees; the .NET team met at 10,000 metres, 'N Sync sang, and C++ was spoken.",
    'He said "yes", she said “no”, they said «да» and 「はい」; see also (a) and [b], 5% and 7/8 — or not…',
)
"""Written for this purpose: the scripts and signs that requests are made of."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and how its tokens are read.

    Args:
        name: Its name in figures.
        tokenizer: As the package gets it.
        read: ``bytes`` (GPT-2's stand-ins), ``marks`` (words open with ▁, other bytes as <0x..>) or ``words``.
        before: Number of tokens that it puts before every text.
        after: Number of those after.
    """

    name: str
    tokenizer: Any
    read: str
    before: int = 0
    after: int = 0

    def ids(self, text: str) -> list[int]:
        """Ids of a text with what comes before it, and without what comes after."""
        ids = list(self.tokenizer(text)["input_ids"])
        return ids[: len(ids) - self.after]

    def own_ids(self, text: str) -> list[int]:
        """Ids of the text alone."""
        return self.ids(text)[self.before :]

    def seen(self, text: str) -> str:
        """The text as the tokenizer's normaliser leaves it, white space where it writes marks."""
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        return (normalizer.normalize_str(text) if normalizer is not None and text else text).replace("▁", " ")

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Which bytes of what the tokenizer sees each of :meth:`own_ids` covers."""
        tokens = self.tokenizer.convert_ids_to_tokens(self.own_ids(text))
        seen = self.seen(text)
        if self.read == "words":
            return self._word_spans(seen, tokens)
        parts = [self._piece(token) for token in tokens]
        surface = b"".join(parts)
        lead = 1 if surface != seen.encode() else 0
        assert surface == b" " * lead + seen.encode(), f"{self.name}: the judge cannot read {tokens} of {text!r}"
        spans, place = [], -lead
        for part in parts:
            spans.append((place, place + len(part)))
            place += len(part)
        return spans

    def _piece(self, token: str) -> bytes:
        if token in SPECIAL:
            return token.encode()
        if self.read == "bytes":
            return bytes(_stand_ins()[letter] for letter in token)
        return bytes([int(token[3:5], 16)]) if token in BYTES else token.replace("▁", " ").encode()

    def _word_spans(self, seen: str, tokens: list[str]) -> list[tuple[int, int]]:
        """WordPiece forgets white space: its tokens go through the words one after the other."""
        spans, place, queue = [], 0, list(tokens)
        for word in self._words(seen):
            start = seen.index(word, place)
            place = start
            while place < start + len(word):
                token = queue.pop(0)
                size = len(word) if token == "<unk>" else len(token.removeprefix("##") if place > start else token)
                spans.append((len(seen[:place].encode()), len(seen[: place + size].encode())))
                place += size
        assert not queue, f"{self.name}: {queue} left over of {seen!r}"
        return spans

    def _words(self, seen: str) -> list[str]:
        return [word for word, _ in self.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(seen)]

    @cached_property
    def size(self) -> int:
        """Number of embeddings that a model for it needs."""
        return len(self.tokenizer)


@cache
def _stand_ins() -> dict[str, int]:
    """GPT-2's printable characters, and the bytes that they stand for."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table, free = {}, 0x100
    for byte in range(256):
        table[chr(byte if byte in printable else free)] = byte
        free += byte not in printable
    return table


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _around(before: bool, after: bool) -> Any:
    single = " ".join(["<s>"] * before + ["$A"] + ["</s>"] * after)
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])


def _byte_level(
    normalizer: Any = None, prefix: bool = False, before: bool = False, after: bool = False, threes: bool = False
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if threes:  # numbers in threes, as in newer models
        level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    own = processors.ByteLevel(trim_offsets=not threes)
    tokenizer.post_processor = processors.Sequence([own, _around(before, after)]) if before or after else own
    return _wrap(tokenizer)


def _marked(model: str, scheme: str, normalizer: Any = None, before: bool = False, after: bool = False) -> Any:
    """Words that open with ▁, by a pre-tokenizer; characters that were not seen become bytes."""
    tokenizer: Tokenizer
    if model == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trainer: Any = trainers.BpeTrainer(vocab_size=1000, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=700, special_tokens=[*SPECIAL, *BYTES], unk_token="<unk>", show_progress=False
        )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme=scheme)]
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if model == "unigram":  # the trainer makes one without the fallback
        tokenizer = _with_fallback(tokenizer)
    if before or after:
        tokenizer.post_processor = _around(before, after)
    return _wrap(tokenizer)


def _with_fallback(tokenizer: Tokenizer) -> Tokenizer:
    import json

    content = json.loads(tokenizer.to_str())
    content["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(content))


def _word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = _around(True, True)
    return _wrap(tokenizer)


_MAKERS: dict[str, Callable[[], tuple[Any, str, int, int]]] = {
    "byte level": lambda: (byte_level_tokenizer(), "bytes", 0, 0),
    "byte level, BOS": lambda: (byte_level_tokenizer(bos=True), "bytes", 1, 0),
    "marks by a normaliser, BOS": lambda: (sentencepiece_tokenizer(), "marks", 1, 0),
    "byte level, opening space, BOS and EOS": lambda: (
        _byte_level(prefix=True, before=True, after=True), "bytes", 1, 1,
    ),
    "byte level, NFC": lambda: (_byte_level(normalizers.NFC()), "bytes", 0, 0),
    "byte level, small letters, EOS": lambda: (
        _byte_level(normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), after=True), "bytes", 0, 1,
    ),
    "byte level, digit by digit": lambda: (_byte_level(threes=True, before=True), "bytes", 1, 0),
    "BPE with marks": lambda: (_marked("bpe", "first"), "marks", 0, 0),
    "Unigram with marks, EOS": lambda: (_marked("unigram", "always", after=True), "marks", 0, 1),
    "Unigram, NFKC, BOS": lambda: (_marked("unigram", "always", normalizers.NFKC(), before=True), "marks", 1, 0),
    "WordPiece, BOS and EOS": lambda: (_word_piece(), "words", 1, 1),
}  # fmt: skip
NAMES = tuple(_MAKERS)


@cache
def vocabulary(name: str) -> Vocabulary:
    """A tokenizer by its name."""
    return Vocabulary(name, *_MAKERS[name]())
