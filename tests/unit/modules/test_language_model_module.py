"""What the four modules do alike: loading a model, on one process or on several."""

import sys
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer

from rome_pl import CovarianceModule, EvaluationModule, RomeModule, TraceModule
from rome_pl.errors import OptionError
from rome_pl.modules.trainer_checks import check_precision
from tests.tiny import tiny_language_model

MODULES = [RomeModule, EvaluationModule, CovarianceModule, TraceModule]


@pytest.fixture
def calls(monkeypatch):
    """What happens, in order; loading a model is noted, and gives a small one."""
    found = []

    def load(*_, **__):
        found.append("load")
        return tiny_language_model()

    for name, module in list(sys.modules.items()):  # every module of the package that has imported the loader
        if name.startswith("rome_pl.modules.") and "load_language_model" in vars(module):
            monkeypatch.setattr(module, "load_language_model", load)
    return found


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(("first", "order"), [(True, ["load", "barrier"]), (False, ["barrier", "load"])])
def test_the_first_process_loads_before_the_others(kind, first, order, calls):
    module = kind()
    module._trainer = SimpleNamespace(
        is_global_zero=first, strategy=SimpleNamespace(barrier=lambda: calls.append("barrier"))
    )
    module.configure_model()
    assert calls == order


@pytest.mark.parametrize("kind", MODULES)
def test_a_model_is_loaded_once(kind, calls):
    module = kind()
    module.load()
    module.load()
    assert calls == ["load"]
    assert module.model is module.language_model.model


@pytest.mark.parametrize("kind", MODULES)
def test_a_given_model_is_not_loaded(kind, calls):
    module = kind.from_language_model(tiny_language_model())
    module.load()
    assert isinstance(module, kind)
    assert calls == []


def test_only_edits_may_run_under_autocast():
    trainer = Trainer(accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False)
    check_precision(trainer, autocast=True)
    with pytest.raises(OptionError, match="precision is bf16-mixed: use '32-true', and set the weights' precision"):
        check_precision(trainer)
