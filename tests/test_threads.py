"""Threads end with their block, and signals have their effect when they have ended."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from merge.threads import PATIENCE, pool_of

NUMBERS = [signal.SIGINT, signal.SIGTERM]


class AskedError(BaseException):
    """What a script's handler raises."""


@pytest.fixture
def handled():
    """Handlers of both signals that raise."""

    def handle(number, frame):
        raise AskedError(number)

    before = {number: signal.signal(number, handle) for number in NUMBERS}
    yield handle
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_for(stop):
    while not stop.asked:
        time.sleep(0.001)


@pytest.mark.parametrize("number", NUMBERS)
def test_signal_is_raised_when_the_threads_have_ended(number, handled):
    steps = []

    def work(stop):
        wait_for(stop)
        steps.append("thread")

    def block():
        with pool_of(2) as (pool, stop):
            pool.submit(work, stop)
            signal.raise_signal(number)
            steps.append("block")  # it goes on
            assert stop.asked

    with pytest.raises(AskedError):
        block()
    assert sorted(steps) == ["block", "thread"]
    assert [signal.getsignal(one) for one in NUMBERS] == [handled] * 2


def test_signals_that_wait_are_not_endless(handled):
    """A thread may wait for a disk that does not answer."""
    steps = []

    def block():
        with pool_of(1):
            for _ in range(5):
                signal.raise_signal(signal.SIGTERM)
                steps.append("block")

    with pytest.raises(AskedError):
        block()
    assert steps == ["block"] * PATIENCE


def test_handler_that_does_not_raise_stops_nothing(handled):
    noted = []
    signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    with pool_of(1) as (pool, stop):
        signal.raise_signal(signal.SIGTERM)
        assert pool.submit(lambda: not stop.asked).result()
    assert noted == [signal.SIGTERM]


def test_error_in_the_block_cancels_what_has_not_begun():
    begun, futures = threading.Event(), []

    def work(stop):
        begun.set()
        wait_for(stop)

    def block():
        with pool_of(1) as (pool, stop):
            futures.extend(pool.submit(work, stop) for _ in range(100))
            begun.wait()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert [future.cancelled() for future in futures] == [False] + [True] * 99


def test_signals_that_end_the_process_still_do():
    code = "from merge.threads import pool_of; import signal\nwith pool_of(1): signal.raise_signal(15)\nprint('here')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "")


def test_elsewhere_than_in_the_main_thread():
    """Handlers can be set there alone, and no other thread is interrupted."""
    results = []

    def run():
        with pool_of(1) as (pool, _):
            results.append(pool.submit(int).result())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == [0]


INTERRUPTED = """
import signal, threading
from merge.threads import pool_of

class Lock:
    "Its owner is interrupted once, just after it has taken it."
    def __init__(self):
        self.lock, self.armed = threading.Lock(), False
    def acquire(self, *arguments):
        got = self.lock.acquire(*arguments)
        if self.armed and threading.current_thread() is threading.main_thread():
            self.armed = False
            signal.raise_signal(signal.SIGINT)
        return got
    __enter__ = acquire
    def release(self):
        self.lock.release()
    def __exit__(self, *error):
        self.release()

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore Ctrl-C
lock = Lock()
with pool_of(2) as (pool, _):
    pool._idle_semaphore = threading.Semaphore(0)
    pool._idle_semaphore._cond = threading.Condition(lock)
    pool.submit(int)
    lock.armed = True
    pool.submit(int)
"""


def test_signal_while_the_main_thread_has_a_lock_of_the_pool():
    """Each thread of the pool takes it, too, when it has nothing to do. With a bare ThreadPoolExecutor all wait for ever."""
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False, timeout=60)
    assert ended.stderr.endswith("KeyboardInterrupt\n"), ended.stderr
