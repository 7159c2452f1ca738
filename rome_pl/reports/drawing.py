"""How pictures are drawn: style, fonts, and the few forms that they share."""

import io
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any, TypeVar, cast

__all__ = [
    "BLUE",
    "COLOURS",
    "GREEN",
    "GREY",
    "ORANGE",
    "Figure",
    "count_edits",
    "fitting",
    "legend_below",
    "mark",
    "pixels",
    "png",
    "styled",
    "subplots",
]

Figure = Any
"""matplotlib's, which is imported when something is drawn: it takes half a second."""
Draw = TypeVar("Draw", bound=Callable[..., Any])

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#7B4FA3", GREY)
"""Okabe and Ito's colours, which colour-blind people can tell apart, and three more."""

WIDTH = 9.5
"""Of every figure, in inches."""

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "errorbar.capsize": 3,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.usetex": False,
}


def png(figure: Figure) -> bytes:
    """A picture as a PNG file's content."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context(_style()):  # axes make some of their labels as late as this
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def pixels(figure: Figure) -> Any:
    """A picture as TensorBoard takes it: an array ``[height, width, 3]`` of shares."""
    from matplotlib.image import imread

    return imread(io.BytesIO(png(figure)))[..., :3]


def styled(draw: Draw) -> Draw:
    """Draw in this module's style, whatever the user's own settings of matplotlib."""

    @wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        import matplotlib

        with matplotlib.rc_context(_style()):
            return draw(*args, **kwargs)

    return cast(Draw, drawn)


def mark(axes: Any, place: float, entry: Mapping[str, float], **style: Any) -> None:
    """A value with its interval."""
    arms = [[max(0.0, entry["value"] - entry["low"])], [max(0.0, entry["high"] - entry["value"])]]
    axes.errorbar(place, entry["value"], yerr=arms, **{"linestyle": "none", "ms": 5, "elinewidth": 1.2} | style)


def subplots(number: int, height: float = 3.3, left: float = 0.75, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure with panels side by side.

    Margins are in inches and fixed: letting matplotlib find them takes longer than all the rest.

    Args:
        number: How many panels.
        height: Height of the figure, without what a legend adds.
        left: What the first panel's labels need.
        options: Of ``Figure.subplots``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    panels = list(figure.subplots(1, number, squeeze=False, **options)[0])
    between = 0.25 if options.get("sharey") else 0.75
    panel = (WIDTH - left - 0.15 - between * (number - 1)) / number
    edges = {"left": left / WIDTH, "right": 1 - 0.15 / WIDTH, "bottom": 0.5 / height, "top": 1 - 0.3 / height}
    figure.subplots_adjust(**edges, wspace=between / panel)
    return figure, panels


def legend_below(figure: Figure, axes: Any, columns: int = 4) -> Figure:
    """The figure, higher by the legend of one of its panels, which stands below all."""
    handles, labels = axes.get_legend_handles_labels()
    height, added = figure.get_figheight(), 0.1 + 0.18 * -(-len(labels) // columns)
    figure.set_figheight(height + added)
    edges = {"bottom": (0.5 + added) / (height + added), "top": 1 - 0.3 / (height + added)}
    figure.subplots_adjust(**edges)
    figure.legend(handles, labels, loc="lower center", ncols=columns, borderaxespad=0.2)
    return figure


def count_edits(axes: Any, label: str, last: int | None = None) -> None:
    """Let the x axis of a panel count: whole numbers, up to ``last`` where what stands beyond it is no count."""
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(integer=True, nbins="auto")
    axes.xaxis.set_major_locator(locator)
    if last is not None:
        axes.set_xticks([tick for tick in locator.tick_values(0, last) if 0 <= tick <= last])
    axes.set_xlabel(label)


def fitting(text: str, length: int) -> str:
    """A text as a label: at most so long, without mathematics, and only with characters that some font has."""
    text = text if len(text) <= length else "…" + text[1 - length :]
    known = _fonts()[1]
    return "".join(char if ord(char) in known else "□" for char in text).replace("$", r"\$")


def _style() -> dict[str, Any]:
    return {**_STYLE, "font.family": list(_fonts()[0])}


@cache
def _fonts() -> tuple[tuple[str, ...], frozenset[int]]:
    """Families to draw with, and the characters that they have."""
    from matplotlib import font_manager

    installed = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    families = tuple(name for name in ("DejaVu Sans", *_WIDE_FONTS) if name in installed)
    characters = {code for name in families for code in font_manager.get_font(installed[name]).get_charmap()}
    return families, frozenset(characters)


_WIDE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS",
)  # fmt: skip
"""Fonts with the scripts that matplotlib's own lacks; those that are installed are used."""
