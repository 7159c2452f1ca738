import json

import pytest

from rome_pl.data_modules import FactDataModule, RequestDataModule
from rome_pl.requests.known_facts import facts_to_requests
from rome_pl.requests.record_forms import DataError, parse_records


def known(number, subject, attribute, relation="P1"):
    return {
        "known_id": number, "subject": subject, "attribute": attribute, "template": "{} lies in",
        "prediction": f" {attribute} and", "prompt": f"{subject} lies in", "relation_id": relation,
    }  # fmt: skip


FACTS = [
    known(3, "Korrin", "Oslo"),
    known(5, "Tarn", "Lima"),
    known(6, "Vane", "drums", "P2"),
    known(9, "Bess", "Lima"),
]


def test_known_facts_become_requests_with_another_answer_of_their_relation():
    requests, invalid = parse_records(facts_to_requests(FACTS), "known.json")
    assert invalid == []
    assert [request.case_id for request in requests] == [3, 5, 6, 9]
    assert [request.target_true for request in requests] == ["Oslo", "Lima", "drums", "Lima"]
    assert [request.relation for request in requests] == ["P1", "P1", "P2", "P1"]
    new = [request.target_new for request in requests]
    assert new[0] == "Lima"
    assert new[1] == new[3] == "Oslo"
    assert new[2] in ("Oslo", "Lima")  # nothing else has its relation


def test_the_draw_depends_on_the_seed_and_on_the_fact_alone():
    many = [known(number, f"Town {number}", f"Land {number}") for number in range(12)]
    targets = [fact["target_new"] for fact in facts_to_requests(many)]
    assert targets == [fact["target_new"] for fact in facts_to_requests(many[::-1])][::-1]
    assert targets != [fact["target_new"] for fact in facts_to_requests(many, seed=1)]
    assert all(new != fact["attribute"] for new, fact in zip(targets, many, strict=True))


def test_short_facts_without_a_new_target_get_one_and_others_keep_theirs():
    facts = [
        {"prompt": "Korrin lies in", "subject": "Korrin", "target_true": "Oslo", "paraphrases": ["Where? In"]},
        {"prompt": "Tarn lies in", "subject": "Tarn", "target_true": "Lima", "target_new": "Rome"},
    ]
    made = facts_to_requests(facts)
    assert made[0] == {**facts[0], "target_new": "Lima"}
    assert made[1] == facts[1]


def test_records_of_other_forms_stay_as_they_are():
    records = [{"requested_rewrite": {"prompt": "{} is", "subject": "x"}}, {"src": "?", "alt": "a", "subject": "s"}, 3]
    assert facts_to_requests(records) == records


def test_a_fact_alone_asks_for_a_new_target():
    requests, invalid = parse_records(
        facts_to_requests([{**FACTS[0], "target_new": None}, FACTS[0]]), "known.json", "short"
    )
    assert requests == []
    assert "target_new" in invalid[0].message


def test_the_data_module_reads_them_and_editing_does_not(tmp_path):
    path = tmp_path / "known.json"
    path.write_text(json.dumps(FACTS), encoding="utf-8")
    data = FactDataModule(str(path), limit=2)
    data.setup()
    assert [request.subject for request in data.requests] == ["Korrin", "Tarn"]
    with pytest.raises(DataError, match="unknown form"):
        RequestDataModule(str(path)).setup()


def test_known_1000_is_read_whole(data_folder):
    data = FactDataModule(str(data_folder / "known_1000.json"))
    data.setup()
    assert len(data.requests) + len(data.invalid) == 1209
    assert len(data.requests) > 1150
    assert all(request.target_new != request.target_true for request in data.requests)
