"""Writes the tables of ``docs/decoders.md`` from the verdicts that the tests pin.

Run it after verdicts have changed: ``python docs/tabulate_decoders.py``.
"""

import json
from collections import Counter
from pathlib import Path

__all__ = ["page", "tables"]

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "decoders.md"
VERDICTS = ROOT / "tests" / "decoders.json"
OPENING, END = "<!-- written by docs/tabulate_decoders.py -->\n", "<!-- end -->\n"

EDITED = {
    "its dense layers": "in its dense layers",
    "its experts": "a mixture of experts",
    "its layers with an MLP": "in its layers with an MLP",
    "its text model alone": "give its text model alone",
    "whole rows": "slower: every step runs whole rows",
}
"""What is special about a type that is edited."""

REFUSED = {
    "experts": ("its experts are of another form", False),
    "encoder-decoder": ("it is an encoder-decoder", False),
    "both directions": ("it reads in both directions", False),
    "no length": ("it reads in both directions, and its config gives no length", False),
    "no MLP": ("its layers have no MLP", False),
    "no row for each token": ("it writes blocks of tokens, not one after the other", False),
    "shared MLP": ("its layers share one MLP", True),
    "needs an image": ("it reads no text without an image", True),
    "rows in a batch": ("it gives other results for rows in a batch", False),
    "no head": ("it names no head", True),
    "no list of layers": ("its config does not give the length of its list of layers", True),
    "layers of another form": ("its layers do not return hidden states alone", True),
}
"""Why a type is refused, and whether it is a dense decoder all the same."""

NOT_BUILT = {
    "timm": "it needs the package timm",
    "its default config is not valid": "a small config of its class is not valid",
    "its auto class does not take its config": "the auto class does not take its config",
}
"""Why no small model of a type can be built."""


def tables() -> str:
    """The totals and the table as Markdown."""
    pinned = json.loads(VERDICTS.read_text(encoding="utf-8"))
    types: dict[str, list[str]] = pinned["types"]
    kinds = Counter(kind for kind, *_ in types.values())
    edited = kinds["edited"]
    refused = Counter(notes[0] for kind, *notes in types.values() if kind == "refused")
    missing = Counter(notes[0] for kind, *notes in types.values() if kind == "not built")
    partly = sum("its dense layers" in notes or "its experts" in notes for notes in types.values())
    right = edited - partly
    dense = right + sum(count for reason, count in refused.items() if REFUSED[reason][1])
    counts = [
        ("edited", "", edited),
        *(("refused", REFUSED[reason][0], count) for reason, count in refused.most_common()),
        *(("cannot be built small", NOT_BUILT[reason], count) for reason, count in missing.most_common()),
    ]
    lines = [
        f"With transformers {pinned['transformers']}, of {len(types)} types {edited} are edited.",
        f"{kinds['refused']} are refused. {kinds['not built']} cannot be built small.",
        "",
        "| verdict | because | types |",
        "|---|---|---|",
        *(f"| {verdict} | {reason} | {count} |" for verdict, reason, count in counts),
        "",
        f"Of {dense} dense decoders, {right} are edited right: {right / dense:.1%}.",
        "A dense decoder is causal and has MLPs, not experts.",
        f"The other {partly} that are edited are mixtures of experts.",
        "",
        "| type | verdict | remark |",
        "|---|---|---|",
    ]
    for name, (kind, *notes) in sorted(types.items()):
        words = {"edited": EDITED, "not built": NOT_BUILT}.get(kind)
        remarks = [words[note] if words is not None else REFUSED[note][0] for note in notes]
        verdict = "cannot be built small" if kind == "not built" else kind
        lines.append(f"| `{name}` | {verdict} | {'; '.join(remarks)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with new tables."""
    text = TARGET.read_text(encoding="utf-8")
    before, _, rest = text.partition(OPENING)
    return f"{before}{OPENING}\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
