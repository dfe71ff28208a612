"""Runs scripts and stops them at random moments."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}  # -> exit status


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status (negative: the signal), what it printed, and after how many seconds."""

    status: int
    stdout: str
    stderr: str
    time_s: float


class Warm:
    """A process that starts scripts in a blink; see warm.py."""

    def __init__(self) -> None:
        path = Path(__file__).with_name("warm.py")
        self.process = subprocess.Popen(
            [sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._answer()["ready"] >= 1

    def run(
        self, script: str, arguments: list, folder: Path, *, stop: tuple[float, int] | None = None,
        limits: dict[str, object] | None = None, said: Path | None = None, **environment: str,
    ) -> Ended:  # fmt: skip
        """Runs a script in a folder; `stop` = (after seconds, signal), `limits` as in warm.py, `said`: for its output."""
        said = said or folder.parent
        for needed in (folder, said):
            needed.mkdir(parents=True, exist_ok=True)
        for name in ("stdout", "stderr"):
            (said / name).write_text("")  # for a child that is stopped before it writes
        started = time.perf_counter()
        asked = {"script": script, "arguments": [*map(str, arguments)], "folder": str(folder), "environment": environment}
        child = self._ask(asked | {"limits": limits or {}, "said": str(said)})["child"]
        if stop is not None:
            after, number = stop
            time.sleep(max(0.0, after - (time.perf_counter() - started)))
            os.kill(child, number)  # its number is not given to another before it has been waited for
        status = self._ask({"wait": child})["status"]
        texts = [(said / name).read_text() for name in ("stdout", "stderr")]
        return Ended(status, *texts, time.perf_counter() - started)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=60)

    def _ask(self, asked: dict) -> dict:
        self.process.stdin.write(json.dumps(asked) + "\n")
        return self._answer()

    def _answer(self) -> dict:
        return json.loads(self.process.stdout.readline())


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
