"""Which of the places that a run notes holds its model."""

from types import SimpleNamespace

import pytest

from rome_pl.errors import SourceError
from rome_pl.ledger.model_places import find_model

ABOUT = {"source": "model", "fingerprint": "weights", "config": "config", "tokenizer": "rules", "from_run": "../near"}


def model(*prints):
    return SimpleNamespace(
        source="model", **dict(zip(("fingerprint", "config_fingerprint", "tokenizer_fingerprint"), prints, strict=True))
    )


def found(tmp_path, near, far, about=ABOUT):
    for name in ("run", "near", "far"):
        (tmp_path / name).mkdir(parents=True)
    at = {str(tmp_path / "near"): near, str(tmp_path / "far"): far}

    def load(place):
        if place not in at:
            raise SourceError("nothing there")
        return at[place]

    return find_model(about | {"folder": str(tmp_path / "far")}, tmp_path / "run", load)


@pytest.mark.parametrize("other", [("weights", "theirs", "rules"), ("weights", "config", "theirs")])
def test_the_same_weights_under_other_rules_are_taken_only_if_nothing_else_is_found(other, tmp_path):
    right, alike = model("weights", "config", "rules"), model(*other)
    assert found(tmp_path / "a", alike, right) is right
    assert found(tmp_path / "b", right, alike) is right
    assert found(tmp_path / "c", alike, model("others", "config", "rules")) is alike


def test_of_an_earlier_version_s_run_only_the_weights_are_known(tmp_path):
    first = model("weights", "theirs", "theirs")
    about = {name: value for name, value in ABOUT.items() if name != "config"} | {"tokenizer": "vocabulary"}
    assert found(tmp_path, first, model("weights", "config", "rules"), about) is first
