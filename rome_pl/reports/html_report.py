"""A run as one HTML file that needs no server and no network: summary, scores, figures, edits, settings.

The page is ``assets/report.html``, a template that escapes every text of the run. The page's script makes the table of
edits from JSON in which no character can end the element that holds it.
"""

import base64
import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from rome_pl.editing.outcome import held_already
from rome_pl.files.whole_files import plain
from rome_pl.reports.continuations import Sample
from rome_pl.reports.run_figures import CAPTIONS, PANELS
from rome_pl.reports.score_tables import (
    COUNTERFACT,
    MEANINGS,
    STAGES,
    interval_text,
    measured_scores,
    measured_stages,
)

__all__ = ["embedded", "html_report", "remarks"]

Content = Mapping[str, Any]
Records = Sequence[Mapping[str, Any]]


def html_report(
    content: Content,
    records: Records,
    manifest: Mapping[str, Any],
    settings: str,
    pictures: Mapping[str, bytes],
    samples: Sequence[Sample] = (),
) -> str:
    """The page of a run of edits, or of an evaluation, whose mode is ``evaluation``.

    Args:
        content: What results.json holds.
        records: What records.jsonl holds.
        manifest: What manifest.json holds.
        settings: The options of the run, as text.
        pictures: PNG files' contents by the names of :data:`rome_pl.reports.run_figures.CAPTIONS`.
        samples: How prompts went on before, and go on now.
    """
    script = _asset("report.js")
    table = "records" if content["mode"] == "evaluation" else "edits"
    title = "Evaluation" if table == "records" else "Edits"
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    ).from_string(_asset("report.html"))
    return template.render(
        title=f"{title} of {manifest['model']['source']}",
        facts=" · ".join(_facts(content, manifest)),
        sections=["scores", *["figures"] * bool(pictures), *["generations"] * bool(samples), table, "settings"],
        tiles=list(_tiles(content, records)),
        remarks=remarks(content, records),
        stages=[STAGES[stage] for stage in measured_stages(content)],
        scores=list(_score_rows(content)),
        figures=[_figure(name, picture) for name, picture in pictures.items()],
        samples=samples,
        table=table,
        settings=settings,
        manifest=json.dumps(plain(manifest), indent=2, ensure_ascii=False),
        version=manifest["versions"].get("rome_pl", ""),
        css=_asset("report.css"),
        data=embedded(_table_data(content, records)),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _facts(content: Content, manifest: Mapping[str, Any]) -> Iterator[str]:
    model, rewrite = manifest["model"], manifest.get("rewrite")
    if rewrite:
        weights = dict(zip(rewrite["layers"], rewrite["weights"], strict=True))
        yield from (f"{content['mode']} edits", f"layer {', '.join(map(str, rewrite['main']))}")
        yield ", ".join(weights[layer] for layer in rewrite["main"])  # the others are named by retries alone
    if manifest.get("ledger"):
        yield f"with the edits of {manifest['ledger']}"
    if manifest.get("base"):
        yield f"edited from {manifest['base']['source']}"
    yield f"{model['dtype']} on {model['device']}".replace("torch.", "")
    yield f"seed {manifest['seed']}"
    if manifest.get("preset"):
        yield f"preset {manifest['preset']}"


def embedded(value: Any) -> str:
    """JSON that may stand in a ``<script>`` element: nothing in it can end the element, open a comment, or be lost."""
    text = json.dumps(plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def remarks(content: Content, records: Records) -> list[str]:
    """What a reader of the scores has to know, worst first."""
    found = []
    if content.get("interrupted"):
        found.append("The run ended before its last edit: scores right after an edit are those of the edits reached.")
    failed = [check for check in content.get("state_checks", ()) if check["failures"]]
    if failed:
        places = _some([str(check["edits"]) for check in failed])
        found.append(
            f"The model's state was bad after {places} edits; at the last check: {'; '.join(failed[-1]['failures'])}."
        )
    damage = [finding for look in content.get("damage", ())[-1:] for finding in look["findings"]]
    if damage:
        found.append(f"Damage: {'; '.join(damage)}.")
    lost = [str(record["case_id"]) for record in records if record.get("lost")]
    if lost:
        found.append(f"Edits that had taken and are lost on the final model: {len(lost)} ({_some(lost)}).")
    for name in ("rejected", "skipped", "rolled_back"):
        if content.get(f"n_{name}"):
            number = (
                f"{name.replace('_', ' ').capitalize()}: {content[f'n_{name}']} of {content['n_requested']} records"
            )
            found.append(f"{number}. Valid requests among them count in the scores all the same.")
    before, after = content["perplexity"]["base"], content["perplexity"]["final"]
    if before and after and after > 1.1 * before:
        found.append(f"Perplexity of held-out text rose by {after / before - 1:.0%}.")
    for stage in measured_stages(content):
        broken = max((entry.get("n_nan", 0) for entry in content[stage].values()), default=0)
        if broken:
            found.append(f"The model gave NaN for {broken} records ({STAGES[stage]}); no mean has them in it.")
    noted = sum(bool(record.get("notes")) for record in records)
    if noted:
        found.append(f"Edits with notes: {noted}; see their details in the table.")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def _asset(name: str) -> str:
    return (files("rome_pl") / "assets" / name).read_text(encoding="utf-8")


def _tiles(content: Content, records: Records) -> Iterator[tuple[str, str, str]]:
    """Name, value and note of each number at the top."""
    stage = measured_stages(content)[-1]
    if "n_applied" in content:
        yield "Edits applied", f"{content['n_applied']} of {content['n_requested']}", held_already(content)
    else:
        measured = content["n_requested"] - content["n_skipped"]
        edits = f"{content['n_edits']} edits in the model" if content["n_edits"] else ""
        yield "Records measured", f"{measured} of {content['n_requested']}", edits
    yield from _score_tiles(content, stage)
    lost = [record["lost"] for record in records if record.get("lost") is not None]
    if lost:
        yield "Lost since", str(sum(lost)), f"of {len(lost)} measured at the end"
    before, after = content["perplexity"]["base"], content["perplexity"]["final"]
    if after is not None:
        yield "Perplexity", f"{after:.4g}", f"unedited {before:.4g}" if before is not None else ""
    elif before is not None and stage == "base":
        yield "Perplexity", f"{before:.4g}", "of held-out text"
    if content["divergence"] is not None:
        yield "KL to unedited", f"{content['divergence']:.2g}", "nats per token of held-out text"
    if content.get("weight_change"):
        yield "Weight change", f"{content['weight_change']:.2g}", "of the weight's norm"
    if content.get("seconds_per_edit") is not None:
        yield "Time of an edit", f"{content['seconds_per_edit']:.2g} s", "measuring included"


def _score_tiles(content: Content, stage: str) -> Iterator[tuple[str, str, str]]:
    for names, subject in PANELS:
        score = next((name for name in names if content[stage][name]["value"] is not None), None)
        if score is not None:
            base = content["base"][score]["value"]
            note = f"{subject}; unedited {100 * base:.1f}" if base is not None and stage != "base" else subject
            yield f"{score}, %", f"{100 * content[stage][score]['value']:.1f}", note


def _score_rows(content: Content) -> Iterator[dict[str, Any]]:
    """The rows of the table of scores: of each stage the mean, its interval, and how many records gave NaN."""
    previous = ""
    for score in measured_scores(content):
        entries = [content[stage][score] for stage in measured_stages(content)]
        texts = [interval_text(entry, 1).partition(" ") for entry in entries]
        yield {
            "name": score,
            "apart": previous in COUNTERFACT and score not in COUNTERFACT,
            "cells": [(mean, edges, e.get("n_nan")) for e, (mean, _, edges) in zip(entries, texts, strict=True)],
            "numbers": " / ".join(map(str, sorted({entry["n"] for entry in entries}))),
            "meaning": MEANINGS[score],
        }
        previous = score


def _figure(name: str, picture: bytes) -> dict[str, Any]:
    # The size stands in a PNG file's head: the page knows its length before the pictures are decoded.
    width, height = struct.unpack(">II", picture[16:24])
    encoded = base64.b64encode(picture).decode()
    return {"name": name, "caption": CAPTIONS[name], "width": width, "height": height, "png": encoded}


def _table_data(content: Content, records: Records) -> dict[str, Any]:
    stage = measured_stages(content)[-1]
    panels = [[name for name in names if content[stage][name]["n"]] for names, _ in PANELS]
    return {
        "stages": STAGES,
        "scores": [names[0] for names in panels if names],
        "meanings": MEANINGS,
        "records": [_row(record) for record in records],
    }


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    request = record.get("request") or {}
    probability = record.get("probability") or {}
    values = record.get("values") or {}
    final = (record.get("scores") or {}).get("final")
    seconds = record.get("seconds") or {}
    return {
        "index": None if record["index"] is None else record["index"] + 1,
        "id": str(record["case_id"]),
        "status": record["status"],
        "lost": bool(record.get("lost")),
        "why": record["reason"],
        "notes": record.get("notes") or [],
        "prompt": request.get("prompt"),
        "span": _utf16_span(request["prompt"], request["subject_span"]) if request else None,
        "subject": request.get("subject"),
        "true": request.get("target_true"),
        "new": request.get("target_new"),
        "relation": request.get("relation"),
        "before": _rounded(probability.get("before")),
        "after": _rounded(probability.get("after")),
        "final": _rounded(math.exp(final["rewrite"][0])) if final else None,
        "now": _all_rounded(next((values[stage] for stage in reversed(STAGES) if stage in values), {})),
        "values": {stage: _all_rounded(found) for stage, found in values.items()},
        "more": {
            "record": record["case_id"],
            "relation": request.get("relation"),
            "subject": request.get("subject"),
            "notes": record.get("notes") or [],
            "field": record.get("field"),
            "evaluations": record.get("num_steps"),
            "last loss": _rounded(record.get("loss")),
            "norm of the value's offset": _rounded(record.get("value_norm")),
            "norm of the update": _rounded(record.get("update_norm")),
            "realised in the model's precision": _rounded(record.get("realised")),
            "seconds": ", ".join(f"{stage} {took:.3g}" for stage, took in seconds.items()),
        },
    }


def _utf16_span(text: str, span: Sequence[int]) -> list[int]:
    """A span of characters as JavaScript counts them: beyond the basic plane each is two."""
    return [len(text[:edge].encode("utf-16-le", "surrogatepass")) // 2 for edge in span]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _all_rounded(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _rounded(value) for name, value in values.items()}
