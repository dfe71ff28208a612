"""Folders appear whole or not at all."""

import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny import ROOT

from merge import publish
from merge.errors import OutputError
from merge.publish import build_once, check_can_appear, in_turn, new_folder, whole_file, work_folder


def build(target, text="new", **options):
    with new_folder(target, **options) as scratch:
        (scratch / "file").write_text(text)
        (scratch / "plan.json").write_text("{}")
        assert not (target / "file").exists() or (target / "file").read_text() != text


def names(folder):
    return sorted(os.listdir(folder))


def test_appears_whole(tmp_path):
    build(tmp_path / "a" / "b")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "new"


def test_nothing_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "b") as scratch:
        raise ZeroDivisionError((scratch / "file").write_text("x"))
    assert names(tmp_path) == []


def test_parents_that_were_there_stay(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert names(tmp_path) == ["a"]


def test_an_empty_folder_is_a_free_name(tmp_path):
    (tmp_path / "out").mkdir()
    build(tmp_path / "out")
    assert names(tmp_path / "out") == ["file", "plan.json"]


@pytest.mark.parametrize("system_call", [True, False])
def test_overwrite_exchanges(system_call, tmp_path, monkeypatch):
    if not system_call:
        monkeypatch.setattr(publish.ctypes, "CDLL", lambda *arguments, **options: object())
    build(tmp_path / "out", "old")
    (tmp_path / "out" / "stale").write_text("x")
    build(tmp_path / "out", "new", overwrite=True, marker="plan.json")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file", "plan.json"]


def test_overwrite_that_fails_keeps_the_old(tmp_path):
    build(tmp_path / "out", "old")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out", overwrite=True, marker="plan.json"):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_overwrite_takes_only_its_own(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(OutputError, match=r"holds no plan\.json"):
        build(tmp_path / "out", overwrite=True, marker="plan.json")
    assert names(tmp_path / "out") == ["precious"]


def test_name_taken_meanwhile(tmp_path):
    """Somebody else writes the target while we build: theirs stays, ours goes."""
    context = new_folder(tmp_path / "out")
    context.__enter__()
    build(tmp_path / "out", "theirs")
    with pytest.raises(OutputError, match="not empty"):
        context.__exit__(None, None, None)
    assert (tmp_path / "out" / "file").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_name_taken_at_the_last_moment(tmp_path, monkeypatch):
    """Also after the last look: without --overwrite nothing is ever exchanged."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    monkeypatch.setattr(publish, "check_target", lambda *arguments, **options: None)
    with pytest.raises(OutputError, match="somebody else wrote it"):
        build(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["precious"]


def test_scratch_of_the_living_is_left_alone(tmp_path):
    with new_folder(tmp_path / "one") as first:
        for _ in range(2):
            assert publish.remove_dead_scratch(tmp_path / "one") == []
        assert first.is_dir()
    assert names(tmp_path) == ["one"]


def test_scratch_of_the_dead_is_removed(tmp_path):
    code = (
        "import os, pathlib, sys; from merge.publish import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as scratch:\n"
        "    (scratch / 'file').write_text('half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "o*t")], cwd=ROOT)
    assert len(names(tmp_path)) == 1
    build(tmp_path / "other")
    assert len(names(tmp_path)) == 2  # another target's scratch is not ours to remove
    build(tmp_path / "o*t")
    assert names(tmp_path) == ["o*t", "other"]


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        build(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "out" / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_modes_of_files_follow_the_umask(umask, tmp_path):
    """Whatever a killed run has left under the scratch name."""
    stale = tmp_path / "weights.safetensors.partial"
    stale.write_text("x")
    stale.chmod(0o640)
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "weights.safetensors") as scratch:
            save_file({"w": torch.zeros(2)}, scratch)
    finally:
        os.umask(before)
    assert names(tmp_path) == ["weights.safetensors"]
    assert stat.S_IMODE((tmp_path / "weights.safetensors").stat().st_mode) == 0o666 & ~umask


def test_failing_flush_is_an_error(tmp_path, monkeypatch):
    def fails(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(publish.os, "fsync", fails)
    with pytest.raises(OutputError, match="cannot be written: Input/output error"):
        build(tmp_path / "out")
    assert names(tmp_path) == []


def test_parent_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be created"):
        build(tmp_path / "file" / "out")


def test_a_file_is_whole_also_where_there_are_no_modes(tmp_path, monkeypatch):
    def refuses(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(publish.Path, "chmod", refuses)
    with whole_file(tmp_path / "w") as scratch:
        save_file({"w": torch.zeros(2)}, scratch)
    assert names(tmp_path) == ["w"]
    with pytest.raises(OutputError, match="nothing cannot be written: No such file"), whole_file(tmp_path / "nothing"):
        pass
    assert names(tmp_path) == ["w"]


def test_where_nothing_can_be_locked(tmp_path, monkeypatch):
    def refuses(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(publish.fcntl, "flock", refuses)
    for context in (work_folder(tmp_path / "a" / "run"), in_turn(tmp_path)):
        with pytest.raises(OutputError, match="cannot be locked: Operation not supported; give --out on another disk"), context:
            pass
    assert names(tmp_path) == []


def test_files_that_several_write_are_written_in_turn(tmp_path):
    """Several processes that write one file at the same time, again and again: all succeed, and it is always whole."""
    code = (
        "import sys; from pathlib import Path; from merge.publish import in_turn, write_whole\n"
        "folder = Path(sys.argv[1])\n"
        "for number in range(100):\n"
        "    with in_turn(folder):\n"
        "        write_whole(folder / 'report', sys.argv[2] * 10_000)\n"
        "    text = (folder / 'report').read_text()\n"
        "    assert len(text) == 10_000 and len(set(text)) == 1, (len(text), set(text))\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), letter], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for letter in "ab"
    ]
    for run in runs:
        assert (run.communicate(timeout=120)[1], run.returncode) == ("", 0)


def test_a_folder_is_built_once(tmp_path):
    """Also if another process is faster: what it built is taken."""

    def build_slowly(scratch):
        build(tmp_path / "out", "other")
        (scratch / "file").write_text("own")

    build_once(tmp_path / "out", build_slowly)
    assert (tmp_path / "out" / "file").read_text() == "other"
    build_once(tmp_path / "out", None)  # it is there
    assert names(tmp_path) == ["out"]

    def fails(scratch):
        raise OutputError("no")

    with pytest.raises(OutputError, match="no"):
        build_once(tmp_path / "another", fails)
    assert names(tmp_path) == ["out"]


def test_what_cannot_appear_is_known_before(tmp_path, monkeypatch):
    check_can_appear(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    build(tmp_path / "out")
    with pytest.raises(OutputError, match="not empty"):
        check_can_appear(tmp_path / "out")
    check_can_appear(tmp_path / "out", overwrite=True, marker="plan.json")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "new"

    def fails(path, *arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(publish.Path, "mkdir", fails)
    with pytest.raises(OutputError, match="other cannot be created: Read-only file system"):
        check_can_appear(tmp_path / "other")


def test_parents_that_another_run_removes(tmp_path, monkeypatch):
    """It made them, and failed, while this one had not yet made anything in them."""
    found = publish.remove_dead_scratch

    def removed_meanwhile(target):
        target.parent.rmdir()
        return found(target)

    monkeypatch.setattr(publish, "remove_dead_scratch", removed_meanwhile)
    build(tmp_path / "a" / "out")
    assert names(tmp_path / "a") == ["out"]


@pytest.mark.parametrize("when", ["before the lock", "under a lock of its own"])
def test_a_run_that_starts_beside_this_one_takes_no_folder_from_it(when, tmp_path, monkeypatch):
    """A new scratch folder that is not locked yet looks like a dead run's; whoever lost it makes another."""
    real, met = publish.fcntl.flock, []

    def flock(descriptor, how):
        if not met:
            met.append(descriptor)
            (scratch,) = tmp_path.iterdir()
            if when == "before the lock":
                scratch.rmdir()
            else:
                scratch.rmdir()
                raise BlockingIOError
        real(descriptor, how)

    monkeypatch.setattr(publish.fcntl, "flock", flock)
    build(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert met


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(publish.os, "fsync", lambda file: synced.append(((tmp_path / "a").exists(), os.fstat(file).st_size)))
    publish.write_whole(tmp_path / "a", "text")
    assert synced == [(False, 4)]


def test_a_file_that_cannot_be_flushed_does_not_appear(tmp_path, monkeypatch):
    def fsync(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(publish.os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        publish.write_whole(tmp_path / "a", "text")
    assert names(tmp_path) == []


def test_a_run_that_is_refused_removes_nothing(tmp_path):
    """A second run of the same name comes while the first has written nothing yet."""
    with work_folder(tmp_path / "a" / "run"):
        with pytest.raises(OutputError, match="in use by another run"), work_folder(tmp_path / "a" / "run"):
            pass
        (tmp_path / "a" / "run" / "file").write_text("x")
    assert names(tmp_path / "a" / "run") == ["file"]


def test_a_folder_to_work_in_vanishes_where_it_stays_empty(tmp_path):
    with work_folder(tmp_path / "a" / "run"):
        pass
    assert names(tmp_path) == []
