"""Post-norm transformer layers over a batch of [a, o, b, =], in which every distinct state is computed once.

    p       parameters: name -> tensor; `name` is a prefix in it
    h       states [R, d] of distinct rows, position after position
    n, K    symbols and operators; B sequences in a batch

The mask makes the state at position 0 a function of a alone and that at position 1 a function of (a, o): a batch of 512 has
only n and n K distinct ones. What enters the first layer is a table: n + K + n + 1 rows. So projections and feed-forward
layers run over R = n + n K + 2 B rows instead of 4 B, and rows are gathered where attention needs them; the gather's backward
adds gradients up. The function and its gradients are those of the plain network; only the order of sums differs.

    y = LN(x + MHA(x)),  z = LN(y + W2 gelu(W1 y))

Functions take one network's parameters; `torch.func.vmap` makes them work on many.
"""

from collections.abc import Mapping

import torch
from torch.nn import functional

Parameters = Mapping[str, torch.Tensor]
LENGTH = 4  # of a sequence


class Sequences:
    """A batch, and where the states of its four positions lie among the distinct rows."""

    def __init__(self, a: torch.Tensor, op: torch.Tensor, b: torch.Tensor, num_symbols: int, num_ops: int) -> None:
        self.a, self.op, self.b = a, op, b
        self.num_symbols, self.num_ops = num_symbols, num_ops
        self.size = a.shape[0]
        self.prefix = a if num_ops == 1 else a * num_ops + op  # the row of (a, o) at position 1
        self.input_rows = (num_symbols, num_ops, num_symbols, 1)
        self.rows = (num_symbols, num_symbols * num_ops, self.size, self.size)

    def sequences(self, h: torch.Tensor, embedded: bool) -> list[torch.Tensor]:
        """[R, ...] -> four times [B, ...]: every sequence's own rows. `embedded`: of what enters the first layer."""
        at = h.split(self.input_rows if embedded else self.rows)
        if embedded:
            operator = at[1].expand(self.size, *h.shape[1:]) if self.num_ops == 1 else at[1][self.op]
            return [at[0][self.a], operator, at[2][self.b], at[3].expand(self.size, *h.shape[1:])]
        return [at[0][self.a], at[1][self.prefix], at[2], at[3]]

    def prefixes(self, h: torch.Tensor, embedded: bool) -> list[torch.Tensor]:
        """[R, ...] -> twice [n K, ...]: positions 0 and 1 of every (a, o)."""
        n, k, rest = self.num_symbols, self.num_ops, h.shape[1:]
        at = h.split(self.input_rows if embedded else self.rows)
        first = at[0][:, None].expand(n, k, *rest).reshape(n * k, *rest)
        return [first, at[1][None].expand(n, k, *rest).reshape(n * k, *rest) if embedded else at[1]]

    def spread(self, h: torch.Tensor, embedded: bool) -> torch.Tensor:
        """The rows that leave a layer, filled with what entered it: [R, d]."""
        if not embedded:
            return h
        last = self.sequences(h, embedded)
        return torch.cat([h[: self.num_symbols], self.prefixes(h, embedded)[1], last[2], last[3]])

    def ends(self, h: torch.Tensor, embedded: bool) -> torch.Tensor:
        """The states at "=": [B, d]."""
        return h[-1:].expand(self.size, -1) if embedded else h[-self.size :]


def linear(p: Parameters, name: str, x: torch.Tensor) -> torch.Tensor:
    """W x + b."""
    y: torch.Tensor = functional.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])
    return y


