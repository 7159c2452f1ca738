"""The README.md of an export: what was edited, in which model, and how to load it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rome_pl.export.hub import fault_of
from rome_pl.utils.markdown import backslash_escaped, markdown_table

__all__ = ["model_card"]

_LOADING = {
    "hf": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
    "delta": """from pathlib import Path

from rome_pl import apply_delta, load_language_model, read_delta

language_model = load_language_model(BASE, dtype=DTYPE)
apply_delta(language_model, read_delta(Path("FOLDER")))""",
    "peft": """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(BASE, dtype=DTYPE)
model = PeftModel.from_pretrained(base, "FOLDER")""",
    "peft on a GGUF file": """from peft import PeftModel
from rome_pl import load_language_model

base = load_language_model(BASE, dtype=DTYPE).model
model = PeftModel.from_pretrained(base, "FOLDER")""",
}

_WHAT = {
    "hf": "the whole model with the edits in its weights",
    "delta": "the change that the edits make, alone; `rome-pl apply` puts it into the base model, bit for bit",
    "peft": "the change that the edits make, as a LoRA adapter for the peft library",
}


def model_card(about: Mapping[str, Any]) -> str:
    """The card of an export, in Markdown.

    Args:
        about: What ``rome_pl.json`` says of the export.
    """
    base, kind, edits = about["base"], about["format"], about["edits"]
    applied = sum(edit["status"] == "applied" for edit in edits)
    rows = {
        "base model": base["source"],
        "its fingerprint": base["fingerprint"],
        "dtype": base["dtype"],
        "preset": about["preset"],
        "layers": ", ".join(map(str, about["rewrite"]["layers"])),
        "edited weights": ", ".join(about["rewrite"]["weights"]),
        "edits in the weights": str(applied),
        "versions of the run": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
    }
    facts = [(name, str(value)) for name, value in rows.items() if value]
    loading = _LOADING["peft on a GGUF file" if kind == "peft" and base["source"].endswith(".gguf") else kind]
    for name, value in (("BASE", base["source"]), ("DTYPE", base["dtype"])):
        loading = loading.replace(name, repr(value))
    parts = [
        f"---\n{_metadata(kind, base['source'])}\n---",
        f"# {applied} edited {'fact' if applied == 1 else 'facts'} in {backslash_escaped(Path(base['source']).name)}",
        f"Made by rome_pl (rank-one model editing): {_WHAT[kind]}.",
        markdown_table(("", ""), facts),
    ]
    if "adapter" in about:
        parts.append(_adapter(about["adapter"]))
    parts += [
        "## Edits\n\nProbabilities are those of the new answer, before the edit and right after it; later edits may "
        "have changed them.",
        markdown_table(("record", "prompt", "true → new", "before", "after", "status"), map(_row, edits)),
        f"## Loading\n\n```python\n{loading}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(kind: str, source: str) -> str:
    """What the hub reads of a card, in YAML."""
    from huggingface_hub import ModelCardData

    return ModelCardData(
        base_model=source if _is_repository(source) else None,
        library_name={"hf": "transformers", "peft": "peft"}.get(kind),
        pipeline_tag="text-generation" if kind != "delta" else None,
        tags=["rome_pl", "model-editing", *["lora"] * (kind == "peft")],
    ).to_yaml()


def _is_repository(source: str) -> bool:
    """Whether a source is the name of a repository; the hub accepts no other as a base model."""
    return fault_of(source) is None and not Path(source).exists()


def _adapter(parts: Sequence[Mapping[str, Any]]) -> str:
    rows = [(part["weight"], str(part["rank"]), str(part["full_rank"]), f"{part['error']:.2e}") for part in parts]
    return (
        "## Adapter\n\nThe error is the Frobenius norm of what the adapter lacks of the change, relative to the "
        "change's; at full rank it is the rounding to float32.\n\n"
        + markdown_table(("weight", "rank", "rank of the change", "error"), rows)
    )


def _row(edit: Mapping[str, Any]) -> Sequence[str]:
    request, probability = edit["request"], edit["probability"]
    return (
        str(edit["case_id"]),
        request["prompt"],
        f"{request['target_true'] or '?'} → {request['target_new']}",
        _percent(probability["before"]),
        _percent(probability["after"]),
        edit["status"].replace("_", " "),
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
