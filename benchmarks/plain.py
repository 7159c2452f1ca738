"""ROME as published, computed plainly: the baseline that the engine is measured against.

Whole model, whole rows, logits at every position, one edit at a time (Meng et al. 2022, section 3.1). Only the
encoding of requests and the closed form are the package's. Results are kept per record, so that a long baseline can be
interrupted and taken up again.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rome_pl.encoding.encoded_rows import EncodedEdit, EncodedRow
from rome_pl.model.architecture import RewriteSite, dtype_of_delta
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest
from rome_pl.utils.flops import count_flops
from rome_pl.utils.restored_state import frozen


@dataclass(frozen=True)
class PlainOptions:
    """The published settings for models of the Llama kind."""

    steps: int = 25
    lr: float = 0.5
    kl_factor: float = 0.0625
    weight_decay: float = 1e-3
    clamp: float = 4.0
    stop_loss: float = 0.05


@dataclass
class PlainEdit:
    """What the plain procedure finds for one request.

    Args:
        key_bare: Key of the bare prompt, ``[d_key]``.
        key_mean: Mean key over contexts, ``[d_key]``.
        value: The value to assert, ``[d_value]``.
        losses: Total loss at each evaluation.
        seconds: Wall time.
    """

    key_bare: Tensor
    key_mean: Tensor
    value: Tensor
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def plain_edit(model: Any, site: RewriteSite, edit: EncodedEdit, options: PlainOptions, pad_id: int) -> PlainEdit:
    """Optimise the value of one edit with whole forwards over all rows."""
    started = time.perf_counter()
    procedure = _Procedure(model, site, edit, options, pad_id)
    delta = procedure.delta
    optimizer = torch.optim.Adam([delta], lr=options.lr)
    losses: list[float] = []
    with procedure.hooked():
        for step in range(options.steps):
            optimizer.zero_grad()
            loss = procedure.loss()
            losses.append(float(loss.detach()))
            if losses[-1] < options.stop_loss or step == options.steps - 1:
                break
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                limit = options.clamp * procedure.outputs[0].norm()
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())
    keys = procedure.keys[: len(edit.rows)].double()
    value = procedure.outputs[0].double() + delta.detach().double()
    return PlainEdit(keys[0].clone(), keys.mean(0), value, losses, time.perf_counter() - started)


def plain_flops(model: Any, site: RewriteSite, edit: EncodedEdit, pad_id: int, evaluations: int) -> int:
    """Operations of :func:`plain_edit` with so many evaluations; every one is alike, and the last has no backward."""
    procedure = _Procedure(model, site, edit, PlainOptions(), pad_id)
    with procedure.hooked():
        with count_flops() as forward:
            loss = procedure.loss()
        with count_flops() as backward:
            loss.backward()
    return evaluations * forward.total + (evaluations - 1) * backward.total


class _Procedure:
    """One edit's rows, offset and loss."""

    def __init__(self, model: Any, site: RewriteSite, edit: EncodedEdit, options: PlainOptions, pad_id: int) -> None:
        self.model, self.site, self.options = model, site, options
        rows: list[EncodedRow] = [*edit.rows, edit.kl_row]
        device = site.weight.device
        self.width = max(len(row.ids) for row in rows)
        self.input_ids = torch.tensor([[*row.ids, *[pad_id] * (self.width - len(row.ids))] for row in rows])
        self.mask = torch.tensor([[1] * len(row.ids) + [0] * (self.width - len(row.ids)) for row in rows])
        self.input_ids, self.mask = self.input_ids.to(device), self.mask.to(device)
        self.lookup = torch.tensor([row.lookup for row in rows], device=device)
        self.every = torch.arange(len(rows), device=device)
        self.kl_at = (len(rows) - 1, edit.kl_row.first)
        targets = [(i, row.first + t, label) for i, row in enumerate(edit.rows) for t, label in enumerate(row.target)]
        self.at_row, self.at_column, self.labels = torch.tensor(targets, device=device).unbind(1)
        lengths = torch.tensor([len(row.target) for row in edit.rows], device=device)
        self.shares = lengths[self.at_row] * len(edit.rows)
        dtype = dtype_of_delta(site.weight)
        self.delta = torch.zeros(site.d_value, dtype=dtype, device=device, requires_grad=True)
        self.keys = self.outputs = torch.empty(0)
        self._base: Tensor | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Add the offset at every row's lookup token."""
        handle = self.site.projection.register_forward_hook(self._hook)
        try:
            with frozen(self.model):
                yield
        finally:
            handle.remove()

    def loss(self) -> Tensor:
        """The total loss at the offset."""
        output = self.model(input_ids=self.input_ids, attention_mask=self.mask, use_cache=False)
        log_probs = output.logits.log_softmax(-1)
        nll = -(log_probs[self.at_row, self.at_column, self.labels] / self.shares).sum()
        now = log_probs[self.kl_at]
        self._base = now.detach() if self._base is None else self._base
        kl = self.options.kl_factor * (now.exp() * (now - self._base)).sum()
        total: Tensor = nll + kl + self.options.weight_decay * self.delta.norm() / self.outputs[0].norm() ** 2
        return total

    def _hook(self, _: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        flat = output.reshape(len(self.every), self.width, -1)
        if not len(self.keys):
            keys = inputs[0].reshape(len(self.every), self.width, -1)
            self.keys = keys[self.every, self.lookup].detach().clone()
            self.outputs = flat[self.every, self.lookup].detach().clone()
        moved = flat.clone()
        moved[self.every, self.lookup] = moved[self.every, self.lookup] + self.delta.to(flat.dtype)
        return moved.reshape(output.shape)


class PlainCache:
    """Finished plain edits, one file each, found again only for the same model, layer, options, contexts and request.

    Args:
        folder: Where they lie.
        language_model: The model.
        site: The rewrite site.
        options: Options of the procedure.
        contexts: Texts put before prompts.
    """

    def __init__(
        self,
        folder: Path,
        language_model: LanguageModel,
        site: RewriteSite,
        options: PlainOptions,
        contexts: Sequence[str],
    ) -> None:
        self.folder = folder
        self._identity = (language_model.fingerprint, site.name, sorted(asdict(options).items()), tuple(contexts))
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, request: EditRequest) -> PlainEdit | None:
        """The edit of an earlier run, if there is one."""
        path = self._path(request)
        if not path.exists():
            return None
        tensors = load_file(path)
        rest = json.loads(path.with_suffix(".json").read_text())
        return PlainEdit(**tensors, **rest)

    def store(self, request: EditRequest, edit: PlainEdit) -> None:
        """Keep an edit. The tensors come last, so that an interrupted store leaves nothing that would be loaded."""
        path = self._path(request)
        path.with_suffix(".json").write_text(json.dumps({"losses": edit.losses, "seconds": edit.seconds}))
        work = path.with_suffix(".tmp")
        save_file({name: getattr(edit, name).cpu() for name in ("key_bare", "key_mean", "value")}, work)
        work.replace(path)

    def _path(self, request: EditRequest) -> Path:
        content = (request.prompt, request.subject, request.target_new, request.span)
        name = hashlib.sha256(repr((self._identity, content)).encode()).hexdigest()[:24]
        return self.folder / f"{name}.safetensors"
