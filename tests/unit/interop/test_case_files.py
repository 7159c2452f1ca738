import csv
import io
import json
import math

import pytest
from rich.console import Console

from rome_pl.files.whole_files import plain, write_lines
from rome_pl.interop.case_files import easyedit_cases, kmeng01_cases
from rome_pl.metrics import EditScores
from rome_pl.reports.console_tables import score_table
from rome_pl.reports.run_results import detailed_records, run_results
from rome_pl.reports.score_tables import COUNTERFACT, MEANINGS, csv_table, interval_text, score_markdown
from rome_pl.requests.record_forms import InvalidRecord, parse_records
from tests.made_run import NASTY, made_request, made_scores, made_session


def made(number=4, **options):
    session = made_session([made_request(index) for index in range(number)], **options)
    return session, run_results(session, [])


def test_every_record_has_its_own_scores_and_whether_it_was_lost():
    session, content = made(4, rejected=(1,), lost=(2,))
    records = detailed_records(session, content["records"])
    assert [record["values"]["base"]["ES"] for record in records] == [0, 0, 0, 0]
    assert [record["values"]["immediate"]["ES"] for record in records] == [1, 0, 1, 1]
    assert [record["values"]["final"]["ES"] for record in records] == [1, 0, 0, 1]
    assert [record["lost"] for record in records] == [False, False, True, False]
    assert records[0]["values"]["base"]["locality"] == 1
    assert records[0]["values"]["final"]["locality"] == 0  # another prediction than the unedited model's
    assert all(record.items() >= given.items() for record, given in zip(records, content["records"], strict=True))


def test_without_a_final_model_nothing_can_be_lost():
    session, content = made(2, sequential=False)
    records = detailed_records(session, content["records"])
    assert [record["lost"] for record in records] == [None, None]
    assert "final" not in records[0]["values"]


def test_records_that_were_not_reached_or_are_no_requests_have_their_line_too():
    session = made_session([made_request(index) for index in range(3)], unreached=(2,))
    content = run_results(session, [InvalidRecord(7, "c0", "subject", "is empty")], interrupted=True)
    records = detailed_records(session, content["records"])
    assert [record["status"] for record in records] == ["applied", "applied", "skipped", "pending"]
    assert "values" not in records[2]  # whatever its name: it is another record than the request of that name
    assert records[3]["case_id"] == "c2"
    assert set(records[3]["values"]) == {"base", "final"}


