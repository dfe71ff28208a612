"""The errors of an evaluation: one line each, each class also a builtin."""

import difflib
import re
from collections.abc import Collection

SHOWN_CHARACTERS = 200  # of another library's message inside one of ours
SHOWN_NAMES = 60  # the longest list of names that a message gives


def short(error: BaseException) -> str:
    """Another library's message as one line of bounded length."""
    return re.sub(r"\s+", " ", str(error))[:SHOWN_CHARACTERS]


def near(name: str, known: Collection[str]) -> str:
    """What may have been meant by a name that does not exist, as the end of a message."""
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if found:
        return f"; did you mean {', '.join(found)}?"
    return f"; there are {', '.join(known)}" if len(known) <= SHOWN_NAMES else ""


class EvalError(Exception):
    """Base of all errors that an evaluation raises on purpose."""


class DataError(EvalError, ValueError):
    """Questions, results or texts that are missing, malformed or not comparable."""


class LoadError(EvalError, OSError):
    """A model that cannot be loaded for scoring."""


class TrialError(EvalError, ValueError):
    """A trial on cached states that cannot be made: the model or the plan does not allow it."""


class StudyError(EvalError, ValueError):
    """A run of the arithmetic study that cannot be made as it is described."""


class ScoreError(EvalError, ValueError):
    """A request that cannot be scored, or scores that are not numbers."""
