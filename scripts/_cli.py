"""What all scripts share: options, logging, and one line instead of a traceback."""

import argparse
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from _checkout import ROOT

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars inside other libraries; tqdm reads this once, when it is imported

from huggingface_hub.utils import disable_progress_bars

from eval.errors import EvalError, near
from merge.errors import MergeError
from merge.fusion.errors import FusionError
from merge.source import Source, resolve

CONFIGS = ROOT / "configs"
LONGEST_MESSAGE = 1800


class UsageError(Exception):
    """The options contradict each other; exit status 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says in one line what is wrong; argparse would print the whole usage first."""
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            message += near(unknown[1], self._option_string_actions)
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help lists the options\n")


def parser(description: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser with examples under --help and the options that every script has."""
    result = _Parser(
        description=description, epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    noise = result.add_argument_group("messages (on stderr; results are on stdout)")
    noise.add_argument("-v", "--verbose", action="count", default=0, help="more messages, tracebacks; -vv: everything")
    noise.add_argument("-q", "--quiet", action="store_true", help="results and errors only")
    return result


def add_model_options(result: argparse.ArgumentParser, default: str) -> None:
    """--model and --revision."""
    group = result.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="ID_OR_DIR",
        help="a Hub id, a folder, a .gguf file, or tiny:NAME for a random twin of configs/models/NAME.json "
        f"(default: {default})",
    )
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub repository (default: main)")


def find_model(spec: str, arguments: argparse.Namespace, *, headers_only: bool = False) -> Source:
    """The source that --model or its default names."""
    return resolve(spec, revision=arguments.revision, configs=CONFIGS, headers_only=headers_only)


def run(
    main: Callable[[argparse.Namespace], int | None],
    result: argparse.ArgumentParser,
    stopped: str = "stopped; nothing was written",
) -> NoReturn:
    """Parses the command line, runs `main`, and ends the process: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C.

    `stopped` is what Ctrl-C and SIGTERM print, unless `main` has set `arguments.stopped` since.
    """
    if "_ARGCOMPLETE" in os.environ:
        _complete(result)
    arguments = result.parse_args()
    arguments.stopped = stopped
    stops: list[BaseException] = []
    try:
        try:
            _prepare(arguments)
            _handle_signals(stops)
            status = main(arguments) or 0
            sys.stdout.flush()  # what its reader does with it is found here, not when the interpreter ends
            sys.exit(status)
        except Exception as error:
            if stops:  # came first, and a library made an error of its own of it, as Optuna and safetensors may
                raise stops[0] from error
            raise
        finally:
            _signals_just_end()
    except UsageError as error:
        result.error(_one_line(error))
    except (MergeError, EvalError, FusionError) as error:
        said = _one_line(error)
        _end(arguments, f"error: {said}{'' if 'is whole' in said else _but_whole(arguments)}", 1)
    except (KeyboardInterrupt, _TerminatedError) as error:
        _end(arguments, _how_far(arguments), 143 if isinstance(error, _TerminatedError) else 130)
    except BrokenPipeError:  # the reader of our output left: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        _end(arguments, "error: out of memory", 1)
    except ValueError as error:
        if "embedded null" not in str(error):
            raise
        _end(arguments, "error: the name of a file holds a null character", 1)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        _end(arguments, f"error: {_one_line(error).partition('. ')[0]}", 1)
    except OSError as error:
        said = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error.strerror or error
        _end(arguments, f"error: {_one_line(said)}{_but_whole(arguments)}", 1)


def publishes(arguments: argparse.Namespace, out: Path) -> None:
    """Says which folder `main` is about to make: if Ctrl-C or an error comes after it has appeared, that is what is said."""
    arguments.publishes = (out, _inode(out))


def _how_far(arguments: argparse.Namespace) -> str:
    """What Ctrl-C and SIGTERM print."""
    whole = _but_whole(arguments)
    return f"stopped{whole}" if whole and not arguments.stopped.startswith("stopped while") else str(arguments.stopped)


def _but_whole(arguments: argparse.Namespace) -> str:
    """What is added where the folder that was being made has appeared all the same."""
    out, before = getattr(arguments, "publishes", (None, None))
    return f"; {out} had been finished and is whole" if out is not None and _inode(out) not in (None, before) else ""


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _prepare(arguments: argparse.Namespace) -> None:
    """How much is said."""
    level = [logging.WARNING, logging.INFO, logging.DEBUG][min(arguments.verbose, 2)]
    logging.basicConfig(format="%(message)s", level=logging.ERROR if arguments.quiet else level, stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "httpcore", "filelock", "urllib3", "fsspec", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING if arguments.verbose < 2 else logging.DEBUG)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if arguments.verbose > 1 else "error")
    if arguments.quiet or not sys.stderr.isatty():
        disable_progress_bars()  # the Hub's own; ours ask the terminal themselves
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _complete(result: argparse.ArgumentParser) -> NoReturn:
    """Answers a shell that asks what may follow, by the `completion` extra; without it there is no answer and no run."""
    with suppress(ImportError):
        import argcomplete

        argcomplete.autocomplete(result)  # ends the process
    sys.exit(1)


class _TerminatedError(BaseException):
    """SIGTERM, so that what is half-written is removed on the way out."""


def _handle_signals(stops: list[BaseException]) -> None:
    """Ctrl-C and SIGTERM are raised, and noted in `stops`."""

    def stop(number: int, frame: Any) -> NoReturn:
        logging.getLogger("sqlalchemy").setLevel(logging.CRITICAL)  # of connections that it cannot close in order
        stops.append(_TerminatedError() if number == signal.SIGTERM else KeyboardInterrupt())
        raise stops[-1]

    def lost(unraisable: Any) -> None:
        """Python drops what is raised while it removes an object; the signal comes again, when it has done that."""
        if not isinstance(unraisable.exc_value, (KeyboardInterrupt, _TerminatedError)):
            sys.__unraisablehook__(unraisable)
            return
        number = signal.SIGINT if isinstance(unraisable.exc_value, KeyboardInterrupt) else signal.SIGTERM
        again = threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, number])
        again.daemon = True  # not waited for; and the start of others takes a lock, which the main thread may have just now
        again.start()

    def elsewhere(failed: Any) -> None:
        """Another thread has found what the main thread left when it was stopped, a locked database for one."""
        if not stops:
            threading.__excepthook__(failed)

    sys.unraisablehook = lost
    threading.excepthook = elsewhere
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, stop)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))  # workers just end


def _signals_just_end() -> None:
    """All is done or removed: from here on a handler could only put a traceback after the last line."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _end(arguments: argparse.Namespace, message: str, status: int) -> NoReturn:
    if arguments.verbose:
        logging.exception(message)
    else:
        print(message, file=sys.stderr)
    sys.exit(status)


def _one_line(error: object) -> str:
    """Its message without line breaks; what was found in a file may be of any length, and is cut."""
    line = re.sub(r"\s*\n\s*", " ", str(error)).strip() or type(error).__name__
    return re.sub(r"(\S{200})\S{100,}", r"\1...", line)[:LONGEST_MESSAGE]


def relative(path: Path) -> str:
    """A path as short as it can be said from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
