"""Threads that share a job with the main thread, and what Ctrl-C means meanwhile."""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PATIENCE = 2  # signals that wait for the threads to end


@dataclass
class Stop:
    """Whether the threads of a pool are to end what they do. A plain flag: a signal's handler may set it at any moment."""

    asked: bool = False


@contextmanager
def pool_of(workers: int) -> Iterator[tuple[ThreadPoolExecutor, Stop]]:
    """A pool of threads for the length of a block, and whether they are to stop: a signal or an error has come.

    What a signal's handler raises is raised when the threads have ended. Python runs handlers in the main thread between any
    two of its operations, so that an exception may come just when it has taken a lock of the pool, of a future or of a
    progress bar, which is then never given back, and the threads wait for it for ever. Where they do not end, on a disk that
    does not answer for one, the third signal is raised at once.
    """
    stop = Stop()
    with _raised_at_the_end(stop), ThreadPoolExecutor(workers) as pool:
        try:
            yield pool, stop
        except BaseException:
            stop.asked = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _raised_at_the_end(stop: Stop) -> Iterator[None]:
    raised: list[BaseException] = []
    over = False

    def handle(number: int, frame: Any) -> None:
        try:
            before[number](number, frame)
        except BaseException as error:
            stop.asked = True
            raised.append(error)
            if over or len(raised) > PATIENCE:
                raise

    main = threading.current_thread() is threading.main_thread()  # no other thread is interrupted
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if callable(handler)}  # others end the process, or nothing
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        over = True
        for number, handler in before.items():
            signal.signal(number, handler)
        if raised:
            raise raised[0]
