"""A run as one HTML file that needs no server and no network: summary, scores, figures, edits, settings.

Texts of the run are data here, whatever they hold: in markup they are escaped; the table of edits is made by the page's
script from JSON in which no character can end the element that holds it.
"""

import base64
import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

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

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-$script_hash'">
<title>$title</title>
<style>
$css</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="facts">$facts</p>
</header>
<nav aria-label="Sections"><ul>$links</ul></nav>
<main>
<dl class="tiles">$tiles</dl>
$remarks
<section id="scores">
<h2>Scores</h2>
$scores
</section>
$figures
$samples
<section id="$table">
<h2>$table_title</h2>
<div class="tools" id="tools"><output id="found" for="tools"></output></div>
<div class="scroll" id="rows"><table></table></div>
<button type="button" class="more" id="more" hidden>Show more</button>
<noscript><p>This table needs JavaScript; <code>records.jsonl</code> beside this file holds the same.</p></noscript>
</section>
<section id="settings">
<h2>Settings</h2>
<details><summary>Options, as resolved</summary><pre>$settings</pre></details>
<details><summary>Versions, fingerprints, contexts</summary><pre>$manifest</pre></details>
</section>
</main>
<footer>Written by rome_pl $version. The same numbers: <code>results.json</code>, <code>records.jsonl</code>,
<code>table.csv</code>, <code>table.md</code>.</footer>
<script type="application/json" id="data">$data</script>
<script>$script</script>
</body>
</html>
""")


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
    sections = ["scores", *["figures"] * bool(pictures), *["generations"] * bool(samples), table, "settings"]
    title = "Evaluation" if table == "records" else "Edits"
    return _PAGE.substitute(
        title=escape(f"{title} of {manifest['model']['source']}"),
        facts=escape(" · ".join(_facts(content, manifest))),
        css=_asset("report.css"),
        links="".join(f'<li><a href="#{name}">{name.capitalize()}</a></li>' for name in sections),
        tiles="".join(_tiles(content, records)),
        remarks=_remarks_section(remarks(content, records)),
        scores=_score_section(content),
        figures=_figure_section(pictures),
        samples=_sample_section(samples),
        table=table,
        table_title=table.capitalize(),
        settings=escape(settings),
        manifest=escape(json.dumps(plain(manifest), indent=2, ensure_ascii=False)),
        version=escape(str(manifest["versions"].get("rome_pl", ""))),
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


def _tiles(content: Content, records: Records) -> Iterator[str]:
    stage = measured_stages(content)[-1]
    if "n_applied" in content:
        yield _tile("Edits applied", f"{content['n_applied']} of {content['n_requested']}", held_already(content))
    else:
        measured = content["n_requested"] - content["n_skipped"]
        edits = f"{content['n_edits']} edits in the model" if content["n_edits"] else ""
        yield _tile("Records measured", f"{measured} of {content['n_requested']}", edits)
    for names, subject in PANELS:
        score = next((name for name in names if content[stage][name]["value"] is not None), None)
        if score is not None:
            entry = content[stage][score]
            base = content["base"][score]["value"]
            note = f"{subject}; unedited {100 * base:.1f}" if base is not None and stage != "base" else subject
            yield _tile(f"{score}, %", f"{100 * entry['value']:.1f}", note)
    lost = [record["lost"] for record in records if record.get("lost") is not None]
    if lost:
        yield _tile("Lost since", str(sum(lost)), f"of {len(lost)} measured at the end")
    before, after = content["perplexity"]["base"], content["perplexity"]["final"]
    if after is not None:
        yield _tile("Perplexity", f"{after:.4g}", f"unedited {before:.4g}" if before is not None else "")
    elif before is not None and stage == "base":
        yield _tile("Perplexity", f"{before:.4g}", "of held-out text")
    if content["divergence"] is not None:
        yield _tile("KL to unedited", f"{content['divergence']:.2g}", "nats per token of held-out text")
    if content.get("weight_change"):
        yield _tile("Weight change", f"{content['weight_change']:.2g}", "of the weight's norm")
    if content.get("seconds_per_edit") is not None:
        yield _tile("Time of an edit", f"{content['seconds_per_edit']:.2g} s", "measuring included")


def _tile(name: str, value: str, note: str = "") -> str:
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}{small}</dd></div>'


def _remarks_section(found: Sequence[str]) -> str:
    if not found:
        return ""
    items = "".join(f"<li>{escape(remark)}</li>" for remark in found)
    return f'<section class="warnings" id="remarks"><h2>Remarks</h2><ul>{items}</ul></section>'


def _score_section(content: Content) -> str:
    stages = measured_stages(content)
    head = "".join(f'<th scope="col" class="number">{STAGES[stage]}</th>' for stage in stages)
    rows = []
    previous = ""
    for score in measured_scores(content):
        entries = [content[stage][score] for stage in stages]
        cells = "".join(f'<td class="number">{_interval_cell(entry)}</td>' for entry in entries)
        numbers = " / ".join(map(str, sorted({entry["n"] for entry in entries})))
        apart = ' class="apart"' if previous in COUNTERFACT and score not in COUNTERFACT else ""
        name = score.replace("_", "_<wbr>")  # where a narrow screen may break it
        rows.append(
            f'<tr{apart}><th scope="row">{name}</th>{cells}<td class="number">{numbers}</td>'
            f'<td class="meaning">{escape(MEANINGS[score])}</td></tr>'
        )
        previous = score
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">score</th>{head}<th scope="col" class="number">n</th>'
        f'<th scope="col" class="meaning">meaning</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        '<p class="note">Means over records in %, with 95 % intervals. Every valid record counts, whatever became '
        "of its edit.</p>"
    )


def _interval_cell(entry: Mapping[str, Any]) -> str:
    value, _, edges = interval_text(entry, 1).partition(" ")
    broken = f"<small>{entry['n_nan']} NaN</small>" if "n_nan" in entry else ""
    return f"{value}<small>{edges}</small>{broken}"


def _figure_section(pictures: Mapping[str, bytes]) -> str:
    if not pictures:
        return ""
    shown = "".join(
        f'<figure id="figure-{name}"><div class="scroll"><img alt="{escape(CAPTIONS[name])}" {_size(picture)} '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"></div>'
        f"<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"
        for name, picture in pictures.items()
    )
    return f'<section id="figures"><h2>Figures</h2>{shown}</section>'


def _sample_section(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in (one.prompt, one.target_new, before, after))}</tr>"
        for one, before, after in samples
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("prompt", "wanted", "unedited model", "final model"))
    return (
        '<section id="generations"><h2>Generations</h2><div class="scroll"><table class="texts"><thead>'
        f"<tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        '<p class="note">How the model goes on with the prompts of the first edits, greedily.</p></section>'
    )


def _size(picture: bytes) -> str:
    """Width and height out of a PNG file's head: the page knows its length before the pictures are decoded."""
    width, height = struct.unpack(">II", picture[16:24])
    return f'width="{width}" height="{height}"'


def _table_data(content: Content, records: Records) -> dict[str, Any]:
    stage = measured_stages(content)[-1]
    panels = [[name for name in names if content[stage][name]["n"]] for names, _ in PANELS]
    return {
        "moments": STAGES,
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
