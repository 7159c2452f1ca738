import errno
import os
import stat
from pathlib import Path

import pytest

from rome_pl.errors import OptionError
from rome_pl.files.whole_files import check_free, whole_file, whole_folder
from rome_pl.utils.hashing import content_key

OLD = b"what was there before"


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "result.bin"
    path.write_bytes(OLD)
    return path


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def write(path, then=lambda: None):
    with whole_file(path) as work:
        work.write_bytes(b"new")
        then()


def raised(error):
    raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_nothing_else_stays(tmp_path):
    path = tmp_path / "new" / "folder" / "result.bin"
    with whole_file(path) as work:
        work.write_bytes(b"new")
        assert not path.exists()
        assert work.parent == path.parent  # a rename from elsewhere might have to copy
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["result.bin"]


def test_an_older_file_stays_until_the_new_one_is_complete(target):
    with whole_file(target) as work:
        work.write_bytes(b"new")
        assert target.read_bytes() == OLD
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_older_file_and_no_other(error, target):
    with pytest.raises(error, match="half way"):
        write(target, lambda: raised(error("half way")))
    assert target.read_bytes() == OLD
    assert names(target.parent) == ["result.bin"]


@pytest.mark.parametrize(("owner", "function"), [(os, "fsync"), (Path, "replace"), (Path, "chmod")])
def test_a_full_disk_leaves_the_older_file_and_is_named(owner, function, target, monkeypatch):
    monkeypatch.setattr(owner, function, disk_full)
    with pytest.raises(OSError, match=r"No space left.*nothing was changed.*result\.bin") as caught:
        write(target)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(target)
    assert target.read_bytes() == OLD
    assert names(target.parent) == ["result.bin"]


def test_a_write_that_fails_is_named_by_the_file_it_was_meant_for(target):
    with pytest.raises(OSError, match=r"nothing was changed.*result\.bin'$"):
        write(target, disk_full)
    assert target.read_bytes() == OLD
    assert names(target.parent) == ["result.bin"]


def test_the_content_is_synced_before_it_gets_its_name(target, monkeypatch):
    seen = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (seen.append((target.read_bytes(), os.fstat(handle).st_size)), sync(handle))
    )
    with whole_file(target) as work:
        work.write_bytes(b"new!")
    assert seen[0] == (OLD, 4)
    assert [content for content, _ in seen[1:]] == [b"new!"]  # then the folder, so that the name outlives a power cut


@pytest.mark.skipif(os.name == "nt", reason="no such permissions there")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_follow_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        with whole_file(tmp_path / "file") as work:
            work.write_bytes(b"")
        assert os.umask(mask) == mask  # left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_a_key_depends_on_every_part_and_on_nothing_else():
    parts = ["weights", 3, [1, 2.5], None, {"a": True}]
    changed = [
        ["Weights", 3, [1, 2.5], None, {"a": True}],
        ["weights", 4, [1, 2.5], None, {"a": True}],
        ["weights", 3, [1, 2.25], None, {"a": True}],
        ["weights", 3, [1, 2.5], 0, {"a": True}],
        ["weights", 3, [1, 2.5], None, {"a": False}],
        ["weights", 3, 1, 2.5, None, {"a": True}],
        ["weights3", [1, 2.5], None, {"a": True}],
        parts[:-1],
    ]
    keys = {content_key(*some) for some in [parts, *changed]}
    assert len(keys) == 1 + len(changed)
    assert content_key(*parts) == content_key("weights", 3, [1, 2.5], None, {"a": True})
    assert content_key("a", "b") == "3554d2b8a1e34099"  # in every process and version: caches are found by it


# ---- folders


def fill(path, then=lambda: None):
    with whole_folder(path) as work:
        (work / "deep").mkdir()
        (work / "deep" / "file").write_bytes(b"new")
        then()


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_written_and_nothing_else_stays(there, tmp_path):
    path = tmp_path / "above" / "result"
    if there:
        path.mkdir(parents=True)
    old = os.umask(0o027)
    try:
        fill(path)
    finally:
        os.umask(old)
    assert (path / "deep" / "file").read_bytes() == b"new"
    assert names(path.parent) == ["result"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_part_of_a_folder(error, tmp_path):
    with pytest.raises(error, match="half way"):
        fill(tmp_path / "result", lambda: raised(error("half way")))
    assert names(tmp_path) == []


def test_a_folder_that_has_filled_meanwhile_is_left_alone(tmp_path):
    path = tmp_path / "result"
    path.mkdir()
    with pytest.raises(OSError, match=r"nothing was written.*result"):
        fill(path, lambda: (path / "other").write_bytes(OLD))
    assert names(tmp_path) == ["result"]
    assert names(path) == ["other"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users and their rights")
def test_where_nothing_may_be_written_a_folder_is_named(tmp_path):
    above = tmp_path / "locked"
    above.mkdir()
    above.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:  # who may write everywhere
            tmp_path.chmod(0o755)
            os.seteuid(65534)
        with pytest.raises(OSError, match=r"Permission denied \(nothing was written\)"):
            fill(above / "result")
    finally:
        os.seteuid(user)
    assert names(above) == []


def test_only_a_free_folder_will_do(tmp_path):
    check_free(tmp_path / "new", "output")
    check_free(tmp_path, "output")
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(OptionError, match=r"output: .* is not empty; choose another folder"):
        check_free(tmp_path, "output")
    with pytest.raises(OptionError, match=r"output: .*file is a file; give a folder"):
        check_free(tmp_path / "file", "output")
