"""A tiny model in which a value offset moves far predictions too, and edits of different lengths to search on it."""

from functools import cache

import torch

from rome_pl.encoding.row_layout import row_layout
from rome_pl.forward.prefix_pass import run_prefix
from rome_pl.model.architecture import find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest
from rome_pl.search.objective import ValueObjective
from tests.tiny import tiny_language_model

CONTEXTS = ("", "It rains. ", "A much longer opening text. ")
REQUESTS = [
    EditRequest(prompt="The lighthouse of Korrin stands in", subject="Korrin", target_new="Oslo", case_id="a"),
    EditRequest(prompt="Miss Vane plays the", subject="Miss Vane", target_new="violin duets", case_id="b"),
    EditRequest(prompt="We left for Tarn", subject="Tarn", target_new="tea", case_id="c"),
    EditRequest(
        prompt="What everybody in the old village by the sea says of Dunholt bread is that it is made of",
        subject="Dunholt bread",
        target_new="rye",
        case_id="d",
    ),
    EditRequest(prompt="Rome is the capital of", subject="Rome", target_new="the", case_id="e"),
]
NAMES = [str(request.case_id) for request in REQUESTS]


@cache
def lively_model() -> LanguageModel:
    """Computes in float64 throughout, reads BOS-less text, and is only read by tests."""
    language_model = tiny_language_model("gpt_neox")
    with torch.no_grad():
        language_model.model.get_output_embeddings().weight.mul_(3)
        for name, parameter in language_model.model.named_parameters():
            if "layers.2.attention" in name:
                parameter.mul_(3)
    return language_model


def encode(requests=REQUESTS, contexts=CONTEXTS, kl_position="subject"):
    encoder = lively_model().encoder
    return [encoder.edit(request, contexts, kl_position=kl_position) for request in requests]


def prefix_of(rows, whole_rows=False):
    language_model = lively_model()
    site = find_site(language_model.model, 1)
    return run_prefix(language_model.model, site, rows, language_model.encoder.pad_id, whole_rows)


def objective_of(edits, layout=None, kl_factor=0.0625, decay=1e-3, whole_rows=False):
    """The objective of encoded edits, from a prefix pass of their own."""
    layout = row_layout(edits) if layout is None else layout
    return ValueObjective(prefix_of(layout.rows, whole_rows), layout, kl_factor, decay)
