from types import SimpleNamespace

import pytest

from rome_pl.editing.edit import Edit
from rome_pl.reports.run_results import run_results
from rome_pl.reports.scalars import charts, edit_scalars, final_scalars, run_settings
from tests.made_run import made_request, made_session


def made(**options):
    return made_session([made_request(index) for index in range(4)], **options)


def test_an_edit_s_scalars_are_those_of_its_last_evaluation():
    edit = made().edits[0]
    assert edit_scalars(edit) == {
        "edit/probability_before": 0.05,
        "edit/probability_after": 0.9,
        "edit/loss": edit.steps[-1].loss,
        "edit/nll": edit.steps[-1].nll,
        "edit/kl": edit.steps[-1].kl,
        "edit/steps": 3,
        "edit/update_norm": edit.written.norm,
        **{f"edit/seconds_{stage}": took for stage, took in edit.seconds.items()},
    }


def test_what_an_edit_does_not_have_is_no_scalar():
    assert edit_scalars(Edit(index=0, request=made_request(0))) == {}


def test_the_end_of_a_stream_is_the_final_model():
    scalars = final_scalars(run_results(made(lost=(1,)), []))
    assert list(scalars)[:4] == ["final/ES", "final/PS", "final/NS", "final/S"]
    assert scalars["final/ES"] == 0.75
    assert (scalars["perplexity/base"], scalars["perplexity/final"], scalars["final/divergence"]) == (20, 25, 0.125)


def test_single_edits_end_with_what_each_did():
    scalars = final_scalars(run_results(made(sequential=False), []))
    assert scalars["immediate/ES"] == 1
    assert scalars["perplexity/base"] == 20
    assert not any(name.startswith("final/") for name in scalars)
    assert None not in scalars.values()


@pytest.mark.parametrize(("accumulated", "retention", "number"), [(False, False, 2), (True, False, 3), (True, True, 4)])
def test_charts_are_of_what_the_run_logs(accumulated, retention, number):
    shown = charts(accumulated, retention)
    assert len(shown) == number
    assert ("What they add up to" in shown) == accumulated
    assert ("What earlier edits are worth" in shown) == retention


def test_settings_leave_out_what_is_not_set():
    hparams = {"preset": "rome", "corpus": None, "_class_path": "x", "seed": 0}
    settings = run_settings(hparams, made(), SimpleNamespace(path="facts.json"))
    assert settings == {"preset": "rome", "seed": 0, "layers": "1", "data": "facts.json", "requests": 4}
    assert run_settings(hparams, made(), None)["data"] == ""
