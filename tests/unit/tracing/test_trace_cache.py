import torch

from rome_pl.tracing.trace import Fact, Trace
from rome_pl.tracing.trace_cache import KnownTraces
from tests.tiny import tiny_language_model

FACT = Fact((3, 4, 5), (0, 2), 7)
TRACE = Trace(0.5, 0.25, {"hidden": torch.rand(3, 3, dtype=torch.float64)})


def test_traces_are_found_again_under_the_same_settings(language_model):
    KnownTraces(language_model, 6, 0.1).keep(FACT, TRACE)
    found = KnownTraces(language_model, 6, 0.1).find(FACT)
    assert (found.clean, found.corrupted) == (0.5, 0.25)
    assert torch.equal(found.restored["hidden"], TRACE.restored["hidden"])
    assert KnownTraces(language_model, 5, 0.1).find(FACT) is None
    assert KnownTraces(language_model, 6, 0.1).find(Fact((3, 4, 6), (0, 2), 7)) is None
    assert KnownTraces(tiny_language_model("llama", seed=1), 6, 0.1).find(FACT) is None


def test_a_line_cut_short_is_not_read_and_does_no_harm(language_model):
    known = KnownTraces(language_model)
    known.keep(FACT, TRACE)
    other = Fact((9, 4, 5), (0, 2), 7)
    with known.path.open("a", encoding="utf-8") as file:
        file.write('\n{"fact": "abc", "clean": 0.')
    assert KnownTraces(language_model).find(FACT) is not None
    again = KnownTraces(language_model)
    again.keep(other, TRACE)
    assert KnownTraces(language_model).find(FACT) is not None
    assert KnownTraces(language_model).find(other) is not None


def test_a_model_edited_in_memory_finds_and_keeps_nothing(language_model):
    KnownTraces(language_model).keep(FACT, TRACE)
    other = Fact((9, 4, 5), (0, 2), 7)
    with torch.no_grad():
        language_model.model.lm_head.weight.neg_()
    edited = KnownTraces(language_model)
    assert edited.find(FACT) is None
    edited.keep(other, TRACE)
    assert edited.find(other) is None
    assert KnownTraces(tiny_language_model()).find(other) is None
