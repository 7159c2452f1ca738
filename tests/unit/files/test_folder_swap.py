"""Folders that are put in their places whole, and what killed runs leave."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rome_pl.errors import OptionError
from rome_pl.files import folder_swap
from rome_pl.files.folder_swap import clear_leftovers, filled_inside, temporary_folder
from rome_pl.files.whole_files import check_own, check_place, local_path, open_own, whole_file, whole_folder

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs locks of folders")


def everything(name):
    return True


def filled(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_replaced_whole(at_once, tmp_path, monkeypatch):
    if not at_once:
        monkeypatch.setattr(folder_swap, "_exchanged", lambda *_: False)
    path = filled(tmp_path / "result", one=b"old", two=b"old")
    with whole_folder(path, everything) as work:
        filled(work, one=b"new")
        assert contents(path) == {"one": b"old", "two": b"old"}
    assert contents(path) == {"one": b"new"}
    assert names(tmp_path) == ["result"]


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    path = filled(tmp_path / "result", one=b"old")
    monkeypatch.setattr(folder_swap, "_exchanged", lambda *_: False)
    rename = type(path).rename

    def fail(self, target):
        if "rome-pl" in self.name and "old" not in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", fail)
    with pytest.raises(OSError, match="nothing was written"), whole_folder(path, everything) as work:
        filled(work, one=b"new")
    assert contents(path) == {"one": b"old"}
    assert names(tmp_path) == ["result"]


KILLED = """
import os, signal, sys
from pathlib import Path
from rome_pl.files import folder_swap
from rome_pl.files.whole_files import whole_folder
path, moment = Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if moment != "filling":
    folder_swap._exchanged = lambda *_: False
with whole_folder(path, lambda name: True) as work:
    (work / "one").write_bytes(b"new")
    if moment == "filling":
        die()
    rename = Path.rename
    def counted(self, target):
        rename(self, target)
        if (self == path) == (moment == "between"):
            die()
    Path.rename = counted
"""


@linux
@pytest.mark.parametrize(("moment", "kept"), [("filling", b"old"), ("between", b"old"), ("after", b"new")])
def test_what_a_killed_run_leaves_goes_with_the_next(moment, kept, tmp_path):
    path = filled(tmp_path / "result", one=b"old")
    mine = filled(tmp_path / ".result.abcdefgh.tmp", one=b"of somebody")
    assert subprocess.run([sys.executable, "-c", KILLED, str(path), moment], check=False).returncode == -9
    assert len(names(tmp_path)) >= 2
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [mine.name, "result"]
    assert contents(path) == {"one": kept}


@linux
def test_the_folder_of_a_run_that_lives_stays(tmp_path):
    with temporary_folder(tmp_path / "result", tmp_path) as work:
        clear_leftovers(tmp_path)
        assert work.is_dir()
        (tmp_path / ".result.abcdefgh.rome-pl").symlink_to(tmp_path)  # nobody's folder is removed through a link
        clear_leftovers(tmp_path)
        assert os.path.lexists(tmp_path / ".result.abcdefgh.rome-pl")
    assert not work.exists()


@pytest.mark.parametrize("why", ["mount point", "working folder"])
def test_what_cannot_be_renamed_is_filled(why, tmp_path, monkeypatch):
    path = filled(tmp_path / "result")
    if why == "working folder":
        monkeypatch.chdir(path)
    else:
        monkeypatch.setattr(type(path), "is_mount", lambda self: self == path)
    assert filled_inside(path)
    check_place(path, "save_model")
    seen = []
    replace = type(path).replace

    def noted(self, target):
        seen.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(type(path), "replace", noted)
    with whole_folder(path, everything) as work:
        filled(work, **{"config.json": b"{}", "a": b"1", "z": b"2"})
        assert work.parent == path
    assert seen[-1] == "config.json"  # without it there is no model
    assert contents(path) == {"config.json": b"{}", "a": b"1", "z": b"2"}
    with pytest.raises(OptionError, match="holds a model, and cannot be replaced as a whole"):
        check_place(path, "save_model")


def test_a_place_that_cannot_be_written_is_found_before(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OptionError, match=r"save_model: .*file/deep/model cannot be written: Not a directory"):
        check_place(tmp_path / "file" / "deep" / "model", "save_model")
    if Path("/proc").is_dir():
        with pytest.raises(OptionError, match=r"save_model: /proc/edited cannot be written: .* in /proc"):
            check_place(local_path("/proc/edited"), "save_model")
    with pytest.raises(OptionError, match="cannot be written"):  # a name too long for what is beside it
        check_place(tmp_path / ("x" * 250), "save_model")
    check_place(tmp_path / "new" / "model", "save_model")
    assert names(tmp_path) == ["file"]


def test_the_folder_is_synced_after_the_rename(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        "rome_pl.files.whole_files.sync_folder", lambda folder: synced.append((folder, names(tmp_path)))
    )
    with whole_file(tmp_path / "file") as work:
        work.write_bytes(b"")
    assert synced == [(tmp_path, ["file"])]
    with whole_folder(tmp_path / "folder") as work:
        filled(work, one=b"")
    assert synced[-1] == (tmp_path, ["file", "folder"])


def test_no_link_or_pipe_is_opened(tmp_path):
    (tmp_path / "outside").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, told in (("link", "a link"), ("dangling", "a link"), ("pipe", "a pipe")):
        with pytest.raises(OptionError, match=told):
            open_own(tmp_path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for name in ("outside", "new", "."):
        check_own(tmp_path / name)
    with open_own(tmp_path / "new", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as file:
        file.write(b"x")
    assert (tmp_path / "new").read_bytes() == b"x"
    assert (tmp_path / "outside").read_bytes() == b"mine"
    assert not (tmp_path / "nowhere").exists()


def test_home_is_found_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert local_path("~/a") == tmp_path / "a"
    assert str(local_path("~nobody-at-all/a")) == "~nobody-at-all/a"
    assert str(local_path("a/~/b")) == "a/~/b"
