"""Schemas of the files of a run and of its exports.

Other fields are allowed: later versions add some. A field marked ``NotRequired`` is missing in files of earlier
versions.
"""

from dataclasses import fields
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import TypedDict

from rome_pl.files.schemas import Count, Name, Number
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics.score_forms import Scores
from rome_pl.search.value_search import Evaluation
from rome_pl.second_moments.moment_file import MomentHeader

__all__ = ["DELTA", "LEDGER_END", "MANIFEST", "RESULTS", "ledger_line"]

ENDED = [str(status) for status in EditStatus if status is not EditStatus.PENDING]


def _known_status(status: str) -> str:
    if status not in ENDED:
        raise ValueError(f"expected one of {', '.join(ENDED)}")
    return status


def _name_of_record(name: object) -> object:
    if not isinstance(name, int | str) or isinstance(name, bool):
        raise ValueError("expected a number or a text")
    return name


def _rising(layers: list[int]) -> list[int]:
    if layers != sorted(set(layers)):
        raise ValueError("expected layers by rising number, each once")
    return layers


Probability = Annotated[Number, Field(ge=0, le=1.000001)]
Size = Annotated[Number, Field(ge=0)]
Layers = Annotated[list[Count], AfterValidator(_rising)]
Shard = Annotated[str, Field(pattern=r"^\d{6,12}(\.\d{1,9})?\.safetensors$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
CaseId = Annotated[Any, AfterValidator(_name_of_record)]
Status = Annotated[str, AfterValidator(_known_status)]
Texts = list[str]
Dtype = Annotated[str, Field(pattern=r"^(torch\.)?(bfloat16|float16|float32|float64)$")]


class ProbeText(TypedDict):
    """As :class:`rome_pl.requests.edit_request.Probe`."""

    prompt: str
    answer: str
    kind: str


class Request(TypedDict):
    """The request and probes of an edit."""

    prompt: Name
    subject: Name
    target_new: Name
    target_true: str | None
    paraphrases: NotRequired[Texts]
    neighbours: NotRequired[Texts]
    generation_prompts: NotRequired[Texts]
    references: NotRequired[Texts]
    locality: NotRequired[list[ProbeText]]
    portability: NotRequired[list[ProbeText]]
    subject_span: NotRequired[Annotated[list[Count], Field(min_length=2, max_length=2)]]
    target_space: NotRequired[bool | None]
    relation: NotRequired[str | None]


class Probabilities(TypedDict):
    """Of the target, before the edit and after it."""

    before: Probability | None
    after: Probability | None


class _Line(TypedDict):
    index: Count
    case_id: CaseId
    status: Status
    shard: NotRequired[Shard]
    shard_sha256: NotRequired[Sha256]
    joint: NotRequired[list[Count] | None]
    together: NotRequired[Annotated[list[Count], Field(min_length=2, max_length=2)]]


class FirstLine(_Line):
    """The first line about an edit."""

    reason: str | None
    notes: Texts
    request: Request
    probability: Probabilities
    layers: Layers
    specificity: Number | None
    num_steps: Count
    loss: Number | None
    value_norm: Size | None
    update_norm: Size | None
    realised: Number | None
    failed: bool
    steps: list[Annotated[list[Number | None], Field(min_length=5, max_length=len(fields(Evaluation)))]]
    measured: Scores | None


class LaterLine(_Line):
    """A later line about an edit, with its changes."""

    reason: NotRequired[str | None]
    notes: NotRequired[Texts]
    update_norm: NotRequired[Size | None]
    realised: NotRequired[Number | None]


class Model(TypedDict):
    """The model that a run began with."""

    source: Name
    fingerprint: Name
    config: NotRequired[Name]
    tokenizer: Name
    encoding: NotRequired[Count]
    dtype: Dtype
    device: str
    chat: NotRequired[dict[str, Any] | None]
    frame: NotRequired[Texts]


class Rewrite(TypedDict):
    """The weights that a run writes into."""

    layers: Annotated[Layers, Field(min_length=1)]
    weights: list[Name]
    main: NotRequired[Layers]


class Metric(TypedDict):
    """Arguments of :func:`rome_pl.write.key_metric.make_metric`."""

    name: Name
    weight: Number
    ridge: Number
    threshold: Number


class Manifest(TypedDict):
    """``manifest.json`` of a run."""

    versions: dict[str, str]
    seed: NotRequired[int]
    mode: NotRequired[Literal["sequential", "single"]]
    preset: NotRequired[str]
    model: Model
    rewrite: Rewrite
    metric: Metric
    second_moments: list[MomentHeader]
    contexts: NotRequired[Texts]
    checksum: NotRequired[str]


class Results(TypedDict):
    """The fields of ``results.json`` that are read."""

    interrupted: bool
    finished: NotRequired[bool]
    products: NotRequired[Texts]
    n_applied: NotRequired[Count]
    n_requested: NotRequired[Count]


class LedgerEnd(TypedDict):
    """The end of a ledger when it was last closed."""

    lines: Annotated[Count, Field(ge=1)]
    check: str


class Base(TypedDict):
    """The model that an export is made from."""

    source: Name
    fingerprint: Name
    config: NotRequired[Name | None]
    tokenizer: NotRequired[Name | None]
    dtype: Dtype
    chat: NotRequired[dict[str, Any] | None]


class DeltaAbout(TypedDict):
    """``rome_pl.json`` of a delta."""

    format: Literal["delta"]
    version: Count
    base: Base
    rewrite: Rewrite
    num_edits: Count
    writes: list[list[Annotated[Count, Field(ge=1)]]]
    digests: list[Sha256]
    edits: list[dict[str, Any]]
    tensors: Sha256
    checksum: str


_FIRST_LINE: TypeAdapter[Any] = TypeAdapter(FirstLine)
_LATER_LINE: TypeAdapter[Any] = TypeAdapter(LaterLine)


def ledger_line(line: Any) -> TypeAdapter[Any]:
    """Return the schema of a line: the first line about an edit, or a later one."""
    return _FIRST_LINE if isinstance(line, dict) and "request" in line else _LATER_LINE


LEDGER_END: TypeAdapter[Any] = TypeAdapter(LedgerEnd)
MANIFEST: TypeAdapter[Any] = TypeAdapter(Manifest)
RESULTS: TypeAdapter[Any] = TypeAdapter(Results)
DELTA: TypeAdapter[Any] = TypeAdapter(DeltaAbout)
