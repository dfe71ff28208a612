"""Disks that fail or fill up: every write, flush and rename of every writing command in turn, files that may not grow, and a
small file system. `pytest -m slow tests/faults/test_disk.py` has every call; `make test` a sample.
"""

import errno
import random
import shutil
import subprocess
import time
from contextlib import contextmanager

import pytest
from faults.attack import Attack, counted, failed_well, needs_root
from faults.commands import NAMES
from faults.sabotage import KINDS, SHORT

FEW = {"write": 4, "fsync": 2, "rename": 2}
FEW_LIMITS, MANY_LIMITS = 3, 60
ROOM, PAGE, SAID = "size=256m", 4096, 1024
ERRORS = {"write": (errno.EIO, errno.ENOSPC), "fsync": (errno.EIO, errno.ENOSPC), "rename": (errno.EIO, errno.ENOSPC)}


def calls(attack, kind):
    """How many calls of a kind the command makes."""
    case = attack.begin(f"count-{kind}")
    ended = attack.run(case, limits={"sabotage": {"kind": kind}, "room": True})
    assert ended.status == 0, ended.stderr
    assert attack.command.same(case.work) == attack.expected
    count = counted(case)
    attack.end(case)
    return count


def fail_each(attack, kind, turns):
    """Has call number n fail for every n given; returns how often the command ended by it."""
    failed = 0
    for number, nth in enumerate(turns):
        case = attack.begin(f"{kind}-{nth}")
        error = ERRORS[kind][number % 2]
        ended = attack.run(case, limits={"sabotage": {"kind": kind, "nth": nth, "error": error}, "room": True})
        what = f"{kind} {nth} ({errno.errorcode[error]})"
        if ended.status != 0:
            failed += 1
            failed_well(ended, what)
        attack.goes_on(case, ended, what)
        attack.end(case)
    return failed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_some_calls_fail(name, kind, commands_inputs, tmp_path, warm):
    attack = Attack(name, commands_inputs, tmp_path, warm)
    count = calls(attack, kind)
    assert count
    turns = random.Random(name + kind).sample(range(1, count + 1), min(count, FEW[kind]))
    assert fail_each(attack, kind, turns)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_call_fails_once(name, kind, commands_inputs, tmp_path, warm):
    attack = Attack(name, commands_inputs, tmp_path, warm)
    count = calls(attack, kind)
    failed = fail_each(attack, kind, range(1, count + 1))
    print(f"{name}: {count} calls of {kind}, {failed} ended the run")


@pytest.mark.parametrize("name", NAMES)
def test_short_writes_change_nothing(name, commands_inputs, tmp_path, warm):
    """Every write takes a third of what it is given."""
    attack = Attack(name, commands_inputs, tmp_path, warm)
    assert calls(attack, SHORT) >= 2 * calls(attack, "write")


def grow_to(attack, sizes):
    """Files may not grow beyond a size; returns how often the command ended by it."""
    failed = 0
    for size in sizes:
        case = attack.begin(f"size-{size}")
        ended = attack.run(case, limits={"file_size": size, "room": True})
        if ended.status != 0:
            failed += 1
            failed_well(ended, f"files of {size} bytes")
        attack.goes_on(case, ended, f"files of {size} bytes")
        attack.end(case)
    return failed


def sizes_of(attack, count):
    """Random sizes up to the largest file's; what is said on stdout and stderr, which are files here, has room."""
    largest = max(path.stat().st_size for path in attack.case.work.rglob("*") if path.is_file())
    rng = random.Random(attack.name)
    return sorted({rng.randrange(SAID, max(largest, 2 * SAID)) for _ in range(count)})


@pytest.mark.parametrize("name", NAMES)
def test_files_may_not_grow(name, commands_inputs, tmp_path, warm):
    """What is written in other languages too: SQLite, safetensors, Arrow."""
    attack = Attack(name, commands_inputs, tmp_path, warm)
    assert grow_to(attack, sizes_of(attack, FEW_LIMITS))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_files_may_not_grow_beyond_many_sizes(name, commands_inputs, tmp_path, warm):
    attack = Attack(name, commands_inputs, tmp_path, warm)
    sizes = sizes_of(attack, MANY_LIMITS)
    print(f"{name}: {len(sizes)} sizes, {grow_to(attack, sizes)} ended the run")


@contextmanager
def small_disks():
    """Yields what makes a folder a file system, what leaves it so many bytes, what gives it room again, and what removes it."""
    mounted = []

    def mount(work):
        work.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", ROOM, "none", work], check=True)
        mounted.append(work)

    def leave(size):
        used = shutil.disk_usage(mounted[-1]).used
        subprocess.run(["mount", "-o", f"remount,size={used + size}", mounted[-1]], check=True)

    def enlarge():
        subprocess.run(["mount", "-o", f"remount,{ROOM}", mounted[-1]], check=True)

    def unmount():
        """The kernel may take a moment to let go of what an ended process had open; who holds it longer is still there."""
        folder, until = mounted.pop(), time.monotonic() + 5
        while subprocess.run(["umount", folder], check=time.monotonic() > until, capture_output=True).returncode:
            time.sleep(0.05)

    try:
        yield mount, leave, enlarge, unmount
    finally:
        while mounted:
            unmount()


def fill_up(attack, sizes):
    """The command on file systems with so many bytes free; returns how often it ended by it."""
    failed = 0
    with small_disks() as (mount, leave, enlarge, unmount):
        for size in sizes:
            case = attack.begin(f"disk-{size}", mount)
            leave(size)
            ended = attack.run(case, limits={"room": True})
            if ended.status != 0:
                failed += 1
                failed_well(ended, f"a disk of {size} bytes")
            attack.goes_on(case, ended, f"a disk of {size} bytes", enlarge)
            unmount()
            attack.end(case)
    return failed


def disks_for(attack, count):
    """Sizes in whole pages, from one to about what a run leaves behind."""
    pages = sum(-(-path.stat().st_size // PAGE) + 1 for path in attack.case.work.rglob("*"))
    return sorted({PAGE * (1 + pages * turn // count) for turn in range(count)})


@needs_root
@pytest.mark.parametrize("name", NAMES)
def test_disk_fills_up(name, commands_inputs, tmp_path, warm):
    attack = Attack(name, commands_inputs, tmp_path, warm)
    assert fill_up(attack, disks_for(attack, FEW_LIMITS))


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize("name", NAMES)
def test_disks_of_many_sizes_fill_up(name, commands_inputs, tmp_path, warm):
    attack = Attack(name, commands_inputs, tmp_path, warm)
    sizes = disks_for(attack, MANY_LIMITS)
    print(f"{name}: {len(sizes)} disks, {fill_up(attack, sizes)} ended the run")
