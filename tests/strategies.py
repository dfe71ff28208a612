"""Shared hypothesis strategies: every new feature of plans joins here."""

from hypothesis import strategies as st

from merge.plan import Plan, Row, Step

alphas = st.floats(0.0, 1.0)
coefficients = st.floats(-4.0, 4.0).filter(lambda c: abs(c) > 1e-3)


@st.composite
def steps_and_layers(draw, max_layers=12):
    """(steps, number of layers): possible steps in any order, at least one."""
    layers = draw(st.integers(2, max_layers))
    remain = list(range(layers))
    steps = []
    for _ in range(draw(st.integers(1, layers - 1))):
        position = draw(st.integers(0, len(remain) - 2))
        steps.append(Step(remain[position], remain.pop(position + 1), draw(alphas)))
    return tuple(steps), layers


@st.composite
def simplex(draw, max_size=12):
    """Non-negative numbers that sum to 1, at least two."""
    raw = draw(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=max_size).filter(lambda values: sum(values) > 1e-3))
    return [value / sum(raw) for value in raw]


@st.composite
def plans(draw, max_layers=8):
    """Any plan that a person could write by hand."""
    layers = draw(st.integers(1, max_layers))
    layer = st.integers(0, layers - 1)
    mixes = st.dictionaries(layer, coefficients, min_size=1)
    groups = st.dictionaries(st.sampled_from(["self_attn.q_proj", "mlp.down_proj", "input_layernorm"]), mixes, max_size=2)
    row = st.builds(
        lambda base, mix, groups: Row(base, dict(sorted(mix.items())), {g: dict(sorted(m.items())) for g, m in groups.items()}),
        layer,
        mixes,
        groups,
    )
    return Plan(
        rows=tuple(draw(st.lists(row, min_size=1, max_size=max_layers))),
        num_hidden_layers=layers,
        name=draw(st.text(max_size=8)),
        method=draw(st.sampled_from(["", "by hand"])),
        tensors=draw(st.sampled_from(["projections", "all", "fold-norms"])),
        model=draw(st.none() | st.just("org/name")),
    )
