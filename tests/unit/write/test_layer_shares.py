"""Several rewrite layers: an offset found at the last one is shared among all of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rome_pl.callbacks import RepresentationCheck, Verification
from rome_pl.errors import OptionError
from rome_pl.forward.hooks import capture_columns, capture_output
from rome_pl.forward.prefix_pass import run_prefix
from rome_pl.model.architecture import UnsupportedModelError, decoder_layers, find_site
from rome_pl.requests.edit_request import EditRequest
from rome_pl.second_moments.second_moment import RIDGE, MomentInfo, SecondMoment
from rome_pl.write.presets import PRESETS
from tests.integration.helpers import FAST, changed, lenient_callbacks, run_edits, snapshot
from tests.tiny import FAMILIES, tiny_language_model
from tests.variants import slow

NORMALISED = ("gemma2", "gemma3_text", "olmo2")
"""Families that normalise the MLP's output before they add it to the hidden state."""

REQUESTS = [
    EditRequest(
        prompt="In the evening Miss Vane plays the", subject="Miss Vane", target_new="drums", target_true="harp",
        case_id="a", paraphrases=["Whatever Miss Vane plays is a"],
    ),
    EditRequest(prompt="The lighthouse of Korrin stands in", subject="Korrin", target_new="Oslo", case_id="b"),
    EditRequest(prompt="Of all the breads Dunholt bread is made of", subject="Dunholt bread", target_new="rye",
    case_id="c"),
]  # fmt: skip
SHARED = {**FAST, "layers": [0, 1, 2], "preset": "r_rome", "mom2_adjustment": False}
EMMET = {"preset": "emmet", "mom2_adjustment": None}


def lookups(language_model, session, edit, layer):
    """Hidden states leaving a layer at the lookup token of each context, each row by itself and whole."""
    module, found = decoder_layers(language_model.model)[1][layer], []
    for row in language_model.encoder.edit(edit.request, session.contexts).rows:
        with capture_output(module, slice(row.lookup, row.lookup + 1)) as seen, torch.no_grad():
            language_model.model(input_ids=torch.tensor([row.ids]), use_cache=False)
        found.append(seen["hidden"][0, 0].double())
    return torch.stack(found)


def statistics_of(language_model, folder):
    """A second moment for each layer, and the metric it makes, ridge included."""
    paths, metrics = [], {}
    for layer in (0, 1, 2):
        site = find_site(language_model.model, layer)
        samples = torch.randn(200, site.d_key, dtype=torch.float64, generator=torch.Generator().manual_seed(layer))
        moment = (samples.T @ samples / 200).float().double()
        info = MomentInfo(language_model.fingerprint_below(site), "", layer, 200, "random")
        paths.append(str(folder / f"{layer}.safetensors"))
        SecondMoment(moment, info).save(folder / f"{layer}.safetensors")
        metrics[layer] = np.linalg.inv((moment + RIDGE * moment.diagonal().mean() * torch.eye(site.d_key)).numpy())
    return paths, metrics


@pytest.mark.parametrize("family", ["llama", "gpt2", slow("gptj"), slow("bloom")])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("shares", ["even", "specific"])
def test_every_layer_writes_its_share_of_what_is_missing(family, together, shares, tmp_path, monkeypatch):
    """Algorithm 1 of MEMIT done by hand: whole rows, one by one, nothing cached."""
    monkeypatch.setitem(PRESETS, "emmet", replace(PRESETS["emmet"], shares=shares))
    language_model = tiny_language_model(family)
    paths, metrics = statistics_of(language_model, tmp_path)
    requests = REQUESTS if together else REQUESTS[:1]
    session = run_edits(
        language_model, tmp_path / "run", requests, batch_size=len(requests), sequential_edit=True,
        **{**SHARED, **EMMET, "statistics": paths[::-1]},
    )  # fmt: skip
    assert session.layers.numbers == [0, 1, 2]

    by_hand = tiny_language_model(family)
    before = {edit.name: lookups(by_hand, session, edit, 2) for edit in session.edits}
    weights = {edit.name: [1.0, 1.0, 1.0] for edit in session.edits}
    if shares == "specific":
        for edit in session.edits:
            with _at_lookups(by_hand, session, edit, {}) as rows:
                means = [rows(layer)[1].mean(0).numpy() for layer in (0, 1, 2)]
            weights[edit.name] = [key @ metrics[layer] @ key for layer, key in enumerate(means)]
        assert max(weights["a"]) > 1.1 * min(weights["a"])
    changes = {}
    for place, layer in enumerate((0, 1, 2)):
        keys, residuals = [], []
        for edit in session.edits:
            with _at_lookups(by_hand, session, edit, changes) as rows:
                hidden, inputs = rows(layer)
            missing = edit.search.delta - (hidden - before[edit.name]).mean(0)
            left = weights[edit.name][place:]
            asked = missing * left[0] / sum(left)
            residuals.append(asked.numpy())
            keys.append(inputs.mean(0).numpy())
        k, r = np.stack(keys, 1), np.stack(residuals, 1)
        metric = metrics[layer] / 1000
        changes[layer] = r @ np.linalg.inv(k.T @ metric @ k + 0.1 * np.eye(len(keys))) @ k.T @ metric
    for layer, weight in enumerate(session.layers.weights):
        original = by_hand.model.state_dict()[weight.site.name]
        found = weight.site.matrix(weight.site.weight - original).detach().numpy()
        assert np.linalg.norm(found - changes[layer]) < 1e-6 * np.linalg.norm(changes[layer])


