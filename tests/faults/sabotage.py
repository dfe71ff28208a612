"""Has a process's own calls to the system fail, as a bad or a full disk does: the n-th write, flush or rename in a folder.

Files that libraries write in other languages (SQLite, safetensors, Arrow) are out of reach here; a small file system and a
limit on file sizes are for those.
"""

import builtins
import errno
import io
import os
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("write", "fsync", "rename")
SHORT = "short"  # every write takes a part of what it is given, and none fails


class Sabotage:
    """Counts the calls of one kind on files under `folder`, and has number `nth` of them fail (none where it is 0)."""

    def __init__(self, folder: Path, kind: str, nth: int = 0, error: int = errno.EIO) -> None:
        self.folder, self.kind, self.nth, self.error = os.path.realpath(folder), kind, nth, error
        self.count, self.lock = 0, threading.Lock()

    def begin(self) -> None:
        """Puts the failing calls in place of the system's, for the rest of this process."""
        if self.kind in ("write", SHORT):
            for name, size in (("pwrite", 1), ("write", 1), ("copy_file_range", 2), ("sendfile", 3)):
                setattr(os, name, self._shorter(getattr(os, name), size, int(name == "copy_file_range")))
            builtins.open = io.open = self._open
        elif self.kind == "fsync":
            os.fsync = self._on_file(os.fsync)
        else:
            for name in ("rename", "replace"):
                setattr(os, name, self._on_path(getattr(os, name)))

    def meet(self, path: str) -> None:
        """Counts a call on a path, and raises if its turn has come."""
        if not path.startswith(self.folder):
            return
        with self.lock:
            self.count += 1
            if self.count == self.nth:
                raise OSError(self.error, os.strerror(self.error))

    def _on_file(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(file: Any, *arguments: Any) -> Any:
            self.meet(_path(file))
            return call(file, *arguments)

        return failing

    def _on_path(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(one: Any, two: Any, **options: Any) -> Any:
            self.meet(os.path.realpath(os.fspath(two)))
            return call(one, two, **options)

        return failing

    def _shorter(self, call: Callable[..., Any], size: int, target: int) -> Callable[..., Any]:
        """A write whose argument `size` holds the data or their number, and argument `target` the file."""

        def failing(*arguments: Any, **options: Any) -> Any:
            path = _path(arguments[target])
            if self.kind != SHORT:
                self.meet(path)
            elif path.startswith(self.folder):
                self.count += 1
                value = arguments[size]
                less = max(1, value // 3) if isinstance(value, int) else memoryview(value)[: max(1, len(value) // 3)]
                arguments = (*arguments[:size], less, *arguments[size + 1 :])
            return call(*arguments, **options)

        return failing

    def _open(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None,
        *rest: Any, **options: Any,
    ) -> Any:  # fmt: skip
        """io.open, with a failing file object below where a file is written."""
        path = _path(file) if isinstance(file, int) else os.path.realpath(os.fspath(file))
        path = os.fsdecode(path)
        if not set(mode) & set("wxa+") or not path.startswith(self.folder):
            return _OPEN(file, mode, buffering, encoding, errors, newline, *rest, **options)
        raw = _Raw(file, mode.replace("b", "").replace("t", ""), **options)
        raw.sabotage, raw.path = self, path
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline)
        text.mode = mode
        return text


class _Raw(io.FileIO):
    sabotage: Sabotage
    path: str

    def write(self, data: Any) -> int:
        if self.sabotage.kind != SHORT:
            self.sabotage.meet(self.path)
            return super().write(data)
        self.sabotage.count += 1
        return super().write(memoryview(data)[: max(1, len(data) // 3)])


_OPEN = io.open


def _path(file: Any) -> str:
    number = file if isinstance(file, int) else file.fileno()
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


def plenty_of_room() -> None:
    """The disk is said to have room, so that what is checked beforehand fills up on the way."""
    usage = namedtuple("Usage", "total used free")
    shutil.disk_usage = lambda path: usage(2**50, 0, 2**50)
