"""Rules for each setting of EasyEdit, kmeng01/rome and related projects: converted, not needed, or different.

The keys are those of the files below ``hparams/`` of zjunlp/EasyEdit (ROME, R-ROME, MEMIT, EMMET, AlphaEdit),
kmeng01/rome, kmeng01/memit, scalable-model-editing/unified-model-editing and jianghoucheng/AlphaEdit, and the fields of
their parameter classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from rome_pl.encoding.text_encoder import FactToken
from rome_pl.files.whole_files import local_path
from rome_pl.interop.settings_file import Settings
from rome_pl.write.presets import PRESETS

__all__ = ["IMPLIED", "REQUIRED", "RULES", "Fate"]

REQUIRED = ("layers", "v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor", "mom2_adjustment")
"""Required keys of a settings file."""


@dataclass(frozen=True)
class Fate:
    """The conversion of a key.

    Args:
        kind: ``converted``, ``not needed``, or ``differs``: then the result is or may be different.
        remark: The reason.
        options: The options to set, by dotted name.
    """

    kind: Literal["converted", "not needed", "differs"]
    remark: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


Rule = Callable[[Settings, str], Fate]

ADDING_UP = {"model.sequential_edit": True, "model.keep_subject_facts": False}
"""Options for edits that accumulate as theirs: facts about one subject do not affect each other's search."""


def _number(remark: str = "", shared: str = "") -> Rule:
    """Convert a number of the same name. ``shared`` is the remark for methods that search for a hidden state."""

    def rule(settings: Settings, key: str) -> Fate:
        options = {f"model.{key}": settings.number(key)}
        if settings.shared and shared:
            return Fate("differs", shared, options)
        return Fate("converted", remark, options)

    return rule


def _not_needed(remark: str) -> Rule:
    return lambda settings, key: Fate("not needed", remark)


def _off(on: str, off: str = "off there too") -> Rule:
    """A switch that is off in nearly every file and has no counterpart here."""

    def rule(settings: Settings, key: str) -> Fate:
        return Fate("differs", on) if settings.flag(key) else Fate("not needed", off)

    return rule


def _alg_name(settings: Settings, key: str) -> Fate:
    preset = {"ROME": "rome", "R-ROME": "r_rome"}.get(settings.method, settings.method.lower())
    remark = ""
    if settings.method == "ROME" and not settings.statistics:
        preset, remark = "easyedit", "ROME's keys with the identity for the second moment: see mom2_adjustment"
    if settings.method == "R-ROME":
        if settings.flag("original_implementation"):
            preset = "rome"
        elif settings.flag("enable_prompt_keys"):
            preset = "p_rome"
    return Fate("converted", remark, {"model.preset": preset})


def _r_rome_keys(settings: Settings, key: str) -> Fate:
    prompt, mean = settings.flag("enable_prompt_keys"), settings.flag("enable_random_prefix_keys", default=True)
    if not settings.flag("original_implementation") and prompt == mean:
        raise settings.error(key, "EasyEdit asks for one of enable_prompt_keys and enable_random_prefix_keys")
    return Fate("converted", "the preset says at which keys", dict(_alg_name(settings, key).options))


def _model_name(settings: Settings, key: str) -> Fate:
    name = settings.text(key)
    options = {"model.pretrained": name}
    local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if local and not local_path(name).is_dir():
        return Fate(
            "differs",
            "no such folder here: set model.pretrained to your folder or to the model's name on the hub",
            options,
        )
    return Fate("converted", "relative to the folder that you run in" if local else "", options)


def _layers(settings: Settings, key: str) -> Fate:
    layers = settings.numbers(key)
    options = {"model.layers": layers}
    if len(layers) > 1 and not settings.shared:
        return Fate(
            "differs",
            "there each layer gets a value of its own, one after the other; here one offset is shared among them",
            options,
        )
    return Fate("converted", "numbered from 0 in both", options)


def _fact_token(settings: Settings, key: str) -> Fate:
    known = get_args(FactToken)
    if settings.text(key) not in known:
        raise settings.error(key, f"expected one of {', '.join(known)}, got {settings.text(key)!r}")
    remark = "found from character offsets, so that a subject may occur twice and padding does not matter"
    return Fate("converted", remark, {"model.fact_token": settings.text(key)})


def _steps(settings: Settings, key: str) -> Fate:
    return Fate("converted", "counts evaluations of the loss in both", {"model.v_num_grad_steps": settings.whole(key)})


