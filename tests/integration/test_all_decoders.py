"""Every type of decoder in transformers is edited right, or refused for the reason that is pinned."""

import importlib.util
from pathlib import Path

import pytest
import transformers

from tests.all_decoders import TYPES, edit_decoder, pinned
from tests.variants import slow

DOCS = Path(__file__).parents[2] / "docs"

QUICK = {
    "gemma3": "a vision tower as deep as the text model, before it",
    "gemma4_text": "a layer's own embeddings, mapped to the hidden size behind the MLP",
    "glm": "several ends of text",
    "nemotron_h": "layers of one kind each, which the model asks for it",
    "roberta": "positions that begin behind the pad token's id",
    "rwkv": "parameters of three dimensions that are no experts, and no attention",
    "trocr": "positions that are counted by column",
    "zamba": "layers that share one MLP",
}
"""Types that show a structure each."""

same_version = pytest.mark.skipif(
    transformers.__version__ != pinned()["transformers"], reason="verdicts are pinned for another version"
)


@same_version
@pytest.mark.filterwarnings("ignore")  # of other libraries, about their own defaults
@pytest.mark.parametrize("model_type", [name if name in QUICK else slow(name) for name in TYPES])
def test_a_type_is_edited_right_or_refused_for_a_reason(model_type):
    verdict = edit_decoder(model_type)
    assert verdict.pinned == pinned()["types"][model_type], verdict.message


@same_version
def test_every_type_is_pinned():
    assert sorted(pinned()["types"]) == TYPES
    assert set(QUICK) <= set(TYPES)


def test_no_type_is_pinned_as_wrong_or_without_a_reason():
    for name, (kind, *notes) in pinned()["types"].items():
        assert kind in ("edited", "refused", "not built"), name
        assert kind == "edited" or notes, name
        assert "other" not in notes, name


def test_the_page_agrees_with_what_is_pinned():
    spec = importlib.util.spec_from_file_location("tabulate_decoders", DOCS / "tabulate_decoders.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "decoders.md").read_text(encoding="utf-8") == module.page(), "run python docs/tabulate_decoders.py"
