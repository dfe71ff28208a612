"""Error bars and tests against closed forms and scipy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from eval.stats import holm, mcnemar, mean, paired, stderr, wilson


@given(st.lists(st.booleans(), min_size=2, max_size=50))
def test_stderr_is_scipys(values):
    assert stderr([float(v) for v in values]) == pytest.approx(float(scipy_stats.sem(np.array(values, dtype=float))))


def test_means_interval_is_students():
    values = np.random.default_rng(0).normal(size=64)
    found = mean(values)
    expected = scipy_stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    blocks = mean(np.repeat(values, 8), block=8)  # neighbours that say the same count once
    assert (blocks.low, blocks.high, blocks.count) == pytest.approx((expected.low, expected.high, 512))
    assert mean(np.repeat(values, 8)).stderr < 0.5 * found.stderr  # what treating them as independent would claim
    assert math.isnan(mean([1.0, 2.0, 3.0], block=2).low)


@pytest.mark.parametrize(("right", "count"), [(0, 3), (3, 3), (2, 3), (60, 200)])
def test_wilson_by_hand(right, count):
    """The shares whose distance from the one found is 1.96 standard errors of their own."""
    share, z = right / count, 1.959964
    for bound in wilson(right, count):
        assert 0.0 <= bound <= 1.0
        assert abs(share - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / count), abs=1e-6)
    low, high = wilson(right, count)
    assert low < high


def test_stderr_of_one_value_is_unknown():
    assert math.isnan(stderr([1.0]))


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_two_binomial_tails(b, c):
    n, k = b + c, min(b, c)
    expected = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    assert mcnemar(b, c) == pytest.approx(expected)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_paired_counts_and_symmetry(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    one, two = paired(first, second), paired(second, first)
    assert one.difference == pytest.approx(np.mean(second) - np.mean(first))
    assert one.difference == -two.difference
    assert (one.only_first, one.only_second) == (two.only_second, two.only_first)
    assert one.p_value == two.p_value
    assert one.low <= one.difference <= one.high


def test_bootstrap_interval_has_the_normal_width():
    """For many questions the interval is difference +- 1.96 sqrt((b + c - (b - c)^2 / n)) / n."""
    rng = np.random.default_rng(0)
    first, second = rng.random(4000) < 0.6, rng.random(4000) < 0.63
    one = paired(list(first), list(second))
    n, b, c = one.count, one.only_first, one.only_second
    half = 1.96 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    assert one.high - one.difference == pytest.approx(half, rel=0.06)
    assert one.difference - one.low == pytest.approx(half, rel=0.06)


def test_same_answers_show_no_difference():
    one = paired([True, False] * 10, [True, False] * 10)
    assert (one.difference, one.p_value, one.shown) == (0.0, 1.0, False)


@pytest.mark.parametrize(("first", "second"), [([], []), ([True], [True, False])])
def test_paired_refuses_what_is_not_paired(first, second):
    with pytest.raises(ValueError, match="expected equally many"):
        paired(first, second)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
