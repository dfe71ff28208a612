"""Folders that appear whole or not at all.

A folder is built under a scratch name beside its target, flushed to disk and renamed; the rename is atomic, so the target's
name never leads to something half-written, whatever kills the process. The scratch folder is locked while its owner
lives: one that can be locked is left over from a dead run and is removed by the next.
"""

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import MergeError, OutputError

SCRATCH_SUFFIX = ".partial"
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False, marker: str | None = None) -> Iterator[Path]:
    """A scratch folder to fill; it becomes `target` when the block ends without an error and vanishes otherwise.

    With `overwrite` an existing target is exchanged for the new folder in one step, provided that it holds a file named
    `marker`, so that a slip of the fingers cannot remove a folder that this program did not write.

    Raises:
        OutputError: the target is in use, or cannot be created, flushed or renamed.
    """
    check_target(target, overwrite=overwrite, marker=marker)
    created_parents = _missing_parents(target.parent)
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_dead_scratch(target)
            scratch, lock = _locked_scratch(target)
        except FileNotFoundError:  # another run made the parents, failed, and removed them just now
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch, lock = _locked_scratch(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be created: {error.strerror or error}") from error
    try:
        try:
            yield scratch
            _open_modes(scratch)
            _flush(scratch, lock)
            check_target(target, overwrite=overwrite, marker=marker)  # it may have appeared meanwhile
            _publish(scratch, target, overwrite)
        except MergeError:
            raise
        except (OSError, SafetensorError) as error:
            raise _cannot_be_written(target, error) from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in created_parents:
            with suppress(OSError):  # not ours alone if it is not empty
                parent.rmdir()
        raise
    finally:
        os.close(lock)


def check_can_appear(target: Path, *, overwrite: bool = False, marker: str | None = None) -> None:
    """Raises OutputError unless `new_folder` could begin now; nothing is left. For work that is long before there is a file."""

    class _EnoughError(Exception):
        pass

    with suppress(_EnoughError), new_folder(target, overwrite=overwrite, marker=marker):
        raise _EnoughError


def build_once(target: Path, build: Callable[[Path], object]) -> None:
    """Has `build` fill the folder `target` unless it is there already; several processes may do so at a time.

    Raises:
        OutputError: it cannot be written.
    """
    if target.is_dir():
        return
    try:
        with new_folder(target) as scratch:
            build(scratch)
    except OutputError:
        if not target.is_dir():  # otherwise another process was faster
            raise


def _locked_scratch(target: Path) -> tuple[Path, int]:
    """A new scratch folder beside a target, and the descriptor that holds its lock."""
    while True:
        scratch = target.parent / f".{target.name}.{secrets.token_hex(4)}{SCRATCH_SUFFIX}"
        scratch.mkdir()  # the mode follows the umask, unlike mkdtemp's
        with suppress(FileNotFoundError, BlockingIOError):
            lock = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Before the lock, a run that started beside this one may have taken it for a dead one's.
                if os.fstat(lock).st_nlink:
                    return scratch, lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)


