"""Trained sources of different shape averaged into one plain network, without any module more.

The target has the most layers, width, heads and head size among the sources. Every source is first written in the target's
shape, which changes nothing that it computes:

    depth    layer j of L_s stands at slot ceil(j L / L_s); at other slots the source takes no part in the average
    width    R = [I; I; ..]: x -> R x commutes with LayerNorm, and a linear map W becomes R W R^+, R^+ = [I I ..] / r
    heads    sizes are padded with zeros, queries scaled by sqrt(size' / size); heads that are missing are zero

Then its units are permuted to match those of the reference source (the widest and deepest) by weight matching: one
permutation of the residual stream, one of hidden units and one of heads per layer, each the best given the others (Ainsworth et
al., arXiv 2209.04836, algorithm 1). Permutations change nothing that is computed either. Then tensors are averaged.
"""

from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment

from ..errors import StudyError
from .models import Source, slot

ALIGNMENTS = ("weights", "none", "random")
LAYERS = "s0.layers."  # what names of a layer's parameters begin with
PASSES = 50  # of weight matching, which ends when nothing changes

Values = dict[str, torch.Tensor]


def target(sources: Sequence[Source]) -> Source:
    """The shape that all sources can be written in.

    Raises:
        StudyError: a width does not divide the largest.
    """
    width, heads = max(s.width for s in sources), max(s.heads for s in sources)
    for source in sources:
        if width % source.width:
            raise StudyError(
                f"width {source.width} does not divide {width}; only whole copies of a state commute with LayerNorm"
            )
    size = max(source.inner // source.heads for source in sources)
    return Source(max(s.layers for s in sources), width, heads, None if heads * size == width else size)


def widened(values: Mapping[str, torch.Tensor], source: Source, wide: Source) -> Values:
    """A plain network's parameters ("s0. ..") in the shape of `wide`, its layers numbered by their slots."""
    copies = wide.width // source.width
    size, wide_size = source.inner // source.heads, wide.inner // wide.heads
    numbers = {i: slot(i + 1, source.layers, wide.layers) - 1 for i in range(source.layers)}

    def heads(x: torch.Tensor, axis: int) -> torch.Tensor:
        """Splits an axis into heads and their entries, and pads both with zeros."""
        x = x.unflatten(axis, (source.heads, size))
        padded = x.new_zeros((*x.shape[:axis], wide.heads, wide_size, *x.shape[axis + 2 :]))
        padded.narrow(axis, 0, source.heads).narrow(axis + 1, 0, size).copy_(x)
        return padded.flatten(axis, axis + 1)

    def into(x: torch.Tensor, axis: int) -> torch.Tensor:
        """R: what comes out."""
        return torch.cat([x] * copies, axis)

    def out_of(x: torch.Tensor, axis: int) -> torch.Tensor:
        """R^+: what goes in."""
        return torch.cat([x] * copies, axis) / copies

    found: Values = {}
    for name, x in values.items():
        part = _part(name)
        if name.startswith(LAYERS):
            name = f"{LAYERS}{numbers[int(_layer(name))]}.{part}"
        if part.startswith("attention.qkv"):
            parts = [heads(one, 0) for one in x.chunk(3)]
            x = torch.cat([parts[0] * (wide_size / size) ** 0.5, *parts[1:]])
            found[name] = out_of(x, 1) if x.ndim == 2 else x
        elif part == "attention.out.weight":
            found[name] = into(heads(x, 1), 0)
        elif part in ("up.weight", "down.weight"):
            found[name] = out_of(into(x, 0), 1)
        elif part == "head.weight":
            found[name] = out_of(x, 1)
        elif part == "head.bias":
            found[name] = x
        else:  # embeddings, norms and biases of the residual stream or of hidden units
            found[name] = into(x, x.ndim - 1)
    return found


def average(
    values: Sequence[Mapping[str, torch.Tensor]],
    sources: Sequence[Source],
    reference: int,
    align: str = "weights",
    generator: torch.Generator | None = None,
) -> Values:
    """The mean network, in the shape of `target(sources)`; a generator is needed where permutations are random."""
    wide = target(sources)
    shaped = [widened(one, source, wide) for one, source in zip(values, sources, strict=True)]
    for i, one in enumerate(shaped):
        if i == reference or align == "none":
            continue
        if align == "random":
            order = {group: torch.randperm(n, generator=generator) for group, n in _groups(one, wide).items()}
        else:
            order = matched(shaped[reference], one, wide)
        shaped[i] = permuted(one, order, wide)
    names = dict.fromkeys(name for one in shaped for name in one)
    return {name: torch.stack([one[name] for one in shaped if name in one]).mean(0) for name in names}


def matched(reference: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], wide: Source) -> dict[str, torch.Tensor]:
    """Permutations of the other network's units that bring its weights nearest to the reference's."""
    groups = _groups(other, wide)
    order = {group: torch.arange(n) for group, n in groups.items()}
    for _ in range(PASSES):
        changed = False
        for group, n in groups.items():
            others = {key: value for key, value in order.items() if key != group}
            moved = permuted(other, others, wide)
            gain = torch.zeros(n, n, dtype=torch.float64)
            for name in moved:
                axis = _axes(name).get(group)
                if axis is not None and name in reference:
                    one, two = (_open(x[name], name, wide).double().movedim(axis, 0).reshape(n, -1) for x in (reference, moved))
                    gain += one @ two.T
            best = torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])
            rows = torch.arange(n)
            if gain[rows, best].sum() > gain[rows, order[group]].sum() + 1e-9:
                order[group], changed = best, True
        if not changed:
            break
    return order


