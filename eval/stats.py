"""Error bars and paired tests for accuracies, in closed form where there is one.

Two models that answer the same questions are compared question by question: what both get right or both get wrong says
nothing about their difference. b and c count the questions that only the first and only the second gets right.
"""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BOOTSTRAP_SAMPLES = 10_000
CONFIDENCE = 0.95
MAX_NLL = 700.0  # exp of more does not fit into a float


def stderr(values: Sequence[float]) -> float:
    """Standard error of the mean: sample standard deviation (n - 1) over root n; nan for fewer than two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Mean:
    """A mean of `count` values with its 95 % interval; `block` neighbours count as one where they depend on each other."""

    value: float
    low: float
    high: float
    stderr: float
    count: int
    block: int = 1

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no nan."""
        return {name: None if math.isnan(value) else value for name, value in vars(self).items()}


def mean(values: npt.ArrayLike, block: int = 1) -> Mean:
    """The mean of values, for instance of differences, with an interval by Student's t over the means of blocks.

    Tokens of a text depend on their neighbours, so their standard error is that of blocks. Values left over at the end
    are in the mean but not in its error; the interval is of nan where there are fewer than two blocks.
    """
    found = np.asarray(values, dtype=np.float64)
    blocks = found[: len(found) // block * block].reshape(-1, block).mean(axis=1)
    value, error = float(found.mean()), stderr(blocks)
    half = float(_scipy_stats().t.ppf(0.5 + CONFIDENCE / 2, max(1, len(blocks) - 1))) * error
    return Mean(value, value - half, value + half, error, len(found), block)


def ratio(values: npt.ArrayLike, sizes: npt.ArrayLike) -> Mean:
    """The sum of values over the sum of their sizes, such as nats of windows over tokens; its interval is over the values.

    It has the error of sum_i (v_i - R s_i) / S (the linearised ratio estimator, Cochran, Sampling Techniques, section 6.4):
    v_i values, s_i sizes, R the ratio, S all sizes.
    """
    found, size = np.asarray(values, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    whole = float(found.sum() / size.sum())
    return mean(whole + (found - whole * size) / size.mean())


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score: within 0 and 1, and of some width also where all or none are right."""
    interval = _scipy_stats().binomtest(right, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats, as large as a float gets."""
    return math.exp(min(nll, MAX_NLL))


@dataclass(frozen=True)
class Paired:
    """The second accuracy minus the first on the same questions.

    low, high: 95 % interval of the difference (bootstrap over questions). p_value: exact McNemar test, two-sided.
    only_first, only_second: questions that only one of the two gets right.
    """

    count: int
    difference: float
    low: float
    high: float
    p_value: float
    only_first: int
    only_second: int

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def paired(first: Sequence[bool], second: Sequence[bool], seed: int = 0) -> Paired:
    """Compares right answers of two models to the same questions in the same order.

    A bootstrap resample of n questions draws the counts (b, c, rest) from a multinomial with the observed shares, so
    nothing needs to be resampled one by one.

    Raises:
        ValueError: different lengths, or no questions.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"found {len(first)} and {len(second)} answers, expected equally many and at least one")
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    n = len(one)
    b, c = int((one & ~two).sum()), int((two & ~one).sum())
    draws = np.random.default_rng(seed).multinomial(n, [b / n, c / n, (n - b - c) / n], size=BOOTSTRAP_SAMPLES)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile((draws[:, 1] - draws[:, 0]) / n, [tail, 1 - tail])
    return Paired(n, (c - b) / n, float(low), float(high), mcnemar(b, c), b, c)


def mcnemar(b: int, c: int) -> float:
    """Two-sided exact McNemar p-value: b of b + c discordant questions under a fair coin; 1 where there are none."""
    return float(_scipy_stats().binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for that many tests (Holm 1979): the k-th smallest of m times m - k + 1, never decreasing."""
    adjusted = [1.0] * len(p_values)
    worst = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = worst
    return adjusted


def _scipy_stats() -> Any:
    """Imported when the first interval is computed: it takes longer than all else that --help of a script needs."""
    return importlib.import_module("scipy.stats")