@contextmanager
def work_folder(folder: Path) -> Iterator[None]:
    """A folder for what a stopped run may go on with; this process alone uses it, and it vanishes where it stays empty.

    Raises:
        OutputError: another process uses it, or it cannot be created.
    """
    created_parents = _missing_parents(folder.parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(f"{folder} cannot be created: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(folder) from error
        except OSError as error:
            for one in (folder, *created_parents):
                with suppress(OSError):  # not empty
                    one.rmdir()
            raise _cannot_be_locked(folder, error) from error
        if not os.fstat(lock).st_nlink:  # its last user ended, and removed it, between the two lines above
            raise _in_use(folder)
        try:
            yield
        finally:
            for one in (folder, *created_parents):  # under the lock: nobody else's
                with suppress(OSError):  # not empty
                    one.rmdir()
    finally:
        os.close(lock)


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for this folder: for files that several write whole.

    Raises:
        OutputError: the folder is not there, or cannot be locked.
    """
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _cannot_be_locked(folder, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise _cannot_be_locked(folder, error) from error
        yield
    finally:
        os.close(lock)


def lock_file(path: Path) -> int:
    """A descriptor of a file, created where it is not there, that no other process has while this one is open.

    Raises:
        OutputError: another process has it, or it cannot be created.
    """
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _cannot_be_written(path, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (path.exists() and os.path.samestat(path.stat(), os.fstat(lock))):  # replaced or removed by its last user
            raise _in_use(path)
    except BaseException as error:
        os.close(lock)
        if isinstance(error, (BlockingIOError, FileNotFoundError)):
            raise _in_use(path) from error
        if isinstance(error, OSError) and not isinstance(error, MergeError):
            raise _cannot_be_locked(path, error) from error
        raise
    return lock


def check_target(target: Path, *, overwrite: bool = False, marker: str | None = None) -> None:
    """Raises OutputError unless a folder may be published under this name."""
    if target.is_symlink():
        raise OutputError(f"{target} is a link; give the name of a folder, or remove the link")
    if target.is_mount():
        raise OutputError(f"{target} is a mount, whose name cannot be given to another folder; give a name inside it")
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target} is a file; expected a folder or a new name")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{target} is not empty; choose another name, or replace it with --overwrite")
    if marker is not None and not (target / marker).is_file():
        raise OutputError(f"{target} holds no {marker}, so it is not an output of this program; remove it yourself")


def _open_modes(folder: Path) -> None:
    """Has files follow the umask, as the folder does; safetensors makes its own for the owner alone. Links are not touched."""
    wanted = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1 and wanted & ~path.stat().st_mode:
            path.chmod(path.stat().st_mode | wanted)


def remove_dead_scratch(target: Path) -> list[Path]:
    """Removes scratch folders of runs that died while building `target`; returns what was removed."""
    removed = []
    for scratch in sorted(target.parent.glob(f".{_escape(target.name)}.*{SCRATCH_SUFFIX}")):
        with suppress(OSError):  # locked: its owner lives
            descriptor = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(scratch)
                removed.append(scratch)
            finally:
                os.close(descriptor)
    return removed


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A scratch name to write to, which becomes `path` at the end; nothing is left if writing fails.

    Flushed before it is renamed: after a power cut the name would otherwise lead to an empty file.

    Raises:
        OutputError: the file cannot be written, flushed or renamed.
    """
    scratch = path.with_name(path.name + ".partial")
    try:
        scratch.unlink(missing_ok=True)  # of a run that was killed
        scratch.touch()
        mode = scratch.stat().st_mode  # as the umask has it
        scratch.unlink()
        yield scratch
        if scratch.stat().st_mode != mode:  # safetensors makes its own, for the owner alone
            with suppress(OSError):  # a disk that has no modes
                scratch.chmod(mode)
        _flush_file(scratch)
        scratch.replace(path)
    except MergeError:
        raise
    except (OSError, SafetensorError) as error:
        raise _cannot_be_written(path, error) from error
    finally:
        with suppress(OSError):  # what was to be said has been said
            scratch.unlink()


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that appears whole."""
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _in_use(path: Path) -> OutputError:
    return OutputError(f"{path} is in use by another run; wait for it, or give another --out")


def _cannot_be_locked(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be locked: {error.strerror or error}; give --out on another disk")


def _cannot_be_written(path: Path, error: Exception) -> OutputError:
    return OutputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}")


def _missing_parents(folder: Path) -> list[Path]:
    """The folders that have to be created for `folder` to exist, deepest first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    return missing


def _flush(folder: Path, descriptor: int) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_nlink == 1:  # what is linked was on disk before
            _flush_file(path)
    os.fsync(descriptor)


def _flush_file(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _publish(scratch: Path, target: Path, overwrite: bool) -> None:
    try:
        os.rename(scratch, target)  # also onto an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not overwrite:
            raise OutputError(f"{target} is not empty any more: somebody else wrote it; choose another name") from error
        _exchange(scratch, target)
        shutil.rmtree(scratch, ignore_errors=True)  # now the old content
    with suppress(OSError):  # the folder is there and whole; only its name may not survive a power cut
        parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def _exchange(one: Path, two: Path) -> None:
    """Swaps two names in one step where the system can (Linux renameat2), in two renames otherwise."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE) == 0:
        return
    aside = one.with_name(one.name.removesuffix(SCRATCH_SUFFIX) + ".old")  # no scratch: nobody cleans it up
    os.rename(two, aside)
    try:
        os.rename(one, two)
    except OSError:
        os.rename(aside, two)
        raise
    os.rename(aside, one)


def _escape(name: str) -> str:
    """`name` with glob's special characters made literal."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