def permuted(values: Mapping[str, torch.Tensor], order: Mapping[str, torch.Tensor], wide: Source) -> Values:
    """The same network with its units in another order: group -> numbers of the units that come 0th, 1st, .."""
    found = {}
    for name, value in values.items():
        opened = _open(value, name, wide)
        for group, axis in _axes(name).items():
            if group in order:
                opened = opened.index_select(axis, order[group])
        found[name] = opened.reshape(value.shape)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Which axes of which tensors are permuted together


AXES = {  # part of a name -> group -> axis of the opened tensor
    "embedding.tokens": {"residual": 1},
    "embedding.positions": {"residual": 1},
    "attention.qkv.weight": {"heads": 1, "residual": 3},
    "attention.qkv.bias": {"heads": 1},
    "attention.out.weight": {"residual": 0, "heads": 1},
    "attention.out.bias": {"residual": 0},
    "attention_norm.weight": {"residual": 0},
    "attention_norm.bias": {"residual": 0},
    "up.weight": {"hidden": 0, "residual": 1},
    "up.bias": {"hidden": 0},
    "down.weight": {"residual": 0, "hidden": 1},
    "down.bias": {"residual": 0},
    "mlp_norm.weight": {"residual": 0},
    "mlp_norm.bias": {"residual": 0},
    "norm.weight": {"residual": 0},
    "norm.bias": {"residual": 0},
    "head.weight": {"residual": 1},
    "head.bias": {},
}


def _part(name: str) -> str:
    return name.removeprefix(LAYERS).split(".", 1)[1] if name.startswith(LAYERS) else name.removeprefix("s0.")


def _layer(name: str) -> str:
    return name.removeprefix(LAYERS).split(".", 1)[0]


def _axes(name: str) -> dict[str, int]:
    """Group -> axis of an opened tensor; heads and hidden units are a layer's own."""
    return {group if group == "residual" else f"{_layer(name)} {group}": axis for group, axis in AXES[_part(name)].items()}


def _open(value: torch.Tensor, name: str, wide: Source) -> torch.Tensor:
    """Attention's tensors with an axis for heads."""
    part = _part(name)
    if part.startswith("attention.qkv"):
        value = value.reshape(3, wide.heads, -1, *value.shape[1:])
    elif part == "attention.out.weight":
        value = value.reshape(len(value), wide.heads, -1)
    return value


def _groups(values: Mapping[str, torch.Tensor], wide: Source) -> dict[str, int]:
    """Group -> how many units."""
    layers = dict.fromkeys(_layer(name) for name in values if name.startswith(LAYERS))
    found = {"residual": wide.width}
    for layer in layers:
        found |= {f"{layer} heads": wide.heads, f"{layer} hidden": 4 * wide.width}
    return found
