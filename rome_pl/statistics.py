"""Finding the second moment that an edit needs: configured, shipped, cached, or computed from text on first use."""

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rome_pl.architecture import RewriteSite, decoder_layers
from rome_pl.hooks import capture_columns, frozen, hash_seed, seeded, stopped_after
from rome_pl.language_model import LanguageModel, cache_folder
from rome_pl.second_moment import MomentAccumulator, MomentInfo, SecondMoment, StatisticsError, library_versions

__all__ = ["accumulate", "corpus_fingerprint", "generated_texts", "read_corpus", "resolve_second_moment"]

KEYS_PER_DIMENSION = 30
"""Default number of key vectors, as a multiple of d_key."""

BLOCK = 256
"""Tokens per row of the statistics forward."""

ROWS = 8
"""Rows per statistics forward."""

GENERATED_LENGTH = 128
"""Tokens per text that a model generates as its own corpus."""

OPENERS = (
    "The",
    "In",
    "When",
    "It is",
    "A",
    "She",
    "He",
    "They",
    "This",
    "According to",
    "On",
    "We",
    "There",
    "Many",
    "At",
)
"""What generated texts open with: common openings of English sentences."""

OWN_DISTRIBUTION = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
"""Sampling options that undo what a model's generation config may set."""

log = logging.getLogger(__name__)


def resolve_second_moment(
    language_model: LanguageModel,
    site: RewriteSite,
    *,
    statistics: str | None = None,
    corpus: str | None = None,
    wanted: int | None = None,
    seed: int = 0,
) -> SecondMoment:
    """The second moment of the site's keys, on the model's device.

    In this order: the configured artefact; computed from the configured corpus; shipped with the package for these
    very weights, unless a number of keys is asked for; computed from text that the model generates itself. What is
    computed is cached for these weights, text and number of keys.

    Args:
        language_model: The model.
        site: The projection whose input is the key.
        statistics: Path of an artefact.
        corpus: Text file, or hub name of a data set with a ``text`` column.
        wanted: Number of key vectors to compute from; ``None`` takes 30 per dimension.
        seed: Seed of a generated corpus.

    Raises:
        StatisticsError: If configured statistics are damaged or belong to another model or layer, or the corpus
            cannot be read.
    """
    weights = language_model.fingerprint_below(site)
    if statistics is not None:
        moment = SecondMoment.load(Path(statistics))
        moment.check(weights=weights, layer=site.layer, where=statistics)
        return _to(moment, language_model)
    count = wanted or KEYS_PER_DIMENSION * site.d_key
    if corpus is None and wanted is None:
        for path in sorted((Path(__file__).parent / "assets").glob("*.safetensors")):
            moment = SecondMoment.load(path)
            if moment.info.layer == site.layer and moment.info.weights == weights:
                return _to(moment, language_model)
    origin = corpus or f"generated, seed {seed}"
    fingerprint = corpus_fingerprint(corpus) if corpus else origin
    key = json.dumps([weights, language_model.tokenizer_fingerprint, site.layer, fingerprint, count])
    cached = cache_folder() / "statistics" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    if cached.is_file():
        moment = SecondMoment.load(cached)
        moment.check(weights=weights, layer=site.layer, where=str(cached))
        return _to(moment, language_model)
    if corpus is None:
        texts = generated_texts(language_model, count, seed)
        log.warning(
            "No statistics or corpus configured for layer %d: the model writes its own corpus of %d tokens first "
            "(once; kept in %s). A text file given as 'corpus' is quicker and closer to real text",
            site.layer,
            count,
            cached,
        )
    else:
        texts = read_corpus(corpus)
        log.warning(
            "Computing the second moment of layer %d from %s (%d keys; once, kept in %s)",
            site.layer,
            corpus,
            count,
            cached,
        )
    started = time.monotonic()
    moment = accumulate(language_model, site, texts, count, fingerprint)
    log.warning(
        "Second moment of layer %d: %d keys in %.0f s", site.layer, moment.info.count, time.monotonic() - started
    )
    moment.save(cached)
    return _to(SecondMoment.load(cached), language_model)  # what every later run will read


