"""What a long evaluation has finished, kept on disk subject by subject, so that one that was stopped can go on."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from merge.errors import OutputError
from merge.publish import lock_file, whole_file

from .errors import DataError
from .results import Answer


def progress_path(out: Path) -> Path:
    """Where the finished subjects of a run that writes the results file `out` are kept while it is under way."""
    return out.with_name(out.name.removesuffix(".json") + ".progress.jsonl")


class Progress:
    """Finished subjects of a run that is under way, under the settings that they were asked with.

    From `start` to `close` the file is this process's alone.

    Args:
        path: a file of JSON lines, the settings first.
        settings: what must be the same for finished subjects to count.
        resume: whether to take over what the file holds.

    Raises:
        DataError: the file is of a run with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.header = json.dumps(settings, sort_keys=True)
        self.finished: dict[str, list[Answer]] = {}
        self._lock: int | None = None
        there = resume and path.is_file()
        self._read = (path.read_text(encoding="utf-8") if there else "") if resume else None
        lines = self._read.splitlines() if self._read else []
        if lines and lines[0] != self.header:
            raise DataError(f"{path} is of a run with other options or another model; run with --overwrite to begin again")
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                found = [Answer(**answer | {"logprobs": tuple(answer["logprobs"])}) for answer in entry["answers"]]
                self.finished[str(entry["subject"])] = found
            except (ValueError, KeyError, TypeError):
                break  # the line that was being written

    def start(self) -> None:
        """Writes what was finished, without a line that was being written when the earlier run stopped.

        Raises:
            OutputError: another run uses the file, or it cannot be written.
        """
        before = lock_file(self.path)
        try:
            if self._read is not None and self.path.read_text(encoding="utf-8") not in ("", self._read):
                raise OutputError(f"{self.path} has been changed by another run since it was read; run again")
            with whole_file(self.path) as scratch:
                scratch.write_text("\n".join([self.header, *map(self._line, self.finished)]) + "\n", encoding="utf-8")
                self._lock = lock_file(scratch)
        finally:
            os.close(before)

    def add(self, subject: str, answers: Sequence[Answer]) -> None:
        """Keeps the answers of a finished subject.

        Raises:
            OutputError: they cannot be written.
        """
        self.finished[subject] = list(answers)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._line(subject) + "\n")
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}; give --resume to go on") from error

    def remove(self) -> None:
        """The results are written; nothing is under way any more."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Another run may go on with it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _line(self, subject: str) -> str:
        return json.dumps({"subject": subject, "answers": [asdict(answer) for answer in self.finished[subject]]})
