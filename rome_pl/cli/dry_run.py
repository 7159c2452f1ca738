"""Looking at requests before any edit: what each would be looked up by and taught, and which are refused."""

from collections.abc import Sequence

from rich.table import Table

from rome_pl.encoding.text_encoder import FactToken, TextEncoder
from rome_pl.requests.edit_request import EditRequest, RequestError
from rome_pl.requests.record_forms import InvalidRecord
from rome_pl.utils.console import console, escape

__all__ = ["print_dry_run"]


def print_dry_run(
    encoder: TextEncoder, requests: Sequence[EditRequest], invalid: Sequence[InvalidRecord], fact_token: FactToken
) -> int:
    """Print each request's lookup token and target tokens. Nothing is edited, and no weights are loaded.

    Args:
        encoder: Of the model that would be edited.
        requests: The requests.
        invalid: Records that are none.
        fact_token: Which token's state is the lookup key.

    Returns:
        How many requests are refused.
    """
    out = console()
    table = Table(title="Dry run: lookup token and target span of each request")
    noted = any(request.notes for request in requests)
    for name in ("record", "prompt", "lookup token", "target tokens", *(["notes"] if noted else [])):
        table.add_column(name, overflow="fold")
    refused = [record.message for record in invalid]
    for request in requests:
        try:
            lookup, target = encoder.describe(request, fact_token)
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