def _published_search(settings: Settings, key: str) -> Fate:
    options = {
        "model.optimizer": "torch.optim.Adam",
        f"model.{key}": settings.number(key),
        "model.stop_probability": 1.0,
        "model.contexts_per_step": None,
    }
    return Fate("converted", "Adam over all contexts at every step, in both", options)


def _loss_layer(settings: Settings, key: str) -> Fate:
    layer = settings.whole(key)
    return Fate("not needed", f"the loss is read at the model's last layer: the same, if {layer} is its number")


def _mom2_adjustment(settings: Settings, key: str) -> Fate:
    wanted = settings.flag(key)
    if settings.shared:
        return Fate("not needed", "the statistics are used in any case, there and here")
    if wanted:
        return Fate("converted", "the preset uses the second moment")
    options = {} if settings.method == "ROME" else {"model.mom2_adjustment": False}
    remark = (
        "the identity stands for the second moment: no statistics, but neighbouring facts suffer. For the published "
        f"method set model.preset to {'rome' if settings.method == 'ROME' else 'r_rome'} and mom2_adjustment to true"
    )
    return Fate("converted", remark, options)


def _update_weight(settings: Settings, key: str) -> Fate:
    if settings.method == "AlphaEdit":
        return Fate("not needed", "AlphaEdit does not use it, there or here")
    return _number()(settings, key)


def _contexts(settings: Settings, key: str) -> Fate:
    remark = "the model writes them in both, but not the same ones: other openings, another sampler, seeded"
    return Fate("differs", remark, {f"model.{key}": settings.pairs(key)})


def _rewrite_module(settings: Settings, key: str) -> Fate:
    name = settings.text(key).rpartition(".")[2]
    if name not in ("down_proj", "c_proj", "fc_out", "dense_4h_to_h", "fc2", "w2"):
        return Fate("differs", f"here the MLP's second projection is edited, found by its shape; is that {name}?")
    return Fate("not needed", "the MLP's second projection is found by looking at the modules")


def _dataset(settings: Settings, key: str) -> Fate:
    if not settings.statistics:
        return Fate("not needed", "no statistics are used (mom2_adjustment: false)")
    remark = f"an excerpt of Wikipedia that loads in seconds, not all of {settings.text(key)}; any text file will do"
    return Fate("differs", remark, {"model.corpus": "NeelNanda/wiki-10k"})


def _samples(settings: Settings, key: str) -> Fate:
    count = settings.whole(key)
    if not settings.statistics:
        return Fate("not needed", "no statistics are used (mom2_adjustment: false)")
    return Fate(
        "differs",
        f"there {count} texts of the data set, here key vectors (tokens): left at 30 for each of a key's dimensions",
    )


def _stats_dir(settings: Settings, key: str) -> Fate:
    if not settings.statistics:
        return Fate("not needed", "no statistics are used (mom2_adjustment: false)")
    return Fate(
        "not needed",
        "computed once and kept in the cache; 'rome-pl covariance --import_npz' takes over a .npz of theirs",
    )


def _device(settings: Settings, key: str) -> Fate:
    if settings.values[key] == "cpu":
        return Fate("converted", "", {"trainer.accelerator": "cpu"})
    return Fate("not needed", "a GPU is used where there is one; --trainer.devices [N] chooses it")


def _fp16(settings: Settings, key: str) -> Fate:
    if settings.flag(key):
        remark = "weights in float16 as there, but keys are solved in float64; part of each change is lost to rounding"
        return Fate("differs", remark, {"model.dtype": "float16"})
    return Fate("converted", "as EasyEdit loads it; 'auto' takes the checkpoint's own", {"model.dtype": "float32"})


def _batch_size(settings: Settings, key: str) -> Fate:
    size = settings.whole(key)
    if size == 1:
        return Fate("not needed", "one edit at a time is one edit a solve")
    if not settings.shared:
        raise settings.error(key, f"{settings.method} edits one fact at a time: expected 1, got {size}")
    remark = "a joint solve a batch, as there; here the batches of a run add up"
    return Fate("differs", remark, {"data.batch_size": size} | ADDING_UP)


def _sequential(settings: Settings, key: str) -> Fate:
    wanted = settings.flag(key) != (key == "keep_original_weight")
    remark = "" if key == "sequential_edit" else "the original weights are kept where edits do not accumulate"
    return Fate("converted", remark, ADDING_UP if wanted else {"model.sequential_edit": False})


