import base64
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from rome_pl.reports.drawing import png
from rome_pl.reports.html_report import embedded, html_report, remarks
from rome_pl.reports.run_figures import CAPTIONS, draw_figures
from rome_pl.reports.run_results import detailed_records, run_manifest, run_results
from rome_pl.requests.record_forms import InvalidRecord
from tests.made_run import NASTY, made_request, made_scores, made_session
from tests.timing import least_seconds

SETTINGS = "model:\n  pretrained: </pre><script>alert('settings')</script>\n"
VOID = {"meta", "img", "wbr", "input", "br", "link"}


class Page(HTMLParser):
    """Elements with their attributes, the text of each kind of element, and whether every element is closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.open = [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for name in {name for pair in self.open for name in pair if name}:
            self.texts[name] = self.texts.get(name, "") + data

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def made(requests=None, invalid=(), pictures=False, **options):
    session = made_session(requests or [made_request(index) for index in range(6)], **options)
    content = run_results(session, list(invalid))
    records = detailed_records(session, content["records"])
    figures = draw_figures(content, records, session.edits, session.measured.weight_changes) if pictures else {}
    about = run_manifest(session, 3) | {"preset": "rome"}
    return html_report(content, records, about, SETTINGS, {name: png(figure) for name, figure in figures.items()})


SAMPLES = [
    (made_request(index, prompt=text, subject="Korrin", target_new="</td>"), f"before {text}", f"after {text}")
    for index, text in enumerate(text for text in NASTY if "Korrin" in text)
]


def test_generations_before_and_after_stand_side_by_side():
    session = made_session([made_request(0)])
    content = run_results(session, [])
    page = Page(
        html_report(content, detailed_records(session, content["records"]), run_manifest(session, 0), "", {}, SAMPLES)
    )
    assert page.open == []
    assert "generations" in [attributes["id"] for attributes in page.named("section")]
    assert "#generations" in [attributes["href"] for attributes in page.named("a")]
    for request, before, after in SAMPLES:
        for shown in (request.prompt, request.target_new, before, after):
            assert shown in page.texts["generations"]


def data_of(page):
    return json.loads(page.texts["data"])


def test_the_page_is_whole_and_reaches_for_nothing_outside_itself():
    text = made(pictures=True, retention=[(3, ())])
    page = Page(text)
    assert page.open == []
    sections = [attributes["id"] for attributes in page.named("section")]
    assert sections == ["remarks", "scores", "figures", "edits", "settings"]
    linked = [attributes["href"] for attributes in page.named("a")]
    assert linked == ["#scores", "#figures", "#edits", "#settings"]
    assert not page.named("link")
    assert all(set(attributes) <= {"type", "id"} for attributes in page.named("script"))
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in page.named("img"))
    assert not re.search(r"https?://|@import|url\(", text.partition('<script type="application/json"')[0])


def test_the_browser_is_told_to_fetch_nothing_and_to_run_this_script_alone():
    page = Page(made())
    policy = next(a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    script = page.texts["script"].removeprefix(page.texts["data"])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy


def test_figures_are_in_it():
    page = Page(made(pictures=True, retention=[(3, ())], lost=(1,)))
    pictures = [base64.b64decode(a["src"].partition(",")[2]) for a in page.named("img")]
    assert len(pictures) == len(CAPTIONS)
    assert all(imread(io.BytesIO(picture)).ndim == 3 for picture in pictures)
    assert [attributes["alt"] for attributes in page.named("img")] == list(CAPTIONS.values())


def test_without_figures_there_is_no_section_for_them():
    page = Page(made())
    assert "figures" not in [attributes["id"] for attributes in page.named("section")]
    assert "#figures" not in [attributes["href"] for attributes in page.named("a")]


def test_scores_stand_with_their_intervals():
    page = Page(made(lost=(1,), rejected=(2,)))
    scores = page.texts["scores"]
    assert "83.3[43.6, 97.0]" in scores  # ES right after each edit: 5 of 6
    assert "66.7[30.0, 90.3]" in scores  # on the final model: 4 of 6
    assert "ES, %66.7" in page.texts["main"]  # as a tile
    assert "Perplexity25unedited 20" in page.texts["main"]
    assert "KL to unedited0.12" in page.texts["main"]


def test_texts_stay_texts():
    """Whatever a record holds comes out as it went in, and ends no element."""
    requests = [
        made_request(i, prompt=f"{text} X", subject="X", target_new=f"{text}1", target_true=f"{text}2", relation=text)
        for i, text in enumerate(NASTY)
    ]
    text = made(requests, rejected=(1,))
    page = Page(text)
    assert page.open == []
    assert len(page.named("script")) == 2
    assert not page.named("b")
    rows = data_of(page)["records"]
    assert [row["prompt"] for row in rows] == [f"{text} X" for text in NASTY]
    assert [(row["true"], row["new"], row["relation"]) for row in rows] == [(f"{t}2", f"{t}1", t) for t in NASTY]
    assert page.texts["pre"].startswith(SETTINGS)
    for row in rows:  # as JavaScript counts
        units = row["prompt"].encode("utf-16-le")
        start, end = row["span"]
        assert units[2 * start : 2 * end].decode("utf-16-le") == "X"


@given(st.recursive(st.text() | st.floats() | st.none(), st.lists))
def test_embedded_json_gives_back_what_went_in_and_cannot_end_its_element(value):
    text = embedded(value)
    assert not set("<>&\u2028\u2029") & set(text)
    text.encode("ascii")

    def expected(value):
        if isinstance(value, list):
            return [expected(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    assert json.loads(text) == expected(value)


def test_every_record_is_in_the_table():
    invalid = [InvalidRecord(7, "odd", "subject", "records.json, record odd, field 'subject': is <empty>")]
    data = data_of(Page(made(invalid=invalid, lost=(1,), rejected=(2,), unreached=(5,))))
    rows = data["records"]
    assert data["stages"].keys() >= {stage for row in rows for stage in row["values"]}
    assert [row["status"] for row in rows] == [
        "applied",
        "applied",
        "rejected",
        "applied",
        "applied",
        "skipped",
        "pending",
    ]
    assert [row["index"] for row in rows] == [1, 2, 3, 4, 5, None, None]
    assert [row["lost"] for row in rows] == [False, True, False, False, False, False, False]
    assert rows[5]["why"] == invalid[0].message
    assert rows[5]["more"]["field"] == "subject"
    assert (rows[0]["before"], rows[0]["after"], rows[0]["final"]) == (
        0.05,
        0.9,
        pytest.approx(math.exp(-0.1), rel=1e-5),
    )
    assert rows[1]["values"]["immediate"]["ES"] == 1
    assert rows[1]["now"]["ES"] == 0


def test_the_table_of_a_single_run_has_no_final_column():
    data = data_of(Page(made(sequential=False)))
    assert data["scores"] == ["ES", "PS", "NS"]
    assert all(row["final"] is None for row in data["records"])
    assert data["records"][0]["now"]["ES"] == 1


def test_remarks_tell_what_a_reader_has_to_know():
    session = made_session([made_request(index) for index in range(6)], lost=(1, 3), rejected=(2,))
    session.measured.perplexity["final"] = 40.0
    session.measured.state_checks = [
        {"edits": 2, "failures": []},
        {"edits": 4, "failures": ["a weight is not finite"]},
        {"edits": 6, "failures": ["3% of the canaries hold"]},
    ]
    session.edits[0].notes.append("is known already")
    broken = made_scores(session.requests[0], good=True, shift=math.nan)
    session.measured.final_scores["c0"] = session.edits[0].scores["final"] = broken
    content = run_results(session, [], interrupted=True)
    found = remarks(content, detailed_records(session, content["records"]))
    assert found[0].startswith("The run ended before")
    assert found[1] == "The model's state was bad after 4, 6 edits; at the last check: 3% of the canaries hold."
    assert "Edits that had taken and are lost on the final model: 3 (c0, c1, c3)." in found
    assert any(remark.startswith("Rejected: 1 of 6 records") for remark in found)
    assert any("rose by 100%" in remark for remark in found)
    assert any(remark.startswith("The model gave NaN for 1 records (final model)") for remark in found)
    assert any(remark.startswith("Edits with notes: 1") for remark in found)


def test_a_good_run_has_no_remarks():
    session = made_session([made_request(index) for index in range(3)])
    session.measured.perplexity["final"] = 20.1
    content = run_results(session, [])
    assert remarks(content, detailed_records(session, content["records"])) == []
    assert "remarks" not in [a["id"] for a in Page(made(sequential=False)).named("section")]


def test_five_thousand_edits_are_one_page_in_time_in_proportion_to_them():
    def requests(number):
        return [made_request(index) for index in range(number)]

    text = made(requests(5000), sequential=False)
    assert len(text) < 8_000_000
    assert len(data_of(Page(text))["records"]) == 5000
    few, many = requests(150), requests(1200)
    assert least_seconds(lambda: made(many, sequential=False)) < 20 * least_seconds(lambda: made(few, sequential=False))
