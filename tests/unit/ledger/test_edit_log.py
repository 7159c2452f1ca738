import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rome_pl.ledger.edit_log import Ledger
from rome_pl.write.closed_form import Assertion, Update
from rome_pl.write.edited_layers import EditWrite
from rome_pl.write.edited_weight import LayerWrite


@pytest.fixture
def written():
    key, value = torch.ones(1, 4, dtype=torch.float64), torch.full((1, 3), 2.0, dtype=torch.float64)
    return EditWrite(("a",), {4: LayerWrite(("a",), Assertion(key, key, value), Update(value, key), (1.0,))})


def test_a_record_and_its_tensors_come_back(tmp_path, written):
    ledger = Ledger(tmp_path / "ledger")
    ledger.append({"index": 0, "case_id": "a", "status": "applied"}, written)
    ledger.append({"index": 1, "case_id": "ü", "status": "rejected"})
    lines = [
        json.loads(line) for line in (tmp_path / "ledger" / "edits.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    sha256 = hashlib.sha256((tmp_path / "ledger" / "shards" / "000000.safetensors").read_bytes()).hexdigest()
    assert [{name: value for name, value in line.items() if name != "check"} for line in lines] == [
        {"index": 0, "case_id": "a", "status": "applied", "shard": "000000.safetensors", "shard_sha256": sha256},
        {"index": 1, "case_id": "ü", "status": "rejected"},
    ]
    tensors = load_file(tmp_path / "ledger" / "shards" / "000000.safetensors")
    assert set(tensors) == {f"layers.0.{name}" for name in ("key_shape", "key_at", "value", "left", "right", "ridge")}
    assert torch.equal(tensors["layers.0.value"], written.assertions[0].value)


def test_a_record_whose_tensors_fail_is_absent(tmp_path, written, monkeypatch):
    ledger = Ledger(tmp_path / "ledger")

    def disk_full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("rome_pl.ledger.edit_log.save_file", disk_full)
    with pytest.raises(OSError, match="disk full"):
        ledger.append({"index": 0, "status": "applied"}, written)
    assert not (tmp_path / "ledger" / "edits.jsonl").exists()
    assert list((tmp_path / "ledger" / "shards").glob("*.safetensors")) == []


def test_records_of_a_joint_write_name_each_other(tmp_path, written):
    for folder, joint in (("joint", True), ("apart", False)):
        ledger = Ledger(tmp_path / folder)
        ledger.append_batch([({"index": 3}, written), ({"index": 4}, None), ({"index": 5}, written)], joint)
        lines = [json.loads(line) for line in (tmp_path / folder / "edits.jsonl").read_text("utf-8").splitlines()]
        assert [line["index"] for line in lines] == [3, 4, 5]
        assert [line.get("joint") for line in lines] == ([[3, 5], None, [3, 5]] if joint else [None] * 3)


def test_a_batch_is_on_record_whole_or_not_at_all(tmp_path, written, monkeypatch):
    ledger, calls = Ledger(tmp_path / "ledger"), []

    def disk_full_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("disk full")
        save_file(*arguments)

    monkeypatch.setattr("rome_pl.ledger.edit_log.save_file", disk_full_at_the_second)
    with pytest.raises(OSError, match="disk full"):
        ledger.append_batch([({"index": 0}, written), ({"index": 1}, written)])
    assert not (tmp_path / "ledger" / "edits.jsonl").exists()