def _emmet_lambda(settings: Settings, key: str) -> Fate:
    value, ridge = settings.number(key), PRESETS["emmet"].ridge
    if settings.method != "EMMET" or value == ridge:
        return Fate("not needed", f"the preset emmet has {ridge}" if settings.method == "EMMET" else "EMMET's alone")
    return Fate("differs", f"the preset emmet has {ridge}, and no option changes it")


def _norm_lambda(settings: Settings, key: str) -> Fate:
    if settings.number(key) == 0:
        return Fate("not needed", "off there too")
    return Fate("differs", "nothing is added to the second moment here but a ridge of 1e-6 of its mean diagonal")


_MODULE = _not_needed("modules are found by looking at them, not by their names")
_HIDDEN = "counted in norms of the hidden state there, of the MLP's output here, mostly smaller ones: try a larger one"

RULES: Mapping[str, Rule] = {
    "alg_name": _alg_name,
    "model_name": _model_name,
    "stats_dir": _stats_dir,
    "P_loc": _not_needed("the projection is computed from the second moment"),
    "device": _device,
    "model_parallel": _off("the model has to fit one device here", "the model is on one device"),
    "fp16": _fp16,
    "layers": _layers,
    "layer_selection": _not_needed("their code does not read it: all layers are edited"),
    "fact_token": _fact_token,
    "v_num_grad_steps": _steps,
    "v_lr": _published_search,
    "v_loss_layer": _loss_layer,
    "v_weight_decay": _number(shared=_HIDDEN.replace("try a larger one", "it weighs more")),
    "clamp_norm_factor": _number(shared=_HIDDEN),
    "kl_factor": _number("taken at the subject's last token, as there: kl_position"),
    "mom2_adjustment": _mom2_adjustment,
    "mom2_update_weight": _update_weight,
    "context_template_length_params": _contexts,
    "rewrite_module_tmp": _rewrite_module,
    "layer_module_tmp": _MODULE,
    "mlp_module_tmp": _MODULE,
    "attn_module_tmp": _MODULE,
    "ln_f_module": _MODULE,
    "lm_head_module": _MODULE,
    "mom2_dataset": _dataset,
    "mom2_n_samples": _samples,
    "mom2_dtype": _not_needed("sums and solves are float64"),
    "nullspace_threshold": _number("compared with eigenvalues of the second moment in both"),
    "L2": _number(),
    "enable_prompt_keys": _r_rome_keys,
    "enable_random_prefix_keys": _r_rome_keys,
    "original_implementation": _r_rome_keys,
    "update_norm_lambda": _norm_lambda,
    "emmet_lambda": _emmet_lambda,
    "calculate_objective_value": _off("not printed here; there it also computes statistics anew, from fewer texts"),
    "bias_update": _off("the bias stays as it is here"),
    "dynamic": _off("the second moment is not computed anew for each edit here"),
    "dynamic_multiplier": _not_needed("of use with 'dynamic' alone"),
    "batch_size": _batch_size,
    "max_length": _not_needed("texts are measured whole; one that does not fit the model is refused"),
    "evaluation_type": _not_needed("answers are measured teacher-forced and as greedy generation gives them, always"),
    "keep_original_weight": _sequential,
    "sequential_edit": _sequential,
}
"""The rule of each key."""


def _implied_method(settings: Settings, key: str) -> Fate:
    told = f"{settings.method}, told from the file's folder or keys"
    fate = _alg_name(settings, key)
    return Fate(fate.kind, f"{told}; {fate.remark}".removesuffix("; "), fate.options)


def _implied_model(settings: Settings, key: str) -> Fate:
    name = settings.path.stem.replace("_", "/", 1)
    return Fate("differs", "guessed from the file's name: check it", {"model.pretrained": name})


IMPLIED: Mapping[str, Rule] = {
    "alg_name": _implied_method,
    "model_name": _implied_model,
    "fp16": lambda settings, key: Fate("converted", "loaded so there", {"model.dtype": "float32"}),
    "kl_position": lambda settings, key: Fate("converted", "as in their code", {"model.kl_position": "subject"}),
    "context_template_length_params": lambda settings, key: (
        Fate("differs", "fixed in their code: five contexts of ten tokens", {f"model.{key}": [[10, 5]]})
        if settings.shared
        else Fate("not needed", "the default: ten contexts of five tokens, ten of ten")
    ),
}
"""The meaning of a missing key."""
