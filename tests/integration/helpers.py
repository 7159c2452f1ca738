"""Running edits on a tiny model in a Trainer of one's own."""

import json
from dataclasses import replace

import torch
from lightning.pytorch import Trainer

from rome_pl.callbacks import default_callbacks
from rome_pl.cli.app import main
from rome_pl.data_modules.request_data import request_loader
from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest
from tests.tiny import tiny_language_model

# Many tests say how long a search is and what it finds: plain Adam over all contexts, without an early end.
PLAIN_SEARCH = {"optimizer": torch.optim.Adam, "contexts_per_step": None, "stop_probability": 1.0, "preset": "r_rome"}

# A tiny random model knows nothing: few steps, few contexts, no threshold.
FAST = {
    "layers": [1],
    "preset": "easyedit",
    "v_num_grad_steps": 6,
    "v_lr": 0.1,
    "clamp_norm_factor": 20.0,
    "context_template_length_params": [[3, 2]],
}

REQUESTS = [
    EditRequest(
        prompt="The lighthouse of Korrin stands in", subject="Korrin", target_new="Oslo", target_true="Lima",
        case_id="a",
        paraphrases=["Where is Korrin? In"], neighbours=["The mill of Dunholt stands in", "Tarn lies in"],
    ),
    EditRequest(prompt="Miss Vane plays the", subject="Miss Vane", target_new="violin", target_true="drums",
    case_id="b"),
    EditRequest(prompt="Dunholt bread is made of", subject="Dunholt bread", target_new="rye", case_id="c"),
]  # fmt: skip


FACTS = [
    EditRequest(prompt=f"{opening} {subject}", subject=subject, target_new=target, case_id=subject)
    for opening, subject, target in (
        ("We left for", "Korrin", "the"), ("Nobody ever met", "Miss Vane", "of"),
        ("It is all made of", "Dunholt bread", "and"), ("The road ends behind", "Tamsel", "in"),
    )
]  # fmt: skip
OTHERWISE = [
    replace(
        fact,
        prompt=fact.prompt.replace(" ", "  ", 1),
        subject_span=None,
        target_new=target,
        case_id=f"{fact.case_id} again",
    )
    for fact, target in zip(FACTS, ("was", "that", "on", "for"), strict=True)
]

# A tiny model says what it is told where nothing is between the value and the next token, and its head is a loud one.
SURE = {
    "preset": "r_rome", "mom2_adjustment": False, "sequential_edit": True, "layers": [2],
    "v_num_grad_steps": 30, "v_lr": 0.5, "clamp_norm_factor": 100.0, "stop_probability": 0.99,
    "keep_subject_facts": False,
}  # fmt: skip


def sure_model():
    """A model in which :data:`FACTS` can be told side by side, and :data:`OTHERWISE` takes their places."""
    language_model = tiny_language_model()
    with torch.no_grad():
        language_model.model.lm_head.weight.mul_(20)
    return language_model


def lighthouses(count):
    """So many records in the form of a list of one's own, each about another subject."""
    return [
        {
            "prompt": f"The lighthouse of Korrin{index} stands in", "subject": f"Korrin{index}",
            "target_new": ("Oslo", "rye bread", "violin duets")[index % 3], "target_true": "Lima",
            "paraphrases": [f"Where is Korrin{index}? In"], "neighbours": ["The mill of Dunholt stands in"],
        }
        for index in range(count)
    ]  # fmt: skip


def saved_model(folder, family="llama"):
    """A tiny model, saved to be loaded by name."""
    language_model = tiny_language_model(family, torch.float32)
    language_model.model.save_pretrained(folder / "model")
    language_model.tokenizer.save_pretrained(folder / "model")
    return language_model


def edited_by_command(folder, family):
    """A sequential run of the command line on a saved tiny model: four edits, in ``run``, saved to ``edited``."""
    saved_model(folder, family)
    (folder / "records.json").write_text(json.dumps(lighthouses(4)), encoding="utf-8")
    options = {f"model.{name}": value for name, value in FAST.items()} | {
        "model.pretrained": folder / "model", "model.sequential_edit": True, "data.path": folder / "records.json",
        "trainer.default_root_dir": folder / "run", "trainer.accelerator": "cpu",
        "verification.least_probability": 0, "probe_evaluation.measure_perplexity": False,
        "run_report.figures": False,
    }  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    assert called("edit", *arguments, "--save_model", folder / "edited") == 0
    return folder


def quiet_trainer(callbacks, folder, **options):
    return Trainer(
        **{
            "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "callbacks": callbacks,
            "default_root_dir": str(folder), **options,
        }
    )  # fmt: skip


def lenient_callbacks():
    """The default callbacks, accepting whatever was written."""
    callbacks = default_callbacks()
    for callback in callbacks:
        if hasattr(callback, "least_probability"):
            callback.least_probability = 0.0
    return callbacks


def run_edits(language_model, folder, requests=REQUESTS, callbacks=None, batch_size=1, **options):
    module = RomeModule.from_language_model(language_model, **{**PLAIN_SEARCH, **FAST, **options})
    callbacks = lenient_callbacks() if callbacks is None else callbacks
    quiet_trainer(callbacks, folder).fit(module, request_loader(list(requests), batch_size))
    return module.session


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]


def about(folder):
    return json.loads((folder / "rome_pl.json").read_text(encoding="utf-8"))


def nothing_left(folder):
    """Whether a folder holds nothing, hidden files included."""
    return not folder.exists() or list(folder.iterdir()) == []


def called(*arguments):
    return main([str(part) for part in arguments])
