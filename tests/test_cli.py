"""How scripts end: what `_cli.run` makes of what comes out of `main`."""

import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from _cli import parser, run
from tiny import ROOT

from merge.errors import OutputError


@pytest.fixture(autouse=True)
def no_options(monkeypatch):
    """No command line; signals as they were afterwards."""
    monkeypatch.setattr("sys.argv", ["x.py"])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore Ctrl-C
    monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)
    monkeypatch.setattr("threading.excepthook", threading.__excepthook__)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def fails_in_its_clean_up(number):
    """As Optuna may."""
    try:
        signal.raise_signal(number)
    finally:
        raise UnboundLocalError("updated_state")


def loses_it(number):
    """As safetensors may: what it raises has no context."""
    with suppress(BaseException):
        signal.raise_signal(number)
    raise ValueError("could not determine the shape")


@pytest.mark.parametrize("library", [fails_in_its_clean_up, loses_it])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_library_that_fails_while_it_is_stopped(number, status, library, capsys):
    """The person asked for the end; what a library says of it is not it."""

    def main(arguments):
        library(number)

    with pytest.raises(SystemExit) as ended:
        run(main, parser("x", "  x"), "stopped; nothing was written")
    assert ended.value.code == status
    assert capsys.readouterr().err == "stopped; nothing was written\n"


def test_an_error_that_nobody_foresaw_is_a_traceback():
    """One line would hide a defect."""

    def main(arguments):
        raise UnboundLocalError("updated_state")

    with pytest.raises(UnboundLocalError):
        run(main, parser("x", "  x"))


def test_a_message_has_a_bounded_length(capsys):
    """What stands in a broken file may be of any length; what was expected is said all the same."""

    def main(arguments):
        raise OutputError(f"found {'a' * 5000!r}\n  in row 1, expected a number")

    with pytest.raises(SystemExit):
        run(main, parser("x", "  x"))
    said = capsys.readouterr().err
    assert said.endswith(" in row 1, expected a number\n")
    assert len(said) < 300


@pytest.mark.parametrize("stopped", [False, True])
def test_a_thread_that_fails_after_a_signal_is_not_what_is_said(stopped, capsys):
    """It finds what the main thread has left; without a signal it is a defect, and is printed."""

    def main(arguments):
        thread = threading.Thread(target=lambda: 1 / 0)
        with suppress(KeyboardInterrupt):
            if stopped:
                signal.raise_signal(signal.SIGINT)
        thread.start()
        thread.join()

    with pytest.raises(SystemExit):
        run(main, parser("x", "  x"))
    assert ("ZeroDivisionError" in capsys.readouterr().err) is not stopped


def test_a_file_name_with_a_null_character(capsys):
    def main(arguments):
        Path("a\0b").read_text()

    with pytest.raises(SystemExit):
        run(main, parser("x", "  x"))
    assert capsys.readouterr().err == "error: the name of a file holds a null character\n"


def test_output_that_nobody_reads():
    """`| true`: status 1, and nothing is said when the interpreter ends."""
    code = "from _cli import parser, run; run(lambda arguments: print('found'), parser('x', '  x'))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "scripts", **pipes)
    started.stdout.close()
    assert started.stderr.read() == b""
    started.stderr.close()
    assert started.wait(60) == 1


def test_a_file_name_has_a_bounded_length(capsys):
    def main(arguments):
        Path("a" * 10_000).read_text()

    with pytest.raises(SystemExit):
        run(main, parser("x", "  x"))
    assert capsys.readouterr().err == f"error: {'a' * 200}... File name too long\n"


class Removed:
    """Is interrupted while Python removes it, which drops whatever is raised."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_python_drops_comes_again(number, status, capsys):
    def main(arguments):
        one = Removed(number)
        del one
        time.sleep(60)

    with pytest.raises(SystemExit) as ended:
        run(main, parser("x", "  x"), "stopped; nothing was written")
    assert ended.value.code == status
    assert capsys.readouterr().err == "stopped; nothing was written\n"


@pytest.mark.parametrize("fails", [False, True])
def test_a_signal_after_the_end_just_ends_the_process(fails):
    """A handler that raised while the interpreter cleans up would print a traceback after the last line."""

    def main(arguments):
        if fails:
            raise OutputError("no room")

    with pytest.raises(SystemExit):
        run(main, parser("x", "  x"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == [signal.SIG_DFL] * 2
