"""Runs a writing command under a fault, and then again without one: what every test of a fault asks."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults.commands import commands
from faults.harness import Ended, Warm


@dataclass
class Case:
    """One run in a folder of its own, where what the command needs is there before it starts."""

    work: Path
    environment: dict[str, str]


class Attack:
    """A command that has been run once without faults, in FOLDER/whole: how long it takes and what it leaves.

    prepare: makes the folder that a case works in; by default an ordinary one.
    """

    def __init__(self, name: str, inputs: Path, folder: Path, warm: Warm, prepare: Callable[[Path], None] = Path.mkdir) -> None:
        self.name, self.folder, self.warm, self.prepare = name, folder, warm, prepare
        self.command = commands(inputs)[name]
        self.case = self.begin("whole", Path.mkdir)
        self.whole = self.run(self.case)
        assert self.whole.status == 0, self.whole.stderr
        self.expected = self.command.same(self.case.work)
        self.names = sorted(path.name for path in self.case.work.iterdir())

    def begin(self, name: str, prepare: Callable[[Path], None] | None = None) -> Case:
        """A folder of that name for one case."""
        work = self.folder / name / "work"
        work.parent.mkdir(parents=True)
        (prepare or self.prepare)(work)
        self.command.before(work)
        return Case(work, {"XDG_CACHE_HOME": str(work / "cache")})

    def run(self, case: Case, **fault: Any) -> Ended:
        """The command under a fault; see `Warm.run`."""
        return self.warm.run(self.command.script, self.command.arguments, case.work, **fault, **case.environment)

    def goes_on(self, case: Case, ended: Ended, what: str, lift: Callable[[], None] = lambda: None) -> None:
        """After a fault: what has its name is whole; once it is lifted a second run ends as one that met none.

        Nothing is left behind, and what was finished before is not lost.
        """
        self.command.check(case.work)
        kept = self.command.kept(case.work)
        lift()
        again = self.warm.run(self.command.script, self.command.again, case.work, **case.environment)
        if again.status in (1, 2):  # it was done, which it said, and what is there is not replaced
            assert "--overwrite" in again.stderr, f"{what}, {ended.status}: {again.stderr}"
            assert ended.status <= 0 or "had been finished" in ended.stderr, f"{what}: {ended.stderr}"
        else:
            assert again.status == 0, f"{what}, {ended.status}: {again.stderr}"
        assert self.command.same(case.work) == self.expected, what
        assert set(kept) <= set(self.command.kept(case.work)), what
        left = {path.name for path in case.work.iterdir()} - {*self.names}
        assert not left, f"{what}: left behind: {left}"

    def end(self, case: Case) -> None:
        """Removes a case."""
        shutil.rmtree(case.work.parent)


def failed_well(ended: Ended, what: str) -> None:
    """A run that could not write: one line, status 1, no traceback."""
    assert ended.status == 1, f"{what}: {ended.status} {ended.stderr}"
    assert "Traceback" not in ended.stderr, f"{what}: {ended.stderr}"
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, f"{what}: {ended.stderr}"
    assert len(lines[0]) < 1000, what


def counted(case: Case) -> int:
    """How many calls a `Sabotage` met."""
    return int((case.work.parent / "count").read_text())


needs_root = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting takes root")
