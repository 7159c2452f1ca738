import pytest
import torch
import yaml

from rome_pl.metrics import ProbeScores
from rome_pl.tracing.indirect_effects import TracedFact, mean_effects, peak, token_roles, total_effects, trace_table
from rome_pl.tracing.layer_choice import (
    LayerScores,
    Trial,
    agreement,
    edit_config,
    recommend,
    score_layer,
    trial_content,
    trial_table,
)
from rome_pl.tracing.trace import Trace


def entry(value):
    return {"value": value, "low": value, "high": value, "n": 0 if value is None else 4}


def layer(number, score, perturbation=0.1):
    names = ("ES", "PS", "NS", "S")
    return LayerScores(number, {name: entry(score) for name in names}, perturbation, 4, 1.0)


def probes(new, true, paraphrases=(), neighbours=()):
    return ProbeScores((new, true), tuple(paraphrases), tuple(neighbours))


def test_s_is_the_harmonic_mean_of_es_ps_and_ns():
    measured = {
        "a": probes(-1.0, -2.0, [(-1.0, -2.0), (-2.0, -1.0)], [(-2.0, -1.0)]),
        "b": probes(-1.0, -2.0, [(-1.0, -2.0)], [(-1.0, -2.0), (-2.0, -1.0)]),
    }
    scores, rates = score_layer(measured, measured)
    assert rates == ("ES", "PS", "NS")
    assert (scores["ES"]["value"], scores["PS"]["value"], scores["NS"]["value"]) == (1.0, 0.75, 0.75)
    assert scores["S"]["value"] == pytest.approx(3 / (1 + 2 / 0.75))
    assert scores["S"]["low"] <= scores["S"]["value"] <= scores["S"]["high"]


def test_s_is_of_what_there_is():
    scores, rates = score_layer({"a": probes(-1.0, -2.0), "b": probes(-2.0, -1.0)}, {})
    assert rates == ("ES",)
    assert scores["S"]["value"] == 0.5
    assert scores["PS"]["value"] is None


def test_facts_without_any_probe_have_no_score():
    scores, rates = score_layer({"a": ProbeScores((-1.0, None))}, {})
    assert rates == ()
    assert scores["S"]["value"] is None


def test_the_best_s_is_recommended_then_the_smaller_perturbation_then_the_earlier_layer():
    assert recommend([layer(0, 0.8), layer(3, 0.9), layer(6, 0.7)]).layer == 3
    assert recommend([layer(0, 0.9, 0.3), layer(3, 0.9, 0.2), layer(6, 0.9, None)]).layer == 3
    assert recommend([layer(0, 0.9), layer(3, 0.9)]).layer == 0
    assert recommend([layer(0, None), layer(3, 0.0)]).layer == 3


def trial(*layers):
    return Trial(layers, {name: entry(0.2) for name in ("ES", "PS", "NS", "S")}, 4, ("ES", "PS", "NS"))


def test_tracing_agrees_if_the_layer_tried_next_to_its_peak_is_the_best():
    effects = [entry(value) for value in (0.1, 0.2, 0.5, 0.3, 0.2, 0.1, 0.0)]
    tried = trial(layer(0, 0.9), layer(3, 0.5), layer(6, 0.6))
    found = agreement(tried, effects, 2)
    assert found["nearest"] == 3
    assert not found["agrees"]
    assert found["nearest_S"] == 0.5
    assert found["rank_correlation"] == pytest.approx(-0.5)  # ranks 2, 3, 1 of the effects and 3, 1, 2 of S
    same_order = trial(layer(0, 0.1), layer(3, 0.9), layer(2, 0.95))
    assert agreement(same_order, effects, 2)["rank_correlation"] == pytest.approx(1.0, abs=1e-12)
    assert agreement(trial(*same_order.layers[:2]), effects, 2)["rank_correlation"] is None
    assert agreement(tried, effects, 1)["agrees"]
    assert agreement(tried, effects, None) is None
    same = trial(layer(0, 0.9), layer(3, 0.9), layer(6, 0.9))
    assert agreement(same, effects, 2)["rank_correlation"] is None


def test_the_config_holds_the_options_and_the_evidence():
    content = {"trial": trial_content(trial(layer(0, 0.5), layer(3, 0.75)))}
    text = edit_config(content, {"pretrained": "gpt2", "preset": "r_rome"}, "rome-pl edit --config x")
    assert yaml.safe_load(text)["model"] == {"pretrained": "gpt2", "preset": "r_rome", "layers": [3]}
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert "# Run:   rome-pl edit --config x" in header
    assert "# | **3** | 75.0 [75, 75] | 75.0 [75, 75] | 75.0 [75, 75] | 75.0 [75, 75] | 0.100 | 4 |" in header
    assert "| 0 | 50.0 [50, 50]" in trial_table(content)


def test_every_token_has_the_role_that_it_plays():
    assert token_roles(7, (1, 4)) == (
        None, "subject_first", "subject_middle", "subject_last", "first_after", "further", "last",
    )  # fmt: skip
    assert token_roles(2, (0, 1)) == ("subject_last", "last")
    assert token_roles(3, (1, 3)) == (None, "subject_first", "subject_last")


def fact(name, roles, hidden, clean=0.9, corrupted=0.1):
    restored = {"hidden": torch.tensor(hidden, dtype=torch.float64)}
    return TracedFact(name, tuple("x" * len(roles)), tuple(roles), Trace(clean, corrupted, restored))


def test_effects_are_averaged_within_a_fact_and_then_over_facts():
    facts = [
        fact("a", ["subject_middle", "subject_middle", "subject_last"], [[0.2], [0.4], [0.9]]),
        fact("b", ["subject_middle", "subject_last", "last"], [[0.7], [0.1], [0.5]], corrupted=0.2),
    ]
    effects = mean_effects(facts)["hidden"]
    assert effects["subject_middle"][0]["value"] == pytest.approx(((0.1 + 0.3) / 2 + 0.5) / 2)
    assert effects["subject_last"][0]["value"] == pytest.approx((0.8 - 0.1) / 2)
    assert effects["last"][0]["n"] == 1
    assert effects["first_after"][0] == {"value": None, "low": None, "high": None, "n": 0}
    totals = total_effects(facts)
    assert totals["total_effect"]["value"] == pytest.approx(0.75)
    assert totals["corrupted"]["value"] == pytest.approx(0.15)
    table = trace_table({"effects": {"hidden": effects}, "totals": totals})
    assert "| hidden | last subject token | 0 | 35.0 [" in table
    assert "Total effect 75.0" in table


def test_the_peak_is_the_earliest_of_the_strongest_layers():
    mlp = {"subject_last": [entry(0.1), entry(0.4), entry(0.4)]}
    assert peak({"mlp": mlp}) == 1
    assert peak({"hidden": mlp}) is None
    assert peak({"mlp": {"subject_last": [entry(None)]}}) is None
