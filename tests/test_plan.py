"""The algebra of plans: closed form, inverse, sensitivities, and JSON that comes back as it was."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import plans, simplex, steps_and_layers

from merge.errors import PlanError, RecordError
from merge.plan import (
    Plan,
    Row,
    Step,
    chain,
    compose,
    effective_layers,
    plan_from_dict,
    plan_to_dict,
    sensitivities,
    stick_breaking,
    unit_row,
)


def as_matrix(rows, layers):
    matrix = np.zeros((len(rows), layers))
    for index, row in enumerate(rows):
        for layer, c in row.mix.items():
            matrix[index, layer] = c
    return matrix


@given(steps_and_layers())
def test_closed_form_equals_steps_on_numbers(case):
    """Applying the rows to the identity gives what the steps do one by one."""
    steps, layers = case
    values = {layer: np.eye(layers)[layer] for layer in range(layers)}
    for step in steps:
        values[step.into] = step.alpha * values[step.into] + (1 - step.alpha) * values.pop(step.remove)
    rows = compose(steps, layers)
    assert [row.base for row in rows] == sorted(values)
    np.testing.assert_allclose(as_matrix(rows, layers), np.array([values[base] for base in sorted(values)]), atol=1e-14)


@given(steps_and_layers())
def test_rows_of_alphas_are_convex(case):
    steps, layers = case
    matrix = as_matrix(compose(steps, layers), layers)
    assert (matrix >= 0).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)


@given(steps_and_layers())
def test_alpha_one_is_dropping(case):
    """With alpha 1 the removed layer leaves no trace: the rows are unit rows."""
    steps, layers = case
    rows = compose([Step(s.into, s.remove, 1.0) for s in steps], layers)
    assert all(row.is_unit for row in rows)


def test_alpha_weighs_the_kept_lower_layer():
    (row,) = compose([Step(0, 1, 0.75)], 2)
    assert row == Row(0, {0: 0.75, 1: 0.25})


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=10))
def test_chain_has_the_documented_closed_form(alphas):
    layers = len(alphas) + 1
    (row,) = compose(chain(alphas, layers), layers)
    rest = np.cumprod([1.0, *(1 - np.array(alphas))])
    expected = [*(np.array(alphas) * rest[:-1]), rest[-1]]
    np.testing.assert_allclose([row.mix.get(layer, 0.0) for layer in range(layers)], expected, atol=1e-14)


@given(simplex())
def test_stick_breaking_is_the_inverse(coefficients):
    layers = len(coefficients)
    (row,) = compose(chain(stick_breaking(coefficients), layers), layers)
    np.testing.assert_allclose([row.mix.get(layer, 0.0) for layer in range(layers)], coefficients, atol=1e-12)


@pytest.mark.parametrize("bad", [[0.5, 0.6], [1.5, -0.5], [math.nan, 1.0]])
def test_stick_breaking_refuses_what_is_off_the_simplex(bad):
    with pytest.raises(PlanError, match="simplex"):
        stick_breaking(bad)


@given(st.lists(st.floats(0.05, 0.95), min_size=1, max_size=8))
def test_sensitivity_of_a_chain(alphas):
    """2 prod_{i<s} (1 - a_i) over the layers below."""
    layers = len(alphas) + 1
    expected = [2 * float(np.prod([1 - a for a in alphas[:index]])) for index in range(len(alphas))]
    np.testing.assert_allclose(sensitivities(chain(alphas, layers), layers), expected[::-1], rtol=1e-9)


@given(steps_and_layers(max_layers=6), st.data())
def test_sensitivity_is_the_derivative(case, data):
    steps, layers = case
    which = data.draw(st.integers(0, len(steps) - 1))
    moved = list(steps)
    delta = 1e-3 if steps[which].alpha < 0.5 else -1e-3
    moved[which] = Step(steps[which].into, steps[which].remove, steps[which].alpha + delta)
    change = np.abs(as_matrix(compose(moved, layers), layers) - as_matrix(compose(steps, layers), layers)).sum()
    assert change / 1e-3 == pytest.approx(sensitivities(steps, layers)[which], abs=1e-9)


def test_order_matters():
    """0 <- 1 then 0 <- 2 is another mixture than 1 <- 2 then 0 <- 1."""
    one = compose([Step(0, 1, 0.5), Step(0, 2, 0.5)], 3)
    two = compose([Step(1, 2, 0.5), Step(0, 1, 0.5)], 3)
    assert one == (Row(0, {0: 0.25, 1: 0.25, 2: 0.5}),)
    assert two == (Row(0, {0: 0.5, 1: 0.25, 2: 0.25}),)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([Step(0, 2, 0.5)], "not neighbours; above layer 0 the next that remains is 1"),
        ([Step(1, 0, 0.5)], "must be the lower"),
        ([Step(1, 1, 0.5)], "must be the lower"),
        ([Step(3, 4, 0.5)], "there is no layer 4; the model has layers 0 to 3"),
        ([Step(-1, 0, 0.5)], "there is no layer -1"),
        ([Step(0, 1, 1.5)], "alpha is 1.5, expected a number from 0 to 1"),
        ([Step(0, 1, math.nan)], "alpha is nan"),
        ([Step(1, 2, 0.5), Step(2, 3, 0.5)], "layer 2 was removed in step 0"),
    ],
)
def test_impossible_steps_are_named(steps, said):
    with pytest.raises(PlanError, match=said):
        compose(steps, 4)


def test_all_problems_at_once():
    with pytest.raises(PlanError) as caught:
        compose([Step(0, 2, 0.5), Step(0, 1, 7.0), Step(9, 10, 0.5)], 4)
    assert all(text in str(caught.value) for text in ("step 0", "step 1", "step 2"))


def test_effective_layers():
    assert effective_layers({3: 1.0}) == pytest.approx(1.0)
    assert effective_layers({1: 0.5, 2: 0.5}) == pytest.approx(2.0)
    assert effective_layers({1: -0.5, 2: 0.5}) == pytest.approx(2.0)


@given(plans())
def test_json_round_trip(plan):
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(plan)))) == plan


@given(steps_and_layers(), st.sampled_from(["float32", "sequential"]))
def test_json_round_trip_with_steps(case, arithmetic):
    steps, layers = case
    plan = Plan(compose(steps, layers), layers, steps=steps, arithmetic=arithmetic)
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(plan)))) == plan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": []}, "'rows' is empty"),
        ({"rows": [{"base": 4}]}, "row 0: there is no layer 4"),
        ({"rows": [{"base": 0, "mix": {"7": 1.0}}]}, "there is no layer 7"),
        ({"rows": [{"base": 0, "mix": {"0": "x"}}]}, "the coefficient of layer 0 is 'x'"),
        ({"rows": [{"base": 0, "mix": {"0": True}}]}, "the coefficient of layer 0 is True"),
        ({"rows": [{"base": 0, "mix": {"0": 0.0}}]}, "all coefficients are zero"),
        ({"rows": [{"base": 0, "mix": {"01": 1.0}}]}, "key '01' is not a layer number"),
        ({"rows": [{"base": 0, "mixx": {}}]}, "unknown key 'mixx' .did you mean 'mix'"),
        ({"rows": [{"mix": {"0": 1.0}}]}, "'base' is missing"),
        ({"rows": [7]}, "found 7, expected an object"),
        ({"tensors": "some"}, "'tensors' is 'some', expected one of projections, all, fold-norms"),
        ({"arithmetic": "sequential"}, "needs 'steps'"),
        ({"schema_version": 2}, "'schema_version' is 2, expected 1"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0"),
        ({"num_hidden_layers": 10**9}, "expected 1 to 100,000"),
        ({"rows": [{"base": 0, "mix": {"0": 10**400}}]}, "expected a finite number"),
        ({"num_hidden_layers": "4"}, "'num_hidden_layers' is '4', expected a whole number"),
        ({"steps": [{"into": 0, "remove": 1, "alpha": 0.5}]}, "'rows' are not what 'steps' amount to"),
        ({"steps": [{"into": 0, "remove": 2, "alpha": 0.5}]}, "not neighbours"),
    ],
)
def test_bad_plans_are_named(change, said):
    good = plan_to_dict(Plan((unit_row(0), unit_row(1)), 4))
    with pytest.raises(RecordError, match=said):
        plan_from_dict(good | change)


def test_dropped_is_the_control():
    plan = Plan(compose([Step(1, 2, 0.5)], 4), 4, name="x", steps=(Step(1, 2, 0.5),))
    assert plan.dropped().keep == plan.keep == [0, 1, 3]
    assert all(row.is_unit for row in plan.dropped().rows)