class _at_lookups:
    """Runs an edit's rows with changes of weights that only the lookup token sees."""

    def __init__(self, language_model, session, edit, changes):
        self.model, self.changes = language_model.model, changes
        self.rows = language_model.encoder.edit(edit.request, session.contexts).rows

    def __enter__(self):
        return self.run

    def __exit__(self, *_):
        pass

    def run(self, layer):
        hidden, inputs = [], []
        for row in self.rows:
            handles, here = [], slice(row.lookup, row.lookup + 1)
            for number, matrix in self.changes.items():
                site = find_site(self.model, number)
                handles.append(site.projection.register_forward_hook(_change_at(row, matrix)))
            handles.append(find_site(self.model, layer).projection.register_forward_pre_hook(_keep(row, inputs)))
            with capture_output(decoder_layers(self.model)[1][2], here) as seen, torch.no_grad():
                self.model(input_ids=torch.tensor([row.ids]), use_cache=False)
            for handle in handles:
                handle.remove()
            hidden.append(seen["hidden"][0, 0])
        return torch.stack(hidden), torch.stack(inputs)


def _change_at(row, matrix):
    def hook(_, args, output):
        flat = output.reshape(len(row.ids), -1).clone()
        flat[row.lookup] += args[0].reshape(len(row.ids), -1)[row.lookup] @ torch.from_numpy(matrix).T
        return flat.reshape(output.shape)

    return hook


def _keep(row, inputs):
    return lambda _, args: inputs.append(args[0].reshape(len(row.ids), -1)[row.lookup].detach())


