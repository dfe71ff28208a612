"""How far long work is: a bar on a terminal; elsewhere (a log, a queue, nohup) a line a minute."""

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

EVERY_S = 60.0
SCALED = {"byte": ("B", 1e9, "GB"), "FLOP": ("FLOP", 1e12, "TFLOP")}  # unit of a bar, and what a line counts by
MOST_PIECES = 4  # that are told of one by one
SHORT_S = 30.0  # too short a rest to be told in minutes
UNTIMED = 2  # times that a piece is heard of before its speed is measured
STALE_S = 600.0


def counter(description: str, unit: str, total: float, quiet: bool) -> Any:
    """Something that advances by `update`, on stderr; silent if asked, or where HF_HUB_DISABLE_PROGRESS_BARS is set."""
    if not sys.stderr.isatty():
        silent = quiet or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in {"1", "ON", "YES", "TRUE"}
        return Lines(description, unit, total, float("inf") if silent else EVERY_S)
    from huggingface_hub.utils import tqdm

    how = {"unit": SCALED[unit][0], "unit_scale": True} if unit in SCALED else {"unit": unit}
    return tqdm(total=total, desc=description, disable=True if quiet else None, leave=False, **how)


def bars(quiet: bool) -> Callable[[str, str, int], Any]:
    """`counter` as calls that have several bars take it."""
    return lambda description, unit, total: counter(description, unit, total, quiet)


def bar(description: str, quiet: bool) -> Callable[[int], Callable[[int], None]]:
    """`counter` of bytes as calls take it that say how many there are when they begin."""

    def start(total: int) -> Callable[[int], None]:
        progress = counter(description, "byte", total, quiet)

        def advance(done: int) -> None:
            progress.update(done)
            if progress.n >= total:
                progress.close()

        return advance

    return start


class Pieces:
    """How far the pieces are that are being worked on: how much of each is done, how fast, and how long it will take.

    The first that is told of a piece counts as no speed: it may be what an earlier run did, and code may be compiled after it.
    Of pieces that nothing was heard of for `STALE_S` nothing is said.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.begun: dict[str, tuple[float, float]] = {}  # when, and with how much
        self.done: dict[str, float] = {}
        self.total: dict[str, float] = {}
        self.heard: dict[str, float] = {}  # when, last
        self.times: dict[str, int] = {}
        self.over: set[str] = set()

    def advance(self, name: str, n: float, total: float) -> None:
        """So much more of a piece is done."""
        if name in self.over:  # told late, by another process
            return
        self.done[name] = self.done.get(name, 0.0) + n
        self.total[name] = total
        self.heard[name] = self.clock()
        self.times[name] = self.times.get(name, 0) + 1
        if self.times[name] <= UNTIMED:
            self.begun[name] = self.heard[name], self.done[name]

    def finish(self, name: str) -> None:
        """Nothing more is said of it."""
        self.over.add(name)
        self.done.pop(name, None)

    def __str__(self) -> str:
        now = self.clock()
        alive = [name for name in self.done if now - self.heard[name] < STALE_S]
        shown = [self._one(name) for name in alive[:MOST_PIECES]]
        more = len(alive) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")

    def _one(self, name: str) -> str:
        since, first = self.begun[name]
        seconds, made = self.clock() - since, self.done[name] - first
        text = f"{name} {self.done[name]:,.0f}/{self.total[name]:,.0f}"
        if made <= 0 or seconds <= 0:
            return text
        left = (self.total[name] - self.done[name]) * seconds / made
        return (
            f"{text} ({made / seconds:.1f}/s, {left / 60:.0f} min)" if left >= SHORT_S else f"{text} ({made / seconds:.1f}/s)"
        )


class Lines:
    """What stands for a bar where there is no terminal: nothing for work of less than `every_s`, then a line that often."""

    def __init__(
        self, description: str, unit: str, total: float, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.description, self.unit, self.every_s, self.clock = description, unit, every_s, clock
        self.n, self.said = 0.0, ""
        self.reset(total)

    def reset(self, total: float) -> None:
        """Begins again, with that much to do."""
        self.total, self.n = total, 0.0
        self.begun = self.told = self.clock()

    def update(self, n: float = 1) -> None:
        """Advances by n."""
        self.n += n
        now = self.clock()
        if now - self.told < self.every_s or self.n >= self.total:
            return
        self.told = now
        left = (now - self.begun) * (self.total - self.n) / self.n / 60 if self.n else 0.0
        many = f"{self.n:,.0f} of {self.total:,.0f} {self.unit}s"
        if self.unit in SCALED:
            _, scale, name = SCALED[self.unit]
            many = f"{self.n / scale:,.1f} of {self.total / scale:,.1f} {name}"
        about = f"about {left:,.0f} minutes left" if left >= 1 else "less than a minute left"
        print(f"{self.description}: {', '.join(filter(None, (many, self.said, about)))}", file=sys.stderr, flush=True)

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        """Says something behind the numbers, with the next line."""
        self.said = s

    def close(self) -> None:
        """Ends it; nothing is said."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