@torch.no_grad()
def accumulate(
    language_model: LanguageModel, site: RewriteSite, texts: Iterable[str], wanted: int, corpus: str
) -> SecondMoment:
    """Sum ``k kᵀ`` over text, stopping each forward after the site's layer.

    Texts are packed into rows of full length; attention may look across the border of two texts in a row. Special
    tokens are not added, so none is counted.

    Args:
        language_model: The model.
        site: The projection whose input is the key.
        texts: Pieces of text.
        wanted: Number of keys after which to stop; the corpus may hold fewer.
        corpus: What the texts are, for the artefact's description.
    """
    accumulator = MomentAccumulator(site.d_key, language_model.device)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} keys"),
        TimeRemainingColumn(),
    )
    with frozen(language_model.model), Progress(*columns, transient=True) as progress:
        task = progress.add_task(f"second moment, layer {site.layer}", total=wanted)
        for rows in _packed(language_model, texts, wanted):
            accumulator.add(
                _keys(language_model.model, site, rows.to(language_model.device))[: wanted - accumulator.count]
            )
            progress.update(task, completed=accumulator.count)
            if accumulator.count >= wanted:
                break
    if accumulator.count < site.d_key:
        log.warning(
            "The corpus gave %d keys for a dimension of %d: the second moment is singular, and only the ridge makes it "
            "solvable. At least %d more are needed, better %d in all",
            accumulator.count,
            site.d_key,
            site.d_key - accumulator.count,
            KEYS_PER_DIMENSION * site.d_key,
        )
    versions = json.dumps(library_versions())
    return accumulator.finish(
        lambda count: MomentInfo(
            weights=language_model.fingerprint_below(site),
            tokenizer=language_model.tokenizer_fingerprint,
            layer=site.layer,
            count=count,
            corpus=corpus,
            model=language_model.source,
            versions=versions,
        )
    )


def _keys(model: Any, site: RewriteSite, input_ids: torch.Tensor) -> torch.Tensor:
    with (
        capture_columns(site.projection, len(input_ids), slice(None)) as kept,
        stopped_after(decoder_layers(model)[1][site.layer]),
    ):
        model(input_ids=input_ids, use_cache=False)
    return kept["input"].flatten(0, 1)


def _packed(language_model: LanguageModel, texts: Iterable[str], wanted: int) -> Iterator[torch.Tensor]:
    """Batches ``[rows, length]`` of ids without padding; the last one is shorter, so no token is lost."""
    block = min(BLOCK, language_model.encoder.max_length)
    buffer: list[int] = []
    produced = 0
    for text in texts:
        buffer += language_model.tokenizer(text, add_special_tokens=False)["input_ids"]
        while len(buffer) >= ROWS * block and produced < wanted:
            yield torch.tensor(buffer[: ROWS * block]).reshape(ROWS, block)
            buffer = buffer[ROWS * block :]
            produced += ROWS * block
        if produced >= wanted:
            return
    rows = len(buffer) // block
    if rows:
        yield torch.tensor(buffer[: rows * block]).reshape(rows, block)
    if buffer[rows * block :]:
        yield torch.tensor(buffer[rows * block :]).unsqueeze(0)


def read_corpus(corpus: str) -> Iterator[str]:
    """Texts of a plain text file (one a line), or of a hub data set, streamed.

    Raises:
        StatisticsError: If the file is empty or not UTF-8, or the data set cannot be loaded or has no ``text`` column.
    """
    path = Path(corpus)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise StatisticsError(f"{corpus}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
        if not text.strip():
            raise StatisticsError(f"{corpus}: is empty")
        yield from (line + "\n" for line in text.splitlines() if line.strip())
        return
    import datasets

    try:
        stream = datasets.load_dataset(corpus, split="train", streaming=True)
    except Exception as error:  # the library raises many kinds, from many layers
        raise StatisticsError(
            f"corpus '{corpus}': no such file, and no data set of that name could be loaded: {error}"
        ) from error
    for record in stream:
        if "text" not in record:
            raise StatisticsError(f"corpus '{corpus}': has no 'text' column, but {sorted(record)}")
        yield record["text"]


def generated_texts(language_model: LanguageModel, tokens: int, seed: int) -> Iterator[str]:
    """Text that the model samples from its own distribution, seeded; at least ``tokens`` tokens of it."""
    tokenizer, model = language_model.tokenizer, language_model.model
    length = min(GENERATED_LENGTH, language_model.encoder.max_length)
    produced = 0
    eos = model.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    for batch in itertools.count():
        opener = OPENERS[batch % len(OPENERS)]
        ids = torch.tensor(tokenizer(opener, add_special_tokens=False)["input_ids"], device=language_model.device)
        ids = ids.expand(4 * ROWS, -1)
        with seeded(hash_seed(seed, batch), language_model.device), frozen(model), torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                **OWN_DISTRIBUTION,
                max_new_tokens=max(1, length - ids.shape[1]),
                pad_token_id=language_model.encoder.pad_id,
            )
        produced += out.numel()
        rows = [_until(row, ends) for row in out.tolist()]
        yield from (text + "\n" for text in tokenizer.batch_decode(rows, skip_special_tokens=True))
        if produced >= 2 * tokens:  # a model that ends its texts early gives fewer tokens than were sampled
            return


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """Ids before the first end of text: what ``generate`` fills a finished row with is no text."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def corpus_fingerprint(corpus: str) -> str:
    """Hash of a text file; the name itself of a hub data set."""
    path = Path(corpus)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else corpus


def _to(moment: SecondMoment, language_model: LanguageModel) -> SecondMoment:
    return SecondMoment(moment.matrix.to(language_model.device), moment.info)
