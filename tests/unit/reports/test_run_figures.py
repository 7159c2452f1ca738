import io
import math
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from rome_pl.metrics import ProbeScores
from rome_pl.metrics.intervals import wilson_interval
from rome_pl.reports.drawing import fitting, png
from rome_pl.reports.run_figures import CAPTIONS, accuracy_trend, draw_figures, relation_bars, retention_curves
from rome_pl.reports.run_results import detailed_records, run_results
from rome_pl.reports.stream_figures import LABELLED, loss_curves, perplexity_trend, probabilities, weight_norms
from tests.made_run import NASTY, made_request, made_session


def made(number=6, **options):
    session = made_session([made_request(index) for index in range(number)], **options)
    content = run_results(session, [])
    return session, content, detailed_records(session, content["records"])


def lines(axes):
    """Labelled lines of a panel."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def marks(axes):
    """Values with their intervals, in the order in which they were drawn."""
    found = []
    for container in axes.containers:
        line, _, (bars,) = container.lines
        (segment,) = bars.get_segments()
        found.append((float(line.get_ydata()[0]), float(segment[0][1]), float(segment[1][1])))
    return found


def test_a_sequential_run_has_every_picture_and_each_is_a_png():
    session, content, records = made(retention=[(2, ()), (4, (1,))], lost=(1,))
    figures = draw_figures(content, records, session.edits, session.measured.weight_changes)
    assert list(figures) == list(CAPTIONS)
    for figure in figures.values():
        assert imread(io.BytesIO(png(figure))).shape[1] > 900
        assert figure.canvas.manager is None  # nobody keeps it alive


def test_a_single_run_leaves_out_what_it_has_no_data_for():
    session, content, records = made(sequential=False)
    figures = draw_figures(content, records, session.edits, session.measured.weight_changes)
    assert list(figures) == ["accuracy", "relations", "probabilities", "loss_curves", "weight_change"]


def test_a_run_without_edits_has_no_pictures():
    session, content, records = made(3, unreached=(0, 1, 2), sequential=False)
    assert draw_figures(content, records, session.edits, session.measured.weight_changes) == {}


def test_accuracy_is_the_mean_so_far_and_at_the_end_that_of_the_results():
    _, content, records = made(4, rejected=(1, 2), lost=(3,))
    figure = accuracy_trend(content, records)
    edit, paraphrases, neighbours = figure.axes
    assert lines(edit)["unedited"] == ([1, 2, 3, 4], [0, 0, 0, 0])
    assert lines(edit)["just edited"] == ([1, 2, 3, 4], pytest.approx([1, 1 / 2, 1 / 3, 2 / 4]))
    assert lines(neighbours)["just edited"][1] == [1, 1, 1, 1]
    for panel, score in ((edit, "ES"), (paraphrases, "PS"), (neighbours, "NS")):
        entries = [content[moment][score] for moment in ("base", "immediate", "final")]
        expected = [(entry["value"], entry["low"], entry["high"]) for entry in entries]
        assert [pytest.approx(one, abs=1e-9) for one in expected] == marks(panel)
        assert panel.get_title() == f"{score}: {panel.get_title().split(': ')[1]}"
        assert "n = 4" in panel.get_title()
    assert marks(edit)[2][0] == 1 / 4
    assert [text.get_text() for text in figure.legends[0].texts] == ["unedited", "just edited", "final model"]


def test_nan_is_no_accuracy():
    session, _, _ = made(3)
    broken = ProbeScores((math.nan, math.nan), answers=session.edits[1].scores["immediate"].answers)
    session.edits[1].scores["immediate"] = broken
    content = run_results(session, [])
    figure = accuracy_trend(content, detailed_records(session, content["records"]))
    assert lines(figure.axes[0])["just edited"] == ([1, 3], [1, 1])
    assert "n = 2" in figure.axes[0].get_title()


def test_without_true_answers_accuracy_is_that_of_the_tokens():
    requests = [made_request(index, target_true=None, neighbours=()) for index in range(3)]
    session = made_session(requests, rejected=(2,))
    content = run_results(session, [])
    figure = accuracy_trend(content, detailed_records(session, content["records"]))
    titles = [axes.get_title().split(":")[0] for axes in figure.axes]
    assert titles == ["rewrite_acc", "rephrase_acc", "locality"]
    assert lines(figure.axes[0])["just edited"][1] == pytest.approx([1, 1, 2 / 3])


def test_retention_shows_the_sample_s_score_and_the_share_that_holds_by_age():
    _, content, records = made(6, retention=[(2, ()), (4, (0,)), (6, (0, 1, 5))], lost=(0, 1), rejected=(5,))
    left, right = retention_curves(content, records).axes
    assert lines(left)["sample of earlier edits"] == ([2, 4, 6], pytest.approx([1, 3 / 4, 3 / 6]))
    # Edit 5 never took: it cannot be lost. The others were looked at 2 + 4 + 5 times in between and 5 times at the end.
    assert "n = 16 looks" in right.get_title()
    curve = max(right.lines, key=lambda line: len(line.get_xdata()))
    # (age, held), sorted; two looks a group.
    looks = sorted([
        (2, True), (1, True), (4, False), (3, True), (2, True), (1, True),
        *[(6, False), (5, False), (4, True), (3, True), (2, True)] * 2,
    ])  # fmt: skip
    groups = [looks[start : start + 2] for start in range(0, 16, 2)]
    assert list(curve.get_xdata()) == [sum(age for age, _ in group) / 2 for group in groups]
    assert list(curve.get_ydata()) == [sum(held for _, held in group) / 2 for group in groups]
    assert retention_curves(content | {"retention": []}, records) is None


def test_relations_have_bars_with_intervals_and_n():
    _, _, records = made(5, lost=(0,), rejected=(3,))
    figure = relation_bars(records)
    edit = figure.axes[0]
    assert [text.get_text() for text in edit.get_yticklabels()] == ["P0 (n = 2)", "P1 (n = 2)", "P2 (n = 1)"]
    bars = [patch.get_width() for patch in edit.patches]
    assert bars == [0, 1, 1]  # both edits of P0 do not hold at the end
    arms = [container.lines[2][0].get_segments()[0] for container in edit.containers if hasattr(container, "lines")]
    assert (arms[1][0][0], arms[1][1][0]) == pytest.approx(wilson_interval(torch.tensor([1.0, 1.0])))


def test_many_relations_share_the_last_bar_and_records_without_one_are_named():
    requests = [made_request(index, relation=f"P{index}" if index else None) for index in range(30)]
    session = made_session(requests)
    content = run_results(session, [])
    figure = relation_bars(detailed_records(session, content["records"]))
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(labels) == 20
    assert labels[-1] == "11 others (n = 11)"
    named = sum("others" not in label for label in labels)
    assert named == 19


def test_no_relations_no_bars():
    requests = [made_request(index, relation=None) for index in range(3)]
    session = made_session(requests)
    content = run_results(session, [])
    assert relation_bars(detailed_records(session, content["records"])) is None
    named = made_session([*requests, made_request(3)])
    figure = relation_bars(detailed_records(named, run_results(named, [])["records"]))
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["none (n = 3)", "P0 (n = 1)"]


def test_probabilities_before_after_and_at_the_end():
    _, _, records = made(3, rejected=(1,), lost=(2,))
    drawn = lines(probabilities(records).axes[0])
    assert drawn["before"] == ([1, 2, 3], [0.05] * 3)
    assert drawn["after"] == ([1, 2, 3], [0.9, 0.05, 0.9])
    assert drawn["final model"][1] == pytest.approx([math.exp(-0.1), math.exp(-3), math.exp(-3)])
    assert drawn["not applied"][0] == [2]


def test_a_few_loss_curves_are_labelled_and_many_are_a_bundle_with_its_median():
    session, _, _ = made(3)
    session.edits[2].steps = session.edits[2].steps[:1]
    few = loss_curves(session.edits)
    assert [len(line.get_ydata()) for line in few.axes[0].lines] == [3, 3, 1]
    assert list(few.axes[1].lines[0].get_ydata()) == pytest.approx([0, 0.2, 0.4])
    assert len({line.get_color() for line in few.axes[0].lines}) == 3
    assert few.legends[0].texts[1].get_text() == "#2 The lighthouse of Korrin1 stands in → Oslo"

    session, _, _ = made(LABELLED + 1)
    many = loss_curves(session.edits)
    assert len(many.axes[0].lines) == LABELLED + 2
    assert list(many.axes[0].lines[-1].get_ydata()) == pytest.approx([4, 2, 4 / 3])
    assert many.legends[0].texts[0].get_text() == f"median of {LABELLED + 1} edits"


def test_an_edit_that_ended_early_keeps_its_last_loss_in_the_median():
    session, _, _ = made(LABELLED + 1)
    for edit in session.edits[:8]:
        edit.steps = [replace(edit.steps[0], loss=9.0)]
    assert list(loss_curves(session.edits).axes[0].lines[-1].get_ydata()) == [9, 9, 9]


def test_labels_survive_any_text():
    """Missing glyphs would be warnings, which are errors here; so would be mathematics that is none."""
    requests = [made_request(i, prompt=text, subject=text.strip()[:3]) for i, text in enumerate(NASTY)]
    figure = loss_curves(made_session(requests).edits)
    png(figure)
    assert len(figure.legends[0].texts) == len(NASTY)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("costs $5", r"costs \$5"),
        ("a" * 60, "…" + "a" * 49),
        ("🏰", "□"),
    ],
)
def test_a_label_shows_what_fonts_have(text, shown):
    assert fitting(text, 50) == shown


def test_norms_of_the_weight_s_change_and_of_updates():
    session, _, records = made(3, rejected=(1,))
    accumulated, updates = weight_norms(records, session.measured.weight_changes).axes
    assert lines(accumulated)["_child0"] == ([1, 2, 3], pytest.approx([0.01, 0.02, 0.03]))
    assert lines(updates)["applied (n = 2)"] == ([1, 3], pytest.approx([2, 2]))
    assert lines(updates)["not applied (n = 1)"][0] == [2]
    (only,) = weight_norms(records, {1: 0.0}).axes
    assert only.get_title() == "each edit's own"
    assert weight_norms([], {}) is None


def test_perplexity_over_the_stream():
    _, content, _ = made(6, retention=[(2, ()), (6, ())])
    drawn = lines(perplexity_trend(content).axes[0])
    assert drawn["final: 25"] == ([0, 2, 6], [20, 22, 25])  # the final model's own takes the last point's place
    assert drawn["unedited: 20"][1] == [20, 20]
    assert perplexity_trend(content | {"perplexity": {"base": 20.0, "final": None}, "retention": []}) is None


def test_drawing_leaves_the_user_s_settings_alone():
    before = dict(matplotlib.rcParams)
    session, content, records = made(3)
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "font.size": 40}):
        figures = draw_figures(content, records, session.edits, session.measured.weight_changes)
        pictures = [png(figure) for figure in figures.values()]
    assert dict(matplotlib.rcParams) == before
    assert all(np.median(imread(io.BytesIO(picture))) == 1 for picture in pictures)  # white
