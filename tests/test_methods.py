"""What each method's rows are; that they can be written is test_merge's business."""

import pytest

from merge.errors import PlanError
from merge.methods import METHODS, plan_dropping, plan_from_method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("layers", "removed"), [(2, 1), (32, 13), (30, 29)])
def test_contract(method, layers, removed):
    """So many rows, each a possible layer, in order, with coefficients that sum to 1."""
    plan = plan_from_method(method, layers, removed)
    assert len(plan.rows) == layers - removed
    assert plan.keep == sorted(set(plan.keep))
    for row in plan.rows:
        assert 0 <= row.base < layers
        assert sum(row.mix.values()) == pytest.approx(1.0)


def test_kept_layers():
    assert plan_from_method("drop-last", 6, 2).keep == [0, 1, 2, 3]
    assert plan_from_method("drop-keep-last", 6, 2).keep == [0, 1, 2, 5]
    assert plan_dropping([1, 4], 6).keep == [0, 2, 3, 5]


def test_rows_of_uniform_and_laco():
    assert plan_from_method("uniform", 6, 2).rows[-1].mix == pytest.approx({3: 1 / 3, 4: 1 / 3, 5: 1 / 3})
    assert plan_from_method("laco", 6, 2).rows[-1].mix == {3: -1.0, 4: 1.0, 5: 1.0}
    assert plan_from_method("laco", 6, 1).rows[-1].mix == {5: 1.0}  # base 1 - 1 = 0


@pytest.mark.parametrize("removed", [0, -1, 6, 7])
def test_impossible_counts(removed):
    with pytest.raises(PlanError, match=f"cannot remove {removed} of 6 layers; expected 1 to 5"):
        plan_from_method("drop-last", 6, removed)


def test_unknown_method():
    with pytest.raises(PlanError, match="no method 'slerp'; known: drop-last"):
        plan_from_method("slerp", 6, 2)


@pytest.mark.parametrize(("removed", "said"), [([6], "no layer 6"), ([1, 1], "named twice"), (range(6), "all 6 layers")])
def test_impossible_drops(removed, said):
    with pytest.raises(PlanError, match=said):
        plan_dropping(list(removed), 6)
