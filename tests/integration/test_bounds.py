"""Independent switches against growth: values of a fixed norm, and changes of a bounded one."""

import math

import pytest
import torch

from rome_pl.errors import OptionError
from rome_pl.ledger.status import EditStatus
from tests.integration.helpers import REQUESTS, run_edits
from tests.tiny import tiny_language_model
from tests.variants import slow

pytestmark = pytest.mark.usefixtures("no_perplexity")

JOINT = {"preset": "r_rome", "mom2_n_samples": 600, "sequential_edit": True}


def typical_norm(weight, moment):
    """Root mean square of ``W k`` over the text of the second moment, from its Cholesky factor."""
    matrix = weight.site.matrix(weight.original).double()
    values, vectors = torch.linalg.eigh(moment.matrix)
    return float((matrix @ vectors @ values.clamp(min=0).sqrt().diag()).norm())


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("layers", [[1], [0, 1]])
@pytest.mark.parametrize("preset", ["r_rome", slow("memit"), "lifelong"])
@pytest.mark.parametrize("family", [slow("llama"), "gpt2"])  # without bias, and with
def test_every_value_gets_the_norm_that_was_asked_for(family, preset, layers, batch_size, tmp_path):
    options = {**JOINT, "preset": preset, "layers": layers}
    session = run_edits(tiny_language_model(family), tmp_path / "a", batch_size=batch_size, anchor_norm=1.5, **options)
    free = run_edits(tiny_language_model(family), tmp_path / "b", REQUESTS[:1], **options).edits[0]
    for place, (weight, moment) in enumerate(zip(session.layers.weights, session.layers.moments, strict=True)):
        bias = 0.0 if weight.site.bias is None else weight.site.bias.detach().double()
        typical = typical_norm(weight, moment)
        values = [edit.written.assertions[place].value[0] - bias for edit in session.edits]
        assert [float(value.norm()) / typical for value in values] == pytest.approx([1.5] * 3, rel=1e-6)
    bias = session.layers.weights[0].site.bias
    shift = 0.0 if bias is None else bias.detach().double()
    first, lowest = (edit.written.assertions[0].value[0] - shift for edit in (session.edits[0], free))
    assert float(torch.cosine_similarity(first, lowest, dim=0)) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("layers", [[1], [0, 1]])
@pytest.mark.parametrize("sequential", [True, False])
def test_no_edit_changes_a_layer_by_more_than_is_allowed(sequential, layers, batch_size, tmp_path):
    options = {**JOINT, "layers": layers, "sequential_edit": sequential}
    free = run_edits(tiny_language_model(), tmp_path / "a", batch_size=batch_size, **options)

    def shares(session):
        originals = [weight.norms[1] for weight in session.layers.weights]
        return [
            [update.norm / norm for update, norm in zip(edit.written.updates, originals, strict=True)]
            for edit in session.edits
        ]

    largest = sorted(max(found) for found in shares(free))[1]  # so that one edit stays as it is
    session = run_edits(
        tiny_language_model(), tmp_path / "b", batch_size=batch_size, largest_update=largest * 0.999, **options
    )
    assert [edit.status for edit in session.edits] == [EditStatus.APPLIED] * 3
    assert max(max(found) for found in shares(session)) <= largest * 0.999 * (1 + 1e-9)
    shortened = [edit for edit in session.edits if any("largest_update" in note for note in edit.notes)]
    assert shortened
    assert all(math.isfinite(edit.after) for edit in session.edits)
    loose = run_edits(tiny_language_model(), tmp_path / "c", batch_size=batch_size, largest_update=1e6, **options)
    for one, two in zip(loose.edits, free.edits, strict=True):
        assert one.written.same_as(two.written)
        assert not any("largest_update" in note for note in one.notes)


def test_a_shortened_edit_is_a_part_of_the_whole_one(tmp_path):
    whole = run_edits(tiny_language_model(), tmp_path / "a", REQUESTS[:1], **JOINT).edits[0].written
    session = run_edits(tiny_language_model(), tmp_path / "b", REQUESTS[:1], largest_update=1e-3, **JOINT)
    part = session.edits[0].written
    share = part.norm / whole.norm
    assert share < 0.9
    matrices = [update.left.T @ update.right for update in (whole.updates[0], part.updates[0])]
    torch.testing.assert_close(matrices[1], share * matrices[0], rtol=1e-9, atol=1e-15)
    assert session.edits[0].notes == [f"made to the part of {share:.2g}, to stay within largest_update, at layer 1"]
    # What the ledger would replay asks for the part, too.
    session.layers.remove([])
    assert session.layers.written[0].norm == pytest.approx(part.norm, rel=1e-12)


def test_a_norm_of_values_needs_to_know_ordinary_text(tmp_path):
    with pytest.raises(OptionError, match="anchor_norm: without the second moment"):
        run_edits(tiny_language_model(), tmp_path, anchor_norm=1.0)


@pytest.mark.parametrize("value", [-1.0, 0.0, math.inf])
@pytest.mark.parametrize("name", ["anchor_norm", "largest_update"])
def test_what_bounds_nothing_or_everything_is_refused(name, value, tmp_path):
    with pytest.raises(OptionError, match=f"{name}: expected a number above 0, got {value}"):
        run_edits(tiny_language_model(), tmp_path, **{name: value})
