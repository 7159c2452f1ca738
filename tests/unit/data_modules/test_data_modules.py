import json

import datasets
import pytest
import torch

from rome_pl.data_modules import CounterFactDataModule, RequestDataModule
from rome_pl.requests.record_forms import DataError

SHORT = [{"prompt": f"Rome {i} is in", "subject": f"Rome {i}", "target_new": "Peru"} for i in range(5)]
COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} is in", "relation_id": "P17", "subject": "Rome",
        "target_new": {"str": "Peru"}, "target_true": {"str": "Italy"},
    },
    "paraphrase_prompts": ["Where is Rome? In"],
    "neighborhood_prompts": ["Milan is in"],
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(SHORT), encoding="utf-8")
    return path


def test_requests_stream_in_order_one_per_batch_without_the_global_generator(path):
    data = RequestDataModule(str(path))
    data.setup()
    state = torch.get_rng_state()
    assert [[request.case_id for request in batch] for batch in data.train_dataloader()] == [[0], [1], [2], [3], [4]]
    assert torch.equal(torch.get_rng_state(), state)


def test_limit_counts_records_from_the_first_on(path):
    data = RequestDataModule(str(path), limit=2)
    data.setup()
    data.setup()  # a second call changes nothing
    assert [request.subject for request in data.requests] == ["Rome 0", "Rome 1"]
    with pytest.raises(ValueError, match="limit"):
        RequestDataModule(str(path), limit=0)


def test_the_samples_are_shipped_and_valid():
    data = RequestDataModule()
    data.setup()
    assert len(data.requests) >= 60
    assert data.invalid == []
    assert len({request.subject for request in data.requests}) == len(data.requests)
    assert all(len(request.paraphrases) == 2 and len(request.neighbours) == 10 for request in data.requests)


def test_counterfact_refuses_other_forms(path):
    with pytest.raises(DataError, match="requested_rewrite"):
        CounterFactDataModule(str(path)).setup()


def test_hub_data_sets_go_through_datasets_by_name(monkeypatch):
    calls = []

    def load_dataset(name, split, streaming):
        calls.append((name, split, streaming))
        return datasets.Dataset.from_list([COUNTERFACT, {**COUNTERFACT, "case_id": 8}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = CounterFactDataModule(limit=1, split="test")
    data.setup()
    assert calls == [("azhx/counterfact", "test", True)]
    assert [(r.case_id, r.prompt, r.target_true) for r in data.requests] == [(7, "Rome is in", "Italy")]


def test_a_name_that_neither_disk_nor_hub_knows_is_refused():
    with pytest.raises(DataError, match="'nobody/nothing': no such file, and no hub data set"):
        RequestDataModule("nobody/nothing").setup()


def test_invalid_records_stop_the_run_if_so_configured(tmp_path):
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps([SHORT[0], {**SHORT[1], "subject": "Oslo"}]), encoding="utf-8")
    data = RequestDataModule(str(path))
    data.setup()
    assert (len(data.requests), len(data.invalid)) == (1, 1)
    with pytest.raises(DataError, match="'Oslo' does not occur in the prompt"):
        RequestDataModule(str(path), on_error="stop").setup()


def test_a_file_without_one_valid_record_is_refused(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([{**SHORT[1], "subject": "Oslo"}]), encoding="utf-8")
    with pytest.raises(DataError, match="record 0, field 'subject'"):
        RequestDataModule(str(path)).setup()
