"""The verbs of the command line that take a run's edits elsewhere."""

from rome_pl.errors import OptionError
from rome_pl.export.checkpoint import save_model
from rome_pl.export.delta import apply_delta, read_delta
from rome_pl.export.hub import fault_of, push
from rome_pl.export.run_export import check_export, export_run
from rome_pl.files.whole_files import check_free, local_path
from rome_pl.ledger.model_places import find_model
from rome_pl.ledger.replay import read_edits
from rome_pl.ledger.run import base_model, known_names, run_folder
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import load_language_model
from rome_pl.utils.console import console

__all__ = ["apply", "export"]


def export(
    ledger: str,
    format: str,
    output: str,
    rank: int | None = None,
    max_shard_size: str | None = None,
    push_to_hub: str | None = None,
    cases: str | None = None,
    statistics: list[str] | None = None,
    allow_pickle: bool = False,
    pretrained: str | None = None,
) -> None:
    """Write the edits of a sequential run as a checkpoint, as the change alone, or as a LoRA adapter.

    Args:
        ledger: Folder of the run.
        format: ``hf`` for a merged Hugging Face checkpoint, ``delta`` for the change alone (see ``rome-pl apply``),
            ``peft`` for a LoRA adapter.
        output: Folder to write; it does not exist, or is empty.
        rank: Largest rank of an adapter at a layer; the error is reported. ``None`` (default): exact.
        max_shard_size: Largest file of a checkpoint, such as 5GB.
        push_to_hub: Repository of the Hugging Face hub to upload the folder to; a new one is private.
        cases: Records to export without the others, by ``case_id``, separated by commas. ``None`` (default): all.
        statistics: The run's second moments, where ``cases`` is given and they are neither shipped nor in the cache.
        allow_pickle: Whether weights that do not come as safetensors may be read.
        pretrained: The model that the run began with, where it lies elsewhere than at the time of the run.
    """
    run, folder = run_folder(ledger), local_path(output)
    check_export(format, folder, rank, max_shard_size)
    if push_to_hub is not None and (fault := fault_of(push_to_hub)):
        raise OptionError(f"push_to_hub: {fault}")
    edits = {str(edit["case_id"]): edit for edit in read_edits(run)}
    names = None if cases is None else known_names(cases, edits, run)
    moments = [local_path(path) for path in statistics or []]
    made = export_run(
        base_model(run, allow_pickle, pretrained), run, folder, format,
        rank=rank, max_shard_size=max_shard_size, cases=names, statistics=moments,
    )  # fmt: skip
    out = console(soft_wrap=True, markup=False)
    for part in made.adapter:
        cut = f" of {part.full_rank}" if part.rank < part.full_rank else ""
        out.print(f"{part.weight}: rank {part.rank}{cut}, relative error {part.error:.2e}")
    out.print(f"{made.num_edits} edits as {format} in {folder} ({_size(made.num_bytes)})")
    if push_to_hub is not None:
        out.print(f"Uploaded to {push(folder, push_to_hub)}")


def apply(delta: str, output: str, pretrained: str | None = None, allow_pickle: bool = False) -> None:
    """Make the model of a run from the base model and a delta.

    Args:
        delta: Folder of ``rome-pl export --format delta``.
        output: Folder for a Hugging Face checkpoint; it does not exist, or is empty.
        pretrained: The base model, where it lies elsewhere than at the time of the run.
        allow_pickle: Whether weights that do not come as safetensors may be read.
    """
    folder = local_path(output)
    check_free(folder, "output")
    found = read_delta(local_path(delta))
    base = found.about["base"]

    def load(source: str) -> LanguageModel:
        return load_language_model(source, base["dtype"], allow_pickle)

    language_model = find_model(base, local_path(delta), load, pretrained, "delta")
    same = apply_delta(language_model, found)
    save_model(language_model, folder, "output")
    told = (
        "bit for bit the weights of the run"
        if same
        else "not bit for bit the weights of the run: the base model was loaded from a copy in another precision, or "
        "this machine rounds in another way"
    )
    console(soft_wrap=True, markup=False).print(f"{found.num_edits} edits, {told}. Saved to {folder}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} KB"
