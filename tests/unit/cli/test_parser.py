"""The nearest known name."""

import pytest

from rome_pl.cli.app import main
from rome_pl.utils.did_you_mean import did_you_mean


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("lyers", ["layers", "preset"], "layers"),
        ("L2", ["l2", "L3"], "l2"),
        ("METHOD", ["method"], "method"),
        ("data.v_num_grad_step", ["model.v_num_grad_steps", "data.path"], "model.v_num_grad_steps"),
        ("zzz", ["layers"], None),
        ("layers", [], None),
    ],
)
def test_near_names(name, known, found):
    assert did_you_mean(name, known) == (f"; did you mean '{found}'?" if found else "")


def error_of(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["edit", "--config", "quickstart", "--model.lyers", "[3]"], "--model.layers"),
        (["edit", "--config", "quickstart", "--model.lyers=[3]"], "--model.layers"),
        (["edit", "--lyers", "[3]"], "--model.layers"),
        (["edit", "--trainer.max_epoch_s", "3"], "--trainer.max_epochs"),
        (["evaluate", "--model.ledgr", "x"], "--model.ledger"),
        (["covariance", "--model.lyers", "[3]"], "--model.layers"),
        (["covariance", "--model.pretraind", "x"], "--model.pretrained"),
        (["show", "--ledgr", "x"], "--ledger"),
        (["convert", "a.yaml", "--ouput", "b.yaml"], "--output"),
    ],
)
def test_misspelt_options(arguments, expected, capsys):
    assert error_of(arguments, capsys).endswith(f"; did you mean '{expected}'?")


@pytest.mark.parametrize(
    ("verb", "text", "expected"),
    [
        ("edit", "model:\n  lyers: [3]\n", "model.layers"),
        ("edit", "modle:\n  layers: [3]\n", "model.layers"),
        ("edit", "data:\n  limt: 3\n", "data.limit"),
        ("evaluate", "model:\n  pretraind: x\n", "model.pretrained"),
        ("covariance", "model:\n  block_lenght: 3\n", "model.block_length"),
    ],
)
def test_misspelt_keys_of_a_file(verb, text, expected, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    for more in ([], ["--print_config"]):  # of which the parser speaks with other words
        error = error_of([verb, "--config", str(tmp_path / "config.yaml"), *more], capsys)
        assert error.endswith(f"; did you mean '{expected}'?")


def test_an_option_of_another_verb_is_not_suggested(capsys):
    # block_length is covariance's alone.
    assert "block_length" not in error_of(["edit", "--model.block_lenght", "3"], capsys)


def test_other_errors_stay_as_they_are(capsys):
    assert "did you mean" not in error_of(["edit", "--config", "quickstart", "--model.v_lr", "fast"], capsys)