def test_lines_are_json_whatever_they_hold(tmp_path):
    records = [{"prompt": text, "value": math.nan} for text in NASTY]
    write_lines(tmp_path / "records.jsonl", records)
    lines = (tmp_path / "records.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines if line] == [{"prompt": text, "value": None} for text in NASTY]


def test_kmeng01_s_numbers_are_negative_log_probabilities_from_which_its_scores_come():
    session, content = made(4, lost=(2,))
    cases = kmeng01_cases(session)
    assert cases[0]["requested_rewrite"] == {
        "prompt": "The lighthouse of {} stands in",
        "relation_id": "P0",
        "target_new": {"str": "Oslo"},
        "target_true": {"str": "Lima"},
        "subject": "Korrin0",
    }
    assert cases[0]["time"] == pytest.approx(0.3)  # what measures it is no part of an edit
    assert cases[0]["post"]["rewrite_prompts_probs"] == [{"target_new": 0.1, "target_true": 3.0}]
    assert [len(cases[0]["post"][f"{kind}_prompts_probs"]) for kind in ("paraphrase", "neighborhood")] == [2, 1]

    # What experiments.summarize makes of them.
    def success(when, kind, new_wins):
        shares = [
            sum(
                (probe["target_true"] > probe["target_new"]) == new_wins
                for probe in case[when][f"{kind}_prompts_probs"]
            )
            / len(case[when][f"{kind}_prompts_probs"])
            for case in cases
        ]
        return sum(shares) / len(shares)

    assert success("pre", "rewrite", True) == content["base"]["ES"]["value"] == 0
    assert success("post", "rewrite", True) == content["final"]["ES"]["value"] == 3 / 4
    assert success("post", "paraphrase", True) == content["final"]["PS"]["value"]
    assert success("post", "neighborhood", False) == content["final"]["NS"]["value"]


def test_kmeng01_s_records_can_be_read_again_by_its_own_template():
    request = made_request(0, prompt="In {braces} Korrin0 stands", relation=None)
    (case,) = kmeng01_cases(made_session([request]))
    assert case["requested_rewrite"]["prompt"].format(request.subject) == request.prompt
    assert "relation_id" not in case["requested_rewrite"]
    cases = kmeng01_cases(made_session([made_request(index) for index in range(2)]))
    requests, invalid = parse_records(
        [case | {"paraphrase_prompts": [], "neighborhood_prompts": []} for case in cases], "there"
    )
    assert not invalid
    assert [request.prompt for request in requests] == [made_request(index).prompt for index in range(2)]


def test_kmeng01_leaves_out_what_needs_a_true_answer():
    (case,) = kmeng01_cases(made_session([made_request(0, target_true=None, neighbours=())]))
    assert case["post"] == case["pre"] == {}
    assert "target_true" not in case["requested_rewrite"]


def test_easyedit_s_cases():
    session, content = made(3, lost=(2,))
    cases = easyedit_cases(session)
    assert list(cases[0]) == ["pre", "case_id", "requested_rewrite", "time", "post"]
    assert cases[0]["pre"] == {"rewrite_acc": [0], "rephrase_acc": [0, 0], "portability": {"Hop_acc": [0]}}
    assert cases[0]["post"] == {
        "rewrite_acc": [1],
        "rephrase_acc": [1, 1],
        "locality": {"Rel_acc": [0], "neighborhood_acc": [0]},
        "portability": {"Hop_acc": [1]},
    }
    asked = cases[0]["requested_rewrite"]
    assert (asked["prompt"], asked["ground_truth"]) == ("The lighthouse of Korrin0 stands in", "Lima")
    assert asked["locality"]["Rel"] == {"prompt": ["The tide comes"], "ground_truth": ["in"]}
    assert asked["locality"]["neighborhood"]["ground_truth"] == ["Lima"]
    means = [sum(case["post"]["rewrite_acc"]) for case in cases]
    assert sum(means) / 3 == content["final"]["rewrite_acc"]["value"]


def test_after_a_single_edit_post_is_right_after_it():
    session, _ = made(1, sequential=False)
    assert easyedit_cases(session)[0]["post"]["rewrite_acc"] == [1]
    assert kmeng01_cases(session)[0]["post"]["rewrite_prompts_probs"][0]["target_new"] == 0.1


def test_edits_that_were_not_measured_are_no_cases():
    session, _ = made(2)
    session.edits[0].scores.clear()
    assert [case["case_id"] for case in easyedit_cases(session)] == ["c1"]


def test_every_score_is_explained():
    assert set(MEANINGS) == set(EditScores.names)
    assert list(MEANINGS)[: len(COUNTERFACT)] == list(COUNTERFACT)


@pytest.mark.parametrize(
    ("value", "low", "high", "digits", "text"),
    [
        (0.5, 0.25, 0.75, 1, "50.0 [25.0, 75.0]"),
        (1.0, 0.51, 1.0, 0, "100.0 [51,100]"),
        (-0.0004, -0.004, 0.0, 0, "0.0 [0,0]"),
        (None, None, None, 1, ""),
    ],
)
def test_a_mean_with_its_interval(value, low, high, digits, text):
    assert interval_text({"value": value, "low": low, "high": high}, digits) == text


def test_the_table_for_papers():
    _, content = made(4, lost=(2,), rejected=(1,))
    lines = score_markdown(content).splitlines()
    assert lines[0] == "| score | unedited | just edited | final model | n |"
    entry = content["final"]["ES"]
    assert lines[2].startswith("| ES | 0.0 [0.0, 49.0] | 75.0 [")
    assert lines[2].endswith(f"| {interval_text(entry, 1)} | 4 |")
    names = [line.split("|")[1].strip() for line in lines[2:] if line.startswith("|")]
    assert names[:8] == ["ES", "EM", "PS", "PM", "NS", "NM", "S", "rewrite_acc"]  # none was touched
    assert names[-2:] == ["perplexity", "divergence"]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "4 requested, 3 applied, 1 rejected" in lines[-1]


def test_the_table_for_spreadsheets_has_what_results_have():
    _, content = made(4, lost=(2,))
    rows = list(csv.DictReader(io.StringIO(csv_table(content))))
    found = {(row["score"], row["stage"]): row for row in rows}
    for moment in ("base", "immediate", "final"):
        for score, entry in content[moment].items():
            if entry["n"]:
                row = found[score, moment]
                assert [float(row[name]) for name in ("value", "low", "high", "n")] == [
                    entry[name] for name in ("value", "low", "high", "n")
                ]
    assert float(found["perplexity", "final"]["value"]) == 25
    assert float(found["divergence", "final"]["value"]) == 0.125


def test_nan_is_told_in_both_tables():
    session, _ = made(2)
    broken = made_scores(session.requests[0], good=True, shift=math.nan)
    session.measured.final_scores["c0"] = session.edits[0].scores["final"] = broken
    content = plain(run_results(session, []))
    assert "| 2 / 2 / 1 (+ 1 NaN) |" in score_markdown(content)
    assert "ES,final,1.0," in csv_table(content)
    assert csv_table(content).split("ES,final,")[1].splitlines()[0].endswith(",1,1")


@pytest.mark.parametrize("sequential", [True, False])
def test_the_table_on_the_console_fits_80_columns(sequential):
    _, content = made(12, sequential=sequential, lost=(2,) if sequential else ())
    text = io.StringIO()
    Console(file=text, width=80).print(score_table(content))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text.getvalue()
    rows = {line.split()[0]: line for line in lines if line.strip()}
    assert "100.0 [76,100]" in rows["ES"]
    assert rows["ES"].endswith("12 ")
    order = [name for name in rows if name in MEANINGS]
    assert order == [name for name in MEANINGS if name in order]


def test_a_wide_table_keeps_its_last_column():
    """The widest cells there can be: three moments, negative margins, certain scores, five digits of n."""
    _, content = made(2)
    for moment in ("base", "immediate", "final"):
        for score in content[moment]:
            content[moment][score] = {"value": 1.0, "low": 1.0, "high": 1.0, "n": 10_000}
        content[moment]["EM"] = {"value": -0.123, "low": -0.223, "high": -0.103, "n": 10_000}
    text = io.StringIO()
    Console(file=text, width=80).print(score_table(content))
    assert "…" not in text.getvalue()
    assert text.getvalue().count("10000") == len(MEANINGS)