@pytest.mark.parametrize(
    "family", [name if name in ("llama", "gpt2", "phi") else slow(name) for name in FAMILIES if name not in NORMALISED]
)
def test_together_the_layers_move_the_hidden_state_by_the_offset(family, tmp_path):
    """Under a prompt that begins with its subject nothing before the lookup token can blur it."""
    language_model = tiny_language_model(family)
    request = EditRequest(prompt="X lies in", subject="X", target_new="Oslo", case_id="t")
    before = snapshot(language_model.model)
    session = run_edits(
        language_model, tmp_path, [request], sequential_edit=True, **{**SHARED, "preset": "p_rome", "contexts": []}
    )
    (edit,) = session.edits
    assert sorted(changed(language_model.model, before)) == sorted(
        weight.site.name for weight in session.layers.weights
    )
    row = language_model.encoder.edit(request, session.contexts).rows[0]
    now = lookups(language_model, session, edit, 2)[0]
    with torch.no_grad():
        for weight in session.layers.weights:
            weight.site.weight.copy_(before[weight.site.name])
    then = lookups(language_model, session, edit, 2)[0]
    assert row.lookup == 0
    torch.testing.assert_close(now - then, edit.search.delta.double(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", NORMALISED)
def test_a_family_that_normalises_what_its_mlp_gives_is_refused(family, tmp_path):
    with pytest.raises(UnsupportedModelError, match="give one layer"):
        run_edits(tiny_language_model(family), tmp_path, **SHARED)


def test_shares_do_not_depend_on_the_batch(tmp_path):
    options = {**SHARED, "layers": [0, 1]}  # after the last layer nothing looks back at the lookup token
    together = run_edits(tiny_language_model(), tmp_path, REQUESTS, batch_size=3, **options)
    for request, edit in zip(REQUESTS, together.edits, strict=True):
        (alone,) = run_edits(tiny_language_model(), tmp_path, [request], **options).edits
        for one, two in zip(edit.written.updates, alone.written.updates, strict=True):
            torch.testing.assert_close(one.left.T @ one.right, two.left.T @ two.right, rtol=1e-8, atol=1e-11)
        assert edit.after == pytest.approx(alone.after, rel=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lookup_column_alone_runs_as_in_whole_rows(family):
    language_model = tiny_language_model(family)
    sites = [find_site(language_model.model, layer) for layer in (0, 1, 2)]
    contexts = ("", "It rains. ", "A much longer opening text. ")
    rows = [row for request in REQUESTS for row in language_model.encoder.edit(request, contexts).rows]
    pad_id = language_model.encoder.pad_id
    for some in (range(len(rows)), (3, 5, 1)):
        passes = [
            run_prefix(language_model.model, sites[2], rows, pad_id, whole, sites[:2]).below[0].select(list(some))
            for whole in (False, True)
        ]
        for cached, whole in zip(*(one.through(sites) for one in passes), strict=True):
            for name in ("keys", "outputs", "hidden"):
                torch.testing.assert_close(getattr(cached, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
        for site, seen in zip(sites, passes[0].through(sites), strict=True):
            for index, place in enumerate(some):
                row = rows[place]
                with capture_columns(site.projection, 1, slice(row.lookup, row.lookup + 1)) as alone, torch.no_grad():
                    language_model.model(input_ids=torch.tensor([row.ids]), use_cache=False)
                torch.testing.assert_close(seen.keys[index], alone["input"][0, 0], rtol=1e-5, atol=1e-6)


def test_a_single_edit_is_measured_as_if_it_were_written(tmp_path):
    single = run_edits(tiny_language_model(), tmp_path / "a", REQUESTS[:1], **SHARED)
    written = run_edits(tiny_language_model(), tmp_path / "b", REQUESTS[:1], sequential_edit=True, **SHARED)
    (one,), (two,) = single.edits, written.edits
    assert one.after == pytest.approx(two.after, rel=1e-9)
    assert one.scores["immediate"].rewrite == pytest.approx(two.scores["immediate"].rewrite, rel=1e-9)
    assert one.written.norm == pytest.approx(float(torch.tensor([u.norm for u in two.written.updates]).norm()))


def test_statistics_have_to_be_there_for_every_layer(tmp_path):
    language_model = tiny_language_model()
    paths, _ = statistics_of(language_model, tmp_path)
    with pytest.raises(ValueError, match=r"none of .* is of layer 2; give one file for each rewrite layer"):
        run_edits(language_model, tmp_path / "run", **{**SHARED, **EMMET, "statistics": paths[:2]})


def test_specificity_is_one_for_ordinary_text_and_small_for_what_is_everywhere(tmp_path):
    language_model = tiny_language_model("llama")
    paths, _ = statistics_of(language_model, tmp_path)
    options = {**SHARED, **EMMET, "statistics": paths, "sequential_edit": True}
    layers = run_edits(language_model, tmp_path / "run", REQUESTS[:1], **options).layers
    samples = torch.randn(200, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))  # layer 1's keys
    found = [layers.specificity(layers.numbers, [key, key, key])[1] for key in samples]
    assert sum(found) / len(found) == pytest.approx(1, rel=1e-4)
    common = torch.linalg.eigh(layers.moments[1].matrix)[1][:, -1]
    rare = torch.linalg.eigh(layers.moments[1].matrix)[1][:, 0]
    assert layers.specificity(layers.numbers, [common] * 3)[1] < layers.specificity(layers.numbers, [rare] * 3)[1] / 5


@pytest.mark.parametrize("preset", ["lifelong", "memit"])
def test_an_edit_without_an_offset_asks_for_no_change(preset, tmp_path):
    """As of a fact that the model gives with the wanted probability already."""
    language_model = tiny_language_model("llama")
    paths, _ = statistics_of(language_model, tmp_path)
    options = {**SHARED, "layers": [0, 1], "preset": preset, "mom2_adjustment": None, "statistics": paths}
    session = run_edits(
        language_model, tmp_path / "run", REQUESTS, batch_size=3, sequential_edit=True, stop_loss=1e3, **options
    )
    assert [edit.reason for edit in session.edits] == [None] * 3
    assert all(float(edit.search.delta.norm()) == 0 for edit in session.edits)
    assert session.layers.change < 1e-12


@pytest.mark.parametrize("reject", [False, True])
def test_a_key_that_stands_for_much_else_is_noted_or_rejected(reject, tmp_path):
    language_model = tiny_language_model("llama")
    paths, _ = statistics_of(language_model, tmp_path)
    options = {**SHARED, **EMMET, "statistics": paths, "sequential_edit": True}
    callbacks = lenient_callbacks()
    callbacks[0] = RepresentationCheck(least_specificity=0.0, largest_norm_ratio=100.0)
    (usual,) = run_edits(language_model, tmp_path / "a", REQUESTS[:1], callbacks, **options).edits
    assert usual.notes == []
    assert usual.record()["specificity"] == pytest.approx(sum(usual.search.specificity))
    callbacks = lenient_callbacks()
    callbacks[0] = RepresentationCheck(
        least_specificity=1.01 * usual.specificity,
        largest_norm_ratio=100.0,
        on_odd_key="reject" if reject else "note",
    )
    session = run_edits(tiny_language_model("llama"), tmp_path / "b", REQUESTS[:1], callbacks, **options)
    (edit,) = session.edits
    assert edit.status == ("rejected" if reject else "applied")
    assert "stands for much else" in (edit.reason if reject else edit.notes[0])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_disturbance_is_what_a_write_changes_on_the_text_of_the_second_moment(family, tmp_path):
    language_model = tiny_language_model(family)
    originals = {name: tensor.clone() for name, tensor in language_model.model.state_dict().items()}
    paths, _ = statistics_of(language_model, tmp_path)
    options = {**SHARED, **EMMET, "statistics": paths, "sequential_edit": True}
    layers = run_edits(language_model, tmp_path / "run", REQUESTS[:1], **options).layers
    ratios = []
    for number, weight, moment in zip(layers.numbers, layers.weights, layers.moments, strict=True):
        keys = torch.randn(
            200, weight.site.d_key, dtype=torch.float64, generator=torch.Generator().manual_seed(number)
        )  # those of the second moment
        original = weight.site.matrix(originals[weight.site.name]).double()
        change = weight.site.matrix(weight.site.weight.detach()).double() - original
        ratios.append(float(((keys @ change.T) ** 2).sum() / ((keys @ original.T) ** 2).sum()))
        assert moment.info.layer == number
    assert layers.disturbance(layers.written[0]) == pytest.approx(max(ratios) ** 0.5, rel=1e-4)


def test_an_edit_that_disturbs_ordinary_text_is_rejected_and_the_others_of_its_batch_stay(tmp_path):
    language_model = tiny_language_model("llama")
    paths, _ = statistics_of(language_model, tmp_path)
    options = {**SHARED, **EMMET, "statistics": paths, "sequential_edit": True}
    free = run_edits(language_model, tmp_path / "a", REQUESTS, batch_size=3, **options)
    found = {edit.name: free.layers.disturbance(edit.written) for edit in free.edits}
    worst = max(found, key=found.get)
    bound = (found[worst] + sorted(found.values())[-2]) / 2
    callbacks = lenient_callbacks()
    callbacks[2] = Verification(least_probability=0.0, largest_disturbance=bound)
    session = run_edits(
        tiny_language_model("llama"), tmp_path / "b", REQUESTS, batch_size=3, callbacks=callbacks, **options
    )
    assert session.layers.names == [name for name in found if name != worst]
    (reason,) = [edit.reason for edit in session.edits if edit.name == worst]
    assert f"more than {bound:g}: its key stands for much else" in reason


def test_without_statistics_nothing_is_known_of_disturbance_and_no_bound_can_be_kept(tmp_path):
    callbacks = lenient_callbacks()
    callbacks[2] = Verification(least_probability=0.0, largest_disturbance=1e-9)
    options = {**SHARED, "layers": [1], "preset": "easyedit", "mom2_adjustment": None, "sequential_edit": True}
    layers = run_edits(tiny_language_model(), tmp_path / "a", REQUESTS[:1], **options).layers
    assert layers.disturbance(layers.written[0]) is None
    with pytest.raises(OptionError, match="largest_disturbance: without the second moment"):
        run_edits(tiny_language_model(), tmp_path / "b", REQUESTS[:1], callbacks=callbacks, **options)


def test_a_bound_on_disturbance_is_positive():
    with pytest.raises(ValueError, match="largest_disturbance: expected a positive number, got 0"):
        Verification(largest_disturbance=0.0)