def norm(p: Parameters, name: str, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last dimension, with gain and shift."""
    y: torch.Tensor = functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])
    return y


def embed(p: Parameters, name: str, sequences: Sequences) -> torch.Tensor:
    """What enters the first layer, token plus position: [n + K + n + 1, d]."""
    tokens, positions = p[f"{name}.tokens"], p[f"{name}.positions"]
    operators, equals, symbols = tokens.split([sequences.num_ops, 1, sequences.num_symbols])
    return torch.cat([symbols + positions[0], operators + positions[1], symbols + positions[2], equals + positions[3]])


def attend(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """Attention of one query [S, H, dh] over a few positions, each [S, H, dh]: [S, H dh]."""
    scores = torch.stack([(q * k).sum(-1) for k in keys]) * q.shape[-1] ** -0.5
    weights = scores.softmax(0)[..., None]
    return sum((w * v for w, v in zip(weights, values, strict=True)), start=torch.zeros(())).flatten(1)


def attention(
    p: Parameters, name: str, h: torch.Tensor, sequences: Sequences, heads: int, *, embedded: bool, only_end: bool
) -> torch.Tensor:
    """Causal multi-head attention before its output projection: for every row that leaves the layer, or only at "="."""
    weight, bias = p[f"{name}.qkv.weight"], p[f"{name}.qkv.bias"]
    inner = weight.shape[0] // 3
    if only_end:  # queries of nothing else
        source = h[-1:] if embedded else h[-sequences.size :]
        end = functional.linear(source, weight[:inner], bias[:inner]).unflatten(-1, (heads, -1))
        keys, values = functional.linear(h, weight[inner:], bias[inner:]).unflatten(-1, (2, heads, -1)).unbind(1)
        return attend(end, sequences.sequences(keys, embedded), sequences.sequences(values, embedded))
    queries, keys, values = functional.linear(h, weight, bias).unflatten(-1, (3, heads, -1)).unbind(1)
    q, k, v = (sequences.sequences(x, embedded) for x in (queries, keys, values))
    prefix_q, prefix_k, prefix_v = (sequences.prefixes(x, embedded) for x in (queries, keys, values))
    first = values[: sequences.num_symbols].flatten(1)  # position 0 sees only itself
    second = attend(prefix_q[1], prefix_k, prefix_v)
    return torch.cat([first, second, attend(q[2], k[:3], v[:3]), attend(q[3], k, v)])


def block(
    p: Parameters, name: str, h: torch.Tensor, sequences: Sequences, heads: int, *, embedded: bool, only_end: bool
) -> torch.Tensor:
    """One layer: the rows that leave it [R, d], or only the states at "=" [B, d]."""
    mixed = attention(p, f"{name}.attention", h, sequences, heads, embedded=embedded, only_end=only_end)
    residual = sequences.ends(h, embedded) if only_end else sequences.spread(h, embedded)
    y = norm(p, f"{name}.attention_norm", residual + linear(p, f"{name}.attention.out", mixed))
    inside = functional.gelu(linear(p, f"{name}.up", y))
    return norm(p, f"{name}.mlp_norm", y + linear(p, f"{name}.down", inside))


# ---------------------------------------------------------------------------------------------------------------------
# Initial values, as torch's modules make them


Shapes = dict[str, tuple[str, tuple[int, ...]]]  # parameter -> (how it begins, shape)


def linear_shapes(name: str, inputs: int, outputs: int, *, bias: str = "uniform") -> Shapes:
    """`nn.Linear`: uniform within 1/sqrt(inputs)."""
    return {f"{name}.weight": ("uniform", (outputs, inputs)), f"{name}.bias": (f"{bias} {inputs}", (outputs,))}


def norm_shapes(name: str, width: int) -> Shapes:
    """`nn.LayerNorm`."""
    return {f"{name}.weight": ("one", (width,)), f"{name}.bias": ("zero", (width,))}


def attention_shapes(name: str, width: int, inner: int) -> Shapes:
    """`nn.MultiheadAttention`: packed Xavier-uniform q, k, v and an output projection, all biases zero."""
    return {
        f"{name}.qkv.weight": ("xavier", (3 * inner, width)),
        f"{name}.qkv.bias": ("zero", (3 * inner,)),
        f"{name}.out.weight": ("uniform", (width, inner)),
        f"{name}.out.bias": ("zero", (width,)),
    }


def block_shapes(name: str, width: int, inner: int) -> Shapes:
    """One layer; the feed-forward part is four times as wide."""
    return {
        **attention_shapes(f"{name}.attention", width, inner),
        **norm_shapes(f"{name}.attention_norm", width),
        **linear_shapes(f"{name}.up", width, 4 * width),
        **linear_shapes(f"{name}.down", 4 * width, width),
        **norm_shapes(f"{name}.mlp_norm", width),
    }


def initial(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A tensor that begins as `kind` says."""
    name, _, inputs = kind.partition(" ")
    if name == "normal":
        return torch.randn(shape, generator=generator)
    if name in ("one", "zero"):
        return torch.full(shape, float(name == "one"))
    if name == "orthonormal":  # the longer side's columns
        tall: torch.Tensor = torch.linalg.qr(torch.randn(max(shape), min(shape), generator=generator)).Q
        return (tall if shape[0] >= shape[1] else tall.T).contiguous()
    fan_in = int(inputs) if inputs else shape[-1]
    limit: float = (6 / sum(shape)) ** 0.5 if name == "xavier" else fan_in**-0.5
    uniform = torch.rand(shape, generator=generator)
    return (uniform * 2 - 1) * limit
