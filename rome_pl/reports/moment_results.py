"""What a computation of second moments comes to: results, manifest, table and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from rome_pl.second_moments.moment_pass import Finished
from rome_pl.second_moments.second_moment import Spectrum
from rome_pl.second_moments.split_half import HalfAgreement
from rome_pl.utils.environment import library_versions

__all__ = ["agreement_figure", "moment_manifest", "moment_results", "moment_table", "spectrum_figure"]


def spectrum_figure(spectra: Mapping[int, Spectrum]) -> Any:
    """Eigenvalues of the second moment of each layer, falling, with the ridge that solves add."""
    figure, axes = _figure()
    for (layer, spectrum), colour in zip(spectra.items(), _colours(len(spectra)), strict=True):
        values = spectrum.eigenvalues
        axes.plot(range(1, len(values) + 1), values.clamp(min=1e-12), color=colour, label=f"layer {layer}")
        axes.axhline(spectrum.ridge, color=colour, linestyle=":", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue of C (dotted: ridge)")
    return _with_legend(figure, len(spectra))


def agreement_figure(history: Sequence[Sequence[HalfAgreement]]) -> Any:
    """How well two halves of the text agree on ``C⁻¹k``, against the number of keys."""
    figure, axes = _figure()
    layers = sorted({layer for checks in history for check in checks for layer in check.agreement})
    for layer, colour in zip(layers, _colours(len(layers)), strict=True):
        points = [
            (check.keys, check.agreement[layer]) for checks in history for check in checks if layer in check.agreement
        ]
        axes.plot(*zip(*points, strict=True), marker=".", color=colour, label=f"layer {layer}")
    axes.set(xscale="log", xlabel="keys", ylabel="mean cosine of C⁻¹k from two halves", ylim=(0, 1.01))
    return _with_legend(figure, len(layers))


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, whose global figures would have to be closed

    figure = Figure(figsize=(7, 4), layout="constrained")
    return figure, figure.subplots()


def _colours(number: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](index / max(1, number - 1)) for index in range(number)]


def _with_legend(figure: Any, number: int) -> Any:
    figure.legend(loc="outside right center", frameon=False, fontsize=7, ncols=1 + number // 24)
    return figure


def moment_results(
    finished: Sequence[Finished],
    spectra: Mapping[int, Spectrum],
    history: Sequence[Sequence[HalfAgreement]],
    seconds: float,
) -> dict[str, Any]:
    """The content of ``results.json``.

    Args:
        finished: What was computed or found, one of each layer.
        spectra: Eigenvalues by layer; a layer may be missing.
        history: How far halves of the text agreed, by group of layers.
        seconds: How long it took.
    """
    layers = []
    for done in finished:
        entry: dict[str, Any] = {
            "layer": done.layer,
            "path": str(done.path),
            "cached": done.cached,
            "count": done.info.count,
            "agreement": done.info.agreement,
        }
        spectrum = spectra.get(done.layer)
        for name in ("ridge", "condition", "effective_rank", "null_dimensions"):
            entry[name] = getattr(spectrum, name) if spectrum is not None else None
        entry["eigenvalues"] = spectrum.eigenvalues.tolist() if spectrum is not None else None
        layers.append(entry)
    return {
        "seconds": seconds,
        "n_layers": len(finished),
        "n_cached": sum(done.cached for done in finished),
        "layers": layers,
        "meetings": [[asdict(check) for check in checks] for checks in history],
    }


def moment_manifest(module: Any) -> dict[str, Any]:
    """The content of ``manifest.json``: library versions, model, corpus and options of the pass."""
    language_model, moments = module.language_model, module.moments
    return {
        "versions": library_versions(),
        "model": {
            "source": language_model.source,
            "fingerprint": language_model.fingerprint,
            "tokenizer": language_model.tokenizer_fingerprint,
            "device": str(language_model.device),
        },
        "corpus": {"source": moments.corpus.source, "fingerprint": moments.corpus.fingerprint},
        "block": [moments.packer.rows, moments.packer.length],
        "documents_apart": moments.apart,
        "options": asdict(moments.options),
    }


def moment_table(finished: Sequence[Finished], spectra: Mapping[int, Spectrum]) -> Table:
    """The second moments for the console, one a row."""
    table = Table(title="Second moments of keys", box=box.SIMPLE_HEAD)
    for name in ("layer", "keys", "halves agree", "condition", "effective rank"):
        table.add_column(name, justify="right")
    table.add_column("file", overflow="fold")
    for done in finished:
        spectrum = spectra.get(done.layer)
        table.add_row(
            str(done.layer),
            str(done.info.count),
            f"{done.info.agreement:.4f}" if done.info.agreement is not None else "",
            f"{spectrum.condition:.1e}" if spectrum is not None else "",
            f"{spectrum.effective_rank:.0f}" if spectrum is not None else "",
            done.path.name + " (cached)" * done.cached,
        )
    return table
