"""Looking at requests before any edit: what each would be looked up by and taught, and which are refused."""

from rich.table import Table

from rome_pl.console import console, escape
from rome_pl.data_modules import RequestDataModule
from rome_pl.edit_module import RomeModule
from rome_pl.loading import load_encoder
from rome_pl.requests import RequestError

__all__ = ["print_dry_run"]


def print_dry_run(model: RomeModule, datamodule: RequestDataModule) -> int:
    """Print each request's lookup token and target tokens. Nothing is edited, and no weights are loaded.

    Args:
        model: The module that would edit.
        datamodule: The requests.

    Returns:
        How many requests are refused.
    """
    datamodule.setup()
    encoder = load_encoder(model.hparams["pretrained"], model.hparams["chat"])
    out = console()
    table = Table(title="Dry run: lookup token and target span of each request")
    noted = any(request.notes for request in datamodule.requests)
    for name in ("record", "prompt", "lookup token", "target tokens", *(["notes"] if noted else [])):
        table.add_column(name, overflow="fold")
    refused = [record.message for record in datamodule.invalid]
    for request in datamodule.requests:
        try:
            lookup, target = encoder.describe(request, model.hparams["fact_token"])
            encoder.check_probes(request)
        except RequestError as error:
            refused.append(str(error))
            continue
        cells = (request.case_id, request.prompt, repr(lookup), repr(target), "; ".join(request.notes))
        table.add_row(*(escape(str(cell)) for cell in cells[: len(table.columns)]))
    out.print(table)
    for message in refused:
        out.print(message, style="red", markup=False)
    out.print(f"{table.row_count} requests are valid, {len(refused)} are not; nothing was edited")
    return len(refused)
