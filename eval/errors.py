"""The errors of an evaluation: one line each, each class also a builtin."""

import re

SHOWN_CHARACTERS = 200  # of another library's message inside one of ours


def short(error: BaseException) -> str:
    """Another library's message as one line of bounded length."""
    return re.sub(r"\s+", " ", str(error))[:SHOWN_CHARACTERS]


class EvalError(Exception):
    """Base of all errors that an evaluation raises on purpose."""


class DataError(EvalError, ValueError):
    """Questions, results or texts that are missing, malformed or not comparable."""


class LoadError(EvalError, OSError):
    """A model that cannot be loaded for scoring."""


class TrialError(EvalError, ValueError):
    """A trial on cached states that cannot be made: the model or the plan does not allow it."""


class ScoreError(EvalError, ValueError):
    """A request that cannot be scored, or scores that are not numbers."""
