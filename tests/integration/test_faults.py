"""Faults thrown at a run: after room is made, the same command ends bit for bit as if nothing had happened."""

import os
import random
import shutil
import socket
from pathlib import Path

import pytest

from rome_pl.cli.app import main
from tests.fault_runs import (
    assert_as_undisturbed,
    at_event,
    command,
    contents,
    counting,
    killed,
    prepared,
    run_child,
    small_disk,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")

KILLS, DISKS = 16, 10


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with model and records, a whole run in ``whole``, and how many events of work with files it took."""
    folder = tmp_path_factory.mktemp("faults")
    arguments = prepared(folder)
    place = folder / "work" / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROME_PL_CACHE", str(folder / "cache"))
        assert main([*arguments, "--trainer.default_root_dir", str(folder / "first")]) == 0  # imports what runs need
    assert run_child(command(arguments, place), folder, counting(folder / "events"), folder / "told") == 0
    return folder, arguments, place, (folder / "events").stat().st_size


def recover(arguments, folder, place, whole):
    assert run_child(command(arguments, place), folder, out=folder / "told") == 0
    assert_as_undisturbed(place, whole)


def moments(count):
    """Moments of a run, as shares of its events: half of them in the last quarter, when it reports and saves."""
    chance = random.Random(17)
    return [chance.uniform(0, 0.75) for _ in range(count // 2)] + [
        1 - 0.25 * (place + chance.random()) / (count - count // 2) for place in range(count - count // 2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("place", range(KILLS))
def test_a_killed_run_ends_as_if_it_had_not_been(place, undisturbed):
    folder, arguments, whole, events = undisturbed
    work = folder / "work" / f"killed{place}"
    number = min(int(moments(KILLS)[place] * events), events - 2)
    assert run_child(command(arguments, work), folder, at_event(number, killed)) == -9
    recover(arguments, folder, work, whole)
    if place % 4 == 0:  # a second time nothing is left to do
        before = contents(work)
        recover(arguments, folder, work, whole)
        assert contents(work) == before


@pytest.mark.slow
@pytest.mark.parametrize("place", range(DISKS))
def test_a_full_disk_costs_nothing_once_there_is_room(place, undisturbed):
    folder, arguments, whole, _ = undisturbed
    needed = sum(len(content) for content in contents(whole).values())
    work = folder / "work" / f"full{place}"
    with small_disk(work, int(needed * (place + 0.5) / DISKS)) as change:
        assert run_child(command(arguments, work), folder, out=folder / "told") != 0
        assert not (work / "saved").exists() or contents(work / "saved") == contents(whole / "saved")
        assert change("size=1g")
        recover(arguments, folder, work, whole)


BLOCKED = {
    "file where the model's folder goes": (lambda work: work / "saved", b"in the way"),
    "file where the run's folder goes": (lambda work: work / "run", b"in the way"),
    "folder where the page goes": (lambda work: work / "run" / "report.html", None),
    "folder where the results go": (lambda work: work / "run" / "results.json", None),
    "file where the shards go": (lambda work: work / "run" / "ledger" / "shards", b"in the way"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKED)
def test_what_is_in_the_way_costs_nothing_once_it_is_gone(name, undisturbed):
    folder, arguments, whole, _ = undisturbed
    work = folder / "work" / name
    where, content = BLOCKED[name]
    path = where(work)
    path.parent.mkdir(parents=True)
    if content is None:
        path.mkdir()
        (path / "something").write_bytes(b"of somebody")
    else:
        path.write_bytes(content)
    assert run_child(command(arguments, work), folder, out=folder / "told") in (0, 2)
    assert not (work / "saved").is_dir() or contents(work / "saved") == contents(whole / "saved")
    if content is None:
        shutil.rmtree(path)
    else:
        assert path.read_bytes() == content
        path.unlink()
    recover(arguments, folder, work, whole)


@pytest.mark.slow
def test_a_read_only_disk_costs_nothing_once_it_can_be_written(undisturbed):
    folder, arguments, whole, _ = undisturbed
    work = folder / "work" / "readonly"
    with small_disk(work, "1g") as change:
        assert change("ro")
        assert run_child(command(arguments, work), folder, out=folder / "told") == 2
        assert change("rw")
        recover(arguments, folder, work, whole)


def link(path, outside):
    outside.write_bytes(b"of somebody else\n")
    path.symlink_to(outside)


def folder_link(path, outside):
    outside.mkdir()
    (outside / "thesis").write_bytes(b"of somebody else\n")
    path.symlink_to(outside)


def pipe(path, outside):
    os.mkfifo(path)


def channel(path, outside):
    before = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


HOSTILE = [
    ("ledger/edits.jsonl", link), ("config.yaml", link), ("ledger/.lock", link), ("tensorboard", folder_link),
    ("ledger/shards", folder_link), ("manifest.json", pipe), ("ledger/edits.jsonl", pipe), ("results.json", channel),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), HOSTILE)
def test_a_link_or_pipe_in_the_folder_is_refused_and_nothing_is_touched(name, kind, undisturbed):
    folder, arguments, whole, _ = undisturbed
    work = folder / "work" / f"{kind.__name__} {name.replace('/', ' ')}"
    shutil.copytree(whole / "run", work / "run")
    lines = (work / "run" / "ledger" / "edits.jsonl").read_bytes().splitlines(keepends=True)
    (work / "run" / "ledger" / "edits.jsonl").write_bytes(b"".join(lines[:2]))
    (work / "run" / "results.json").unlink()
    path, outside = work / "run" / name, work / "outside"
    kept = work / "kept"
    if path.exists():
        path.rename(kept)
    kind(path, outside)
    before = contents(work)
    told = folder / f"told {work.name}"
    assert run_child(command(arguments, work), folder, out=told) == 2
    assert f"run/{name}: a " in told.read_text("utf-8")
    assert contents(work) == before
    path.unlink()
    if kept.exists():
        kept.rename(path)
    if outside.is_dir():
        shutil.rmtree(outside)
    outside.unlink(missing_ok=True)
    recover(arguments, folder, work, whole)
