"""Other places and other rights: sources that are read-only, other file systems, umasks, tokens; and very many merges."""

import gc
import os
import stat
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults.attack import Attack, failed_well, needs_root
from faults.commands import NAMES, commands
from faults.harness import content

from merge.api import Options, merge_checkpoint
from merge.methods import plan_from_method
from merge.source import resolve

TOKEN = "hf_aTokenThatNobodyShouldEverSee"
FEW_MERGES, MANY_MERGES = 40, 1000
MORE_BYTES = 16_000_000  # what a process may grow by in a thousand merges: the allocator's own ups and downs


@contextmanager
def mounted(folder: Path, *options: str):
    """A file system at a new folder, for a while."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", *options, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@needs_root
def test_sources_on_a_read_only_mount(commands_inputs, tmp_path, warm):
    """Nothing is written beside what is read: no index, no lock, no cache."""
    before = content(commands_inputs)
    with mounted(tmp_path / "inputs", "--bind", str(commands_inputs)) as inputs:
        subprocess.run(["mount", "-o", "remount,bind,ro", inputs], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (inputs / "x").touch()
        for name in NAMES:
            command = commands(inputs)[name]
            if name == "fuse":  # its config names the models, by the other path
                continue
            work = tmp_path / name / "work"
            work.mkdir(parents=True)
            command.before(work)
            ended = warm.run(command.script, command.arguments, work, XDG_CACHE_HOME=str(work / "cache"))
            assert ended.status == 0, ended.stderr
            command.check(work)
    assert content(commands_inputs) == before


@needs_root
@pytest.mark.parametrize("name", NAMES)
def test_target_on_another_file_system(name, commands_inputs, tmp_path, warm):
    """The scratch folder is beside the target, wherever that is, and temporary files are not needed anywhere else."""
    disk = ["-t", "tmpfs", "-o", "size=256m", "none"]
    attack = Attack(name, commands_inputs, tmp_path, warm)
    with (
        mounted(tmp_path / "tmp", "-t", "tmpfs", "-o", "size=4k,ro", "none") as nothing,
        mounted(tmp_path / "disk", *disk) as there,
    ):
        case = attack.begin("elsewhere", lambda work: work.symlink_to(there))
        case.environment["TMPDIR"] = str(nothing)
        ended = attack.run(case)
        assert ended.status == 0, ended.stderr
        assert attack.command.same(case.work) == attack.expected
        assert sorted(path.name for path in there.iterdir()) == attack.names


@needs_root
def test_target_is_a_mount_itself(commands_inputs, tmp_path, warm):
    """Its name cannot be given to another folder: one line, and nothing in it or beside it."""
    work = tmp_path / "case" / "work"
    work.mkdir(parents=True)
    with mounted(work / "out", "-t", "tmpfs", "-o", "size=64m", "none") as out:
        ended = warm.run("merge", commands(commands_inputs)["merge"].arguments, work)
        failed_well(ended, "a mount")
        assert "mount" in ended.stderr, ended.stderr
        assert not any(out.iterdir())
    assert [path.name for path in work.iterdir()] == ["out"]


@needs_root
def test_links_do_not_lead_to_another_file_system(commands_inputs, tmp_path, warm):
    work = tmp_path / "case" / "work"
    work.mkdir(parents=True)
    with mounted(work / "disk", "-t", "tmpfs", "-o", "size=64m", "none"):
        arguments = [
            "--model",
            commands_inputs / "model",
            "--method",
            "drop-last",
            "--layers",
            1,
            "--link",
            "--out",
            "disk/out",
        ]
        ended = warm.run("merge", arguments, work, limits={"room": True})
        if ended.status != 0:  # there was a shard to share
            failed_well(ended, "links")
            assert "without --link" in ended.stderr
            assert not any((work / "disk").iterdir())


@pytest.mark.parametrize("umask", [0o000, 0o027], ids=oct)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_follow_the_umask(name, umask, commands_inputs, tmp_path, warm):
    command = commands(commands_inputs)[name]
    work = tmp_path / "case" / "work"
    work.mkdir(parents=True)
    command.before(work)
    ended = warm.run(command.script, command.arguments, work, limits={"umask": umask}, XDG_CACHE_HOME=str(work / "cache"))
    assert ended.status == 0, ended.stderr
    paths = [path for path in work.rglob("*")]
    assert paths
    for path in paths:
        mode = stat.S_IMODE(path.stat().st_mode)
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        if path.suffix == ".db":
            wanted &= 0o644  # SQLite's own
        assert mode == wanted, f"{path.relative_to(work)}: {mode:o}, expected {wanted:o}"


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_neither_said_nor_written(name, commands_inputs, tmp_path, warm):
    command = commands(commands_inputs)[name]
    work = tmp_path / "case" / "work"
    work.mkdir(parents=True)
    command.before(work)
    secret = {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "XDG_CACHE_HOME": str(work / "cache")}
    for arguments in ([*command.arguments, "-v"], [*command.arguments, "-v", "--model", "org/is-not-there"]):
        ended = warm.run(command.script, arguments, work, **secret)
        assert TOKEN not in ended.stdout + ended.stderr
    assert all(TOKEN.encode() not in data for data in content(work).values())


def many_merges(inputs, folder, count):
    """(descriptors, threads, resident bytes) after each of `count` merges in this process, every other replacing the last."""
    source, plan, seen = resolve(str(inputs / "model")), plan_from_method("uniform", 4, 1), []
    page = os.sysconf("SC_PAGE_SIZE")
    for turn in range(count):
        merge_checkpoint(plan, source, folder / "out", Options(overwrite=True, verify=turn % 2 == 0))
        if turn % 10 == 9:
            gc.collect()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            seen.append((len(os.listdir("/proc/self/fd")), threading.active_count(), resident))
    assert [path.name for path in folder.iterdir()] == ["out"]
    return seen


def flat(seen):
    """Descriptors and threads are the first's, and memory has not grown."""
    (descriptors, threads, first), *_ = seen
    assert {one[:2] for one in seen} == {(descriptors, threads)}
    assert seen[-1][2] - first < MORE_BYTES


def test_merges_leave_nothing_open(commands_inputs, tmp_path):
    flat(many_merges(commands_inputs, tmp_path, FEW_MERGES))


@pytest.mark.slow
def test_a_thousand_merges_leave_nothing_open(commands_inputs, tmp_path):
    seen = many_merges(commands_inputs, tmp_path, MANY_MERGES)
    flat(seen)
    grown = (seen[-1][2] - seen[0][2]) / 1e6
    print(
        f"{MANY_MERGES} merges: {seen[-1][0]} descriptors and {seen[-1][1]} threads throughout, {grown:+.1f} MB since the 10th"
    )
