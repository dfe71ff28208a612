"""Progress bars as a call takes them: it says what begins and what is done, and its caller draws that or does not."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Bar(Protocol):
    """Something that advances; a tqdm bar is one."""

    def update(self, n: float) -> object:
        """Advances by n."""

    def reset(self, total: float) -> object:
        """Begins again, with that much to do."""

    def set_postfix_str(self, s: str) -> object:
        """Says something behind the bar."""


class _NoBar:
    def update(self, n: float) -> object:
        return None

    def reset(self, total: float) -> object:
        return None

    def set_postfix_str(self, s: str) -> object:
        return None


Bars = Callable[[str, str, int], AbstractContextManager[Bar]]  # (what, unit, how many) -> a bar


def no_bars(what: str, unit: str, total: int) -> AbstractContextManager[Bar]:
    """Shows nothing."""
    return nullcontext(_NoBar())
