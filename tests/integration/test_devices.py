"""A stream of independent edits shared by two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SUBJECTS = ("Korrin", "Miss Vane", "The old harbour", "Tamsel", "Doctor Ilse Marrow", "Rim", "Ostrava Field")


def run(folder, devices, records, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.integration.two_devices", str(folder), str(devices), str(records), *more]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Seven requests: four batches of two, an odd share for each process; the last but one is too long to edit."""
    path = tmp_path_factory.mktemp("records") / "records.json"
    content = [
        {
            "case_id": f"r{index}",
            "prompt": f"{subject} is found in{' the land of' * (index % 3)}",
            "subject": subject,
            "target_new": "Oslo" if index != 5 else "Oslo " * 400,
            "ground_truth": "Lima",
        }
        for index, subject in enumerate(SUBJECTS)
    ]
    path.write_text(json.dumps(content))
    return path


def test_two_processes_give_what_one_gives(records, tmp_path):
    for devices in (1, 2):
        ended = run(tmp_path / str(devices), devices, records)
        assert ended.returncode == 0, ended.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("1", "2"))
    assert [record["case_id"] for record in two["records"]] == [f"r{index}" for index in range(7)]
    assert two["n_applied"] == one["n_applied"] == 6
    assert two["n_skipped"] == one["n_skipped"] == 1
    for left, right in zip(one["records"], two["records"], strict=True):
        assert left["status"] == right["status"]
        assert left["num_steps"] == right["num_steps"]
        assert left["scores"].keys() == right["scores"].keys()
        if left["status"] == "skipped":
            continue
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-9)
        for moment in ("base", "immediate"):
            assert left["scores"][moment]["rewrite"] == pytest.approx(right["scores"][moment]["rewrite"], rel=1e-9)
    assert len({record["num_steps"] for record in one["records"]}) > 2  # the processes do not keep step by chance
    for score in ("ES", "EM"):
        assert two["immediate"][score] == pytest.approx(one["immediate"][score])
    lines = [json.loads(line) for line in (tmp_path / "2" / "ledger" / "edits.jsonl").read_text().splitlines()]
    assert sorted(line["case_id"] for line in lines) == [f"r{index}" for index in range(7)]
    for line in lines:
        if "shard" in line:
            ours = load_file(tmp_path / "2" / "ledger" / "shards" / line["shard"])
            theirs = load_file(tmp_path / "1" / "ledger" / "shards" / line["shard"])
            assert (ours["layers.0.value"] - theirs["layers.0.value"]).norm() < 1e-9 * theirs["layers.0.value"].norm()


def test_a_sequential_stream_on_two_devices_is_refused(records, tmp_path):
    ended = run(tmp_path / "run", 2, records, "sequential")
    assert ended.returncode != 0
    assert "2 devices cannot share a sequential stream" in ended.stderr
