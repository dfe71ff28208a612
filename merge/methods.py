"""Merge methods that need no activations: each makes the rows of a plan and nothing else.

A method is a function of the layer count L and the number n of layers to remove; the executor and the verifier never see
which one was used. Methods that score layers first will take their scores as a further argument and return the same rows.
"""

from collections.abc import Callable, Collection

from .errors import PlanError
from .plan import Plan, Row, unit_row

Method = Callable[[int, int], tuple[Row, ...]]


def drop_last(num_hidden_layers: int, layers: int) -> tuple[Row, ...]:
    """The first L - n layers: what the released reference code computes, and the control for every merge at the top."""
    return tuple(unit_row(layer) for layer in range(num_hidden_layers - layers))


def drop_keep_last(num_hidden_layers: int, layers: int) -> tuple[Row, ...]:
    """All but the n layers before the last (Gromov et al., arXiv 2403.17887, the "simple heuristic")."""
    top = num_hidden_layers - 1
    return tuple(unit_row(layer) for layer in [*range(top - layers), top])


def uniform(num_hidden_layers: int, layers: int) -> tuple[Row, ...]:
    """The top n+1 layers averaged into one: c_j = 1 / (n+1)."""
    window = range(num_hidden_layers - 1 - layers, num_hidden_layers)
    return _collapse(window, {layer: 1.0 / len(window) for layer in window})


def laco(num_hidden_layers: int, layers: int) -> tuple[Row, ...]:
    """The top n+1 layers by the paper's row: base + sum_j (W_j - base), so c_base = 1-n and the others 1.

    Yang et al., arXiv 2402.11187, equation (1); the search for windows needs activations and is another method.
    """
    window = range(num_hidden_layers - 1 - layers, num_hidden_layers)
    mix = {layer: 1.0 for layer in window} | {window[0]: 1.0 - layers}
    return _collapse(window, {layer: c for layer, c in mix.items() if c != 0.0})


METHODS: dict[str, Method] = {
    "drop-last": drop_last,
    "drop-keep-last": drop_keep_last,
    "uniform": uniform,
    "laco": laco,
}


def plan_from_method(method: str, num_hidden_layers: int, layers: int, *, tensors: str = "projections") -> Plan:
    """The plan of a method in METHODS that removes `layers` of `num_hidden_layers` layers.

    Raises:
        PlanError: unknown method, or not 1 <= layers < num_hidden_layers.
    """
    if method not in METHODS:
        raise PlanError(f"there is no method {method!r}; known: {', '.join(METHODS)}")
    check_count(layers, num_hidden_layers)
    rows = METHODS[method](num_hidden_layers, layers)
    return Plan(rows, num_hidden_layers, name=f"{method}-{layers}", method=method, tensors=tensors)


def check_count(layers: int, num_hidden_layers: int) -> None:
    """Raises PlanError unless so many layers can be removed: 1 <= layers < num_hidden_layers."""
    if not 1 <= layers < num_hidden_layers:
        raise PlanError(f"cannot remove {layers} of {num_hidden_layers} layers; expected 1 to {num_hidden_layers - 1}")


def plan_dropping(removed: Collection[int], num_hidden_layers: int) -> Plan:
    """The plan that drops exactly the layers named.

    Raises:
        PlanError: a layer is named twice or does not exist, or none remains.
    """
    unknown = sorted(layer for layer in set(removed) if not 0 <= layer < num_hidden_layers)
    if unknown:
        raise PlanError(f"there is no layer {unknown[0]}; the model has layers 0 to {num_hidden_layers - 1}")
    twice = sorted(layer for layer in set(removed) if list(removed).count(layer) > 1)
    if twice:
        raise PlanError(f"layer {twice[0]} is named twice in the layers to remove")
    rows = tuple(unit_row(layer) for layer in range(num_hidden_layers) if layer not in set(removed))
    if not rows:
        raise PlanError(f"cannot remove all {num_hidden_layers} layers")
    name = "drop-" + "-".join(str(layer) for layer in sorted(removed))
    return Plan(rows, num_hidden_layers, name=name, method="drop")


def _collapse(window: range, mix: dict[int, float]) -> tuple[Row, ...]:
    """Unit rows below the window and one mixed row for it."""
    return (*(unit_row(layer) for layer in range(window[0])), Row(window[0], mix))
