"""Draws the packages of rome_pl in the order in which they may import each other, from the imports themselves.

Run it after imports have changed: ``python docs/draw_packages.py`` writes ``docs/images/packages.svg``.
"""

import ast
from pathlib import Path

__all__ = ["drawing", "imports_between_packages", "in_order"]

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "images" / "packages.svg"
AT_THE_ROOT = ("callbacks", "data_modules")
"""Packages whose folders stand at the root of the repository."""

LAYERS = (
    ("tools", "#e9ecef", ("errors", "files", "utils")),
    ("the model", "#dbe9f6", ("requests", "encoding", "model", "forward")),
    ("an edit", "#d9f0e3", ("second_moments", "search", "write", "metrics", "ledger", "editing")),
    ("what is made of edits", "#fdf0d5", ("tracing", "export", "reports", "interop")),
    ("Lightning", "#e8def4", ("data_modules", "callbacks", "modules")),
    ("front doors", "#fbdfdf", ("cli", "editor")),
)
"""What packages have in common, with a colour each."""

ROW, BOX, LEFT, TOP = 34, 160, 24, 36
"""Height of a row, width of the names, and where the first one stands; in pixels."""


def imports_between_packages() -> dict[str, set[str]]:
    """For each package, or module of its own, the others that it imports."""
    found: dict[str, set[str]] = {}
    for folder in (ROOT / "rome_pl", *(ROOT / name for name in AT_THE_ROOT)):
        for path in sorted(folder.rglob("*.py")):  # does not follow links
            first = path.relative_to(folder).parts[0].removesuffix(".py")
            here = folder.name if folder.name in AT_THE_ROOT else first
            if here in ("__init__", "assets", *AT_THE_ROOT) and folder.name == "rome_pl":
                continue
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            there = {module.split(".")[1] for module in modules if module.startswith("rome_pl.")}
            found.setdefault(here, set()).update(there - {here})
    return found


def in_order(imports: dict[str, set[str]]) -> list[str]:
    """The packages, each after all that it imports; of those that may come next, the first by :data:`LAYERS`.

    Raises:
        SystemExit: If packages import each other in a circle, or one is missing from :data:`LAYERS`.
    """
    ranks = [name for _, _, names in LAYERS for name in names]
    if set(ranks) != imports.keys():
        raise SystemExit(f"LAYERS and the packages differ: {sorted(set(ranks) ^ imports.keys())}")
    order: list[str] = []
    while len(order) < len(ranks):
        free = [name for name in ranks if name not in order and imports[name] <= set(order)]
        if not free:
            raise SystemExit(f"a circle among {sorted(imports.keys() - set(order))}")
        order.append(free[0])
    return order


def drawing() -> str:
    """The picture as SVG: a staircase, with a dot where the package of a row imports that of a column."""
    imports = imports_between_packages()
    order = in_order(imports)
    colours = {name: colour for _, colour, names in LAYERS for name in names}
    centres = [LEFT + BOX + ROW * place + ROW // 2 for place in range(len(order))]
    heights = [TOP + ROW * place + ROW // 2 for place in range(len(order))]
    width, end = centres[-1] + 80, TOP + ROW * len(order)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {end + 54}" '
        'font-family="DejaVu Sans, Verdana, sans-serif" font-size="13" fill="#1f2933">',
        "<title>The packages of rome_pl, and what each of them imports</title>",
        f'<rect width="{width}" height="{end + 54}" rx="8" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22">A dot: the package of the row imports the package at the top of the column.</text>',
    ]
    for name, x, y in zip(order, centres, heights, strict=True):
        parts += [
            f'<rect x="{LEFT}" y="{y - 14}" width="{x - LEFT + 14}" height="28" rx="5" fill="{colours[name]}"/>',
            f'<text class="package" x="{LEFT + 10}" y="{y + 5}">{name}</text>',
        ]
    for x, y in zip(centres, heights, strict=True):
        parts.append(f'<path d="M{x} {y + 9}V{end}" stroke="#52606d" stroke-width="0.7" stroke-dasharray="1 4"/>')
    for name, x, y in zip(order, centres, heights, strict=True):
        parts += [
            f'<rect x="{x - 7}" y="{y - 7}" width="14" height="14" rx="3" fill="#52606d"/>',
            f'<text x="{x + 20}" y="{y + 4}" font-size="11" fill="#52606d">{name}</text>',
        ]
        parts += [
            f'<circle cx="{column}" cy="{y}" r="5" fill="#2f6fab"><title>{name} imports {there}</title></circle>'
            for column, there in zip(centres, order, strict=True)
            if there in imports[name]
        ]
    x = LEFT
    for title, colour, _ in LAYERS:
        parts += [
            f'<rect x="{x}" y="{end + 20}" width="16" height="16" rx="3" fill="{colour}" stroke="#9aa5b1"/>',
            f'<text x="{x + 23}" y="{end + 33}">{title}</text>',
        ]
        x += 50 + 8 * len(title)
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(drawing(), encoding="utf-8")
