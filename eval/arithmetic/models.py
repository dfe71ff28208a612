"""The study's networks: one source, or several whose states are fused; each a record, its initial values and its logits.

    s           number of a source; source s has L_s layers of width d_s, its own embedding, and parameters named "s{s}."
    tap u_k     a source's state at "=" [B, d_k] after one of its layers; K taps; D = sum of their widths
    d           the largest width among the sources

Fusions (the study's names in brackets):

    none                      W LN(u)                             a plain network [baseline]
    concat                    W LN([u_1; ..; u_K])                [basic feature fusion]
    weighted                  w_k u_k before concatenation        [weighted feature fusion]
    dropout                   dropout of each u_k                 [with dropout]
    layer-norm                LN_k(u_k)                           [with layer norm]
    attention                 self-attention among the K taps     [attention mechanism, as its text means it]
    attention-over-positions  the same over the four positions    [attention mechanism, as its last attempt was written]
    dynamic                   W LN(mean_k o_k + m)                [dynamic fusion]; o_k = LN_k(P_k u_k), m by attention from the
                              embedded input to the o_k
    sum                       W LN(sum_k (Q_k LN_k(u_k) + b_k))   [merged models of different shape]
    adapters                  one trunk x of width d: x += g U (B(D x) - D x) for each source's layer B, with projections U, D
    mean-logits               the mean of the sources' own logits; nothing to train

`wiring: parallel` feeds every layer with the embedding instead of the layer below: what the study's code did by mistake.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from ..errors import StudyError, near
from .layers import (
    LENGTH,
    Parameters,
    Sequences,
    Shapes,
    attend,
    attention,
    attention_shapes,
    block,
    block_shapes,
    embed,
    initial,
    linear,
    linear_shapes,
    norm,
    norm_shapes,
)
from .tasks import Task, generator

HEAD_SIZE = 32  # of the attention that dynamic fusion adds
FUSION_HEADS = 4
WIRINGS = ("sequential", "parallel")
TAPS = ("all", "last")
ROUTINGS = ("attention", "static", "mean", "top-1")


@dataclass(frozen=True)
class Source:
    """A transformer's shape; heads have width / heads entries unless `head_size` says otherwise."""

    layers: int = 2
    width: int = 128
    heads: int = 4
    head_size: int | None = None

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads) < 1:
            raise StudyError(f"a source has {self.layers} layers, width {self.width}, {self.heads} heads; expected at least 1")
        if self.head_size is not None and self.head_size < 1:
            raise StudyError(f"head_size is {self.head_size}, expected at least 1")
        if self.head_size is None and self.width % self.heads:
            raise StudyError(f"{self.heads} heads do not divide the width {self.width}; give head_size, or another width")

    @property
    def inner(self) -> int:
        """Entries of all heads together."""
        return self.heads * (self.head_size or self.width // self.heads)


@dataclass(frozen=True)
class Model:
    """A network: sources and how they are fused."""

    sources: tuple[Source, ...] = (Source(),)
    fusion: str = "none"
    wiring: str = "sequential"
    taps: str = "all"
    dropout: float = 0.1  # of fusion dropout
    heads: int = FUSION_HEADS  # of the attention that a fusion adds
    routing: str = "attention"  # of fusion dynamic

    def __post_init__(self) -> None:
        for what, value, known in (
            ("fusion", self.fusion, tuple(FUSIONS)),
            ("wiring", self.wiring, WIRINGS),
            ("taps", self.taps, TAPS),
            ("routing", self.routing, ROUTINGS),
        ):
            if value not in known:
                raise StudyError(f"there is no {what} {value!r}{near(value, known)}")
        if not self.sources:
            raise StudyError("a network needs at least one source")
        if self.fusion == "none" and len(self.sources) > 1:
            raise StudyError(f"{len(self.sources)} sources need a fusion: one of {', '.join(FUSIONS)}")
        if self.heads < 1:
            raise StudyError(f"a fusion's attention has {self.heads} heads, expected at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise StudyError(f"dropout is {self.dropout}, expected 0 to below 1")
        if "attention" in self.fusion and self.attention_width % self.heads:
            raise StudyError(f"{self.heads} heads of the fusion do not divide its width {self.attention_width}")

    @property
    def width(self) -> int:
        """d."""
        return max(source.width for source in self.sources)

    @property
    def tap_widths(self) -> list[int]:
        """d_k, source by source."""
        return [s.width for s in self.sources for _ in range(s.layers if self.taps == "all" else 1)]

    @property
    def attention_width(self) -> int:
        """Of the attention of fusions attention and attention-over-positions."""
        return self.width if self.fusion == "attention" else sum(self.tap_widths)

    @property
    def reference(self) -> int:
        """The source that adapters start from: the widest, the deepest among these."""
        return max(range(len(self.sources)), key=lambda i: (self.sources[i].width, self.sources[i].layers, -i))


def source_shapes(name: str, source: Source, task: Task) -> Shapes:
    """A source without its head."""
    tokens = task.num_ops + 1 + task.num_symbols
    result: Shapes = {
        f"{name}.embedding.tokens": ("normal", (tokens, source.width)),
        # One position more than sequences have: as in the protocol, so that sizes are comparable.
        f"{name}.embedding.positions": ("normal", (LENGTH + 1, source.width)),
    }
    for layer in range(source.layers):
        result |= block_shapes(f"{name}.layers.{layer}", source.width, source.inner)
    return result


def head_shapes(prefix: str, width: int, task: Task) -> Shapes:
    """LN and W."""
    return norm_shapes(f"{prefix}norm", width) | linear_shapes(f"{prefix}head", width, task.num_classes)


def shapes(model: Model, task: Task) -> Shapes:
    """Every parameter of a network: name -> (how it begins, shape)."""
    result: Shapes = {}
    for s, source in enumerate(model.sources):
        result |= source_shapes(f"s{s}", source, task)
        if model.fusion in ("none", "mean-logits"):
            result |= head_shapes(f"s{s}.", source.width, task)
    return result | FUSIONS[model.fusion].shapes(model, task)


def num_parameters(model: Model, task: Task) -> int:
    """Of the whole network."""
    return sum(torch.Size(shape).numel() for _, shape in shapes(model, task).values())


def initialise(model: Model, task: Task, seed: int) -> dict[str, torch.Tensor]:
    """Initial values. A parameter of one name, shape and seed begins alike in every network, so that runs can be paired."""
    found = {
        name: initial(kind, shape, generator(seed, "init", name, *shape)) for name, (kind, shape) in shapes(model, task).items()
    }
    if model.fusion == "adapters":
        found |= _adapters_at_reference(model, found)
    return found


def logits(model: Model, p: Parameters, sequences: Sequences, keep: torch.Tensor | None = None) -> torch.Tensor:
    """[B, classes]. `keep` [B, D]: what dropout multiplies taps with; none when evaluating."""
    return FUSIONS[model.fusion].logits(model, p, sequences, keep)


# ---------------------------------------------------------------------------------------------------------------------
# Sources


@dataclass(frozen=True)
class States:
    """What a source gives to a fusion: its embedded input [R0, d], and after every layer [B, d] at "=" or all rows [R, d]."""

    embedded: torch.Tensor
    layers: list[torch.Tensor]


def run_source(model: Model, p: Parameters, s: int, sequences: Sequences, *, everywhere: bool = False) -> States:
    """A source's states after every layer; `everywhere`: not only at "="."""
    source = model.sources[s]
    h = embedded = embed(p, f"s{s}.embedding", sequences)
    layers = []
    for layer in range(source.layers):
        name, parallel, last = f"s{s}.layers.{layer}", model.wiring == "parallel", layer == source.layers - 1
        only_end = (parallel or last) and not everywhere
        enters = embedded if parallel else h
        h = block(p, name, enters, sequences, source.heads, embedded=parallel or layer == 0, only_end=only_end)
        layers.append(h)
    return States(embedded, layers)


def taps(model: Model, p: Parameters, sequences: Sequences) -> list[torch.Tensor]:
    """u_k [B, d_k] of all sources."""
    found = []
    for s in range(len(model.sources)):
        layers = [h[-sequences.size :] for h in run_source(model, p, s, sequences).layers]
        found += layers if model.taps == "all" else layers[-1:]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Fusions


Logits = Callable[[Model, Parameters, Sequences, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Fusion:
    """What a fusion adds to its sources, and the logits of the whole."""

    shapes: Callable[[Model, Task], Shapes]
    logits: Logits


def _head(p: Parameters, prefix: str, x: torch.Tensor) -> torch.Tensor:
    return linear(p, f"{prefix}head", norm(p, f"{prefix}norm", x))


def _plain(model: Model, p: Parameters, sequences: Sequences, keep: torch.Tensor | None) -> torch.Tensor:
    return _head(p, "s0.", taps(model, p, sequences)[-1])


def _mean_logits(model: Model, p: Parameters, sequences: Sequences, keep: torch.Tensor | None) -> torch.Tensor:
    found = [
        _head(p, f"s{s}.", run_source(model, p, s, sequences).layers[-1][-sequences.size :]) for s in range(len(model.sources))
    ]
    return torch.stack(found).mean(0)


def _concat_head(model: Model, task: Task) -> Shapes:
    return head_shapes("", sum(model.tap_widths), task)


def _concat(model: Model, p: Parameters, sequences: Sequences, keep: torch.Tensor | None) -> torch.Tensor:
    return _head(p, "", torch.cat(taps(model, p, sequences), -1))


def _weighted_shapes(model: Model, task: Task) -> Shapes:
    return {"weights": ("one", (len(model.tap_widths),))} | _concat_head(model, task)


def _weighted(model: Model, p: Parameters, sequences: Sequences, keep: torch.Tensor | None) -> torch.Tensor:
    found = [p["weights"][k] * u for k, u in enumerate(taps(model, p, sequences))]
    return _head(p, "", torch.cat(found, -1))


def _dropout(model: Model, p: Parameters, sequences: Sequences, keep: torch.Tensor | None) -> torch.Tensor:
    joined = torch.cat(taps(model, p, sequences), -1)
    return _head(p, "", joined if keep is None else joined * keep)


def _layer_norm_shapes(model: Model, task: Task) -> Shapes:
    found: Shapes = {}
    for k, width in enumerate(model.tap_widths):
        found |= norm_shapes(f"tap_norms.{k}", width)
    return found | _concat_head(model, task)


def _layer_norm(model: Model, p: Parameters, sequences: Sequences, keep: torch.Tensor | None) -> torch.Tensor:
    found = [norm(p, f"tap_norms.{k}", u) for k, u in enumerate(taps(model, p, sequences))]
    return _head(p, "", torch.cat(found, -1))


def _projected(model: Model, p: Parameters, found: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Taps at width d; P_k is the identity where the width is d already."""
    return [functional.linear(u, p[name]) if (name := f"project.{k}") in p else u for k, u in enumerate(found)]


def _projections(model: Model) -> Shapes:
    return {
        f"project.{k}": ("uniform", (model.width, width)) for k, width in enumerate(model.tap_widths) if width != model.width
    }


def _attention_shapes(model: Model, task: Task) -> Shapes:
    return {
        **_projections(model),
        **attention_shapes("mixer", model.width, model.width),
        **head_shapes("", len(model.tap_widths) * model.width, task),
    }


def _attention(model: Model, p: Parameters, sequences: Sequences, keep: torch.Tensor | None) -> torch.Tensor:
    stacked = torch.stack(_projected(model, p, taps(model, p, sequences)), 1)  # [B, K, d]
    q, k, v = linear(p, "mixer.qkv", stacked).unflatten(-1, (3, model.heads, -1)).unbind(2)
    mixed = [attend(one, list(k.unbind(1)), list(v.unbind(1))) for one in q.unbind(1)]
    return _head(p, "", linear(p, "mixer.out", torch.stack(mixed, 1)).flatten(1))


def _over_positions_shapes(model: Model, task: Task) -> Shapes:
    joined = sum(model.tap_widths)
    return attention_shapes("mixer", joined, joined) | head_shapes("", joined, task)


def _over_positions(model: Model, p: Parameters, sequences: Sequences, keep: torch.Tensor | None) -> torch.Tensor:
    found = []
    for s in range(len(model.sources)):
        layers = run_source(model, p, s, sequences, everywhere=True).layers
        found += layers if model.taps == "all" else layers[-1:]
    # The query at "=" sees all positions, with a causal mask or without.
    rows = torch.cat(found, -1)
    mixed = attention(p, "mixer", rows, sequences, model.heads, embedded=False, only_end=True)
    return _head(p, "", linear(p, "mixer.out", mixed))


def _dynamic_shapes(model: Model, task: Task) -> Shapes:
    d, inner, outputs = model.width, model.heads * HEAD_SIZE, len(model.tap_widths)
    found = _projections(model)
    for s, source in enumerate(model.sources):
        if source.width != d:
            found[f"project_context.{s}"] = ("uniform", (d, source.width))
    for k in range(outputs):
        found |= norm_shapes(f"output_norms.{k}", d)
    return {
        **found,
        **({"query": ("uniform", (inner,))} if model.routing == "static" else linear_shapes("query", d, inner)),
        **linear_shapes("key", d, inner),
        **linear_shapes("value", d, inner),
        **linear_shapes("out", inner, d),
        "tags": ("zero", (outputs, inner)),
        **head_shapes("", d, task),
    }


def routing_weights(model: Model, p: Parameters, sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights over outputs [K, B, H], outputs o_k [K, B, d]) of dynamic fusion."""
    found, contexts = [], []
    for s in range(len(model.sources)):
        states = run_source(model, p, s, sequences)
        layers = [h[-sequences.size :] for h in states.layers]
        found += layers if model.taps == "all" else layers[-1:]
        context = torch.stack(sequences.sequences(states.embedded, True)).mean(0)
        contexts.append(functional.linear(context, p[name]) if (name := f"project_context.{s}") in p else context)
    outputs = torch.stack([norm(p, f"output_norms.{k}", o) for k, o in enumerate(_projected(model, p, found))])
    if model.routing == "mean":
        return outputs.new_full((len(found), sequences.size, model.heads), 1 / len(found)), outputs
    keys = (linear(p, "key", outputs) + p["tags"][:, None]).unflatten(-1, (model.heads, HEAD_SIZE))
    query = p["query"] if model.routing == "static" else linear(p, "query", torch.stack(contexts).mean(0))
    scores = (query.unflatten(-1, (model.heads, HEAD_SIZE)) * keys).sum(-1) * HEAD_SIZE**-0.5
    weights = scores.softmax(0)
    if model.routing == "top-1":  # forward hard, backward as if soft
        hard = (scores == scores.amax(0, keepdim=True)).to(weights.dtype)
        weights = weights + (hard - weights).detach()
    return weights, outputs


def _dynamic(model: Model, p: Parameters, sequences: Sequences, keep: torch.Tensor | None) -> torch.Tensor:
    return dynamic_logits(p, *routing_weights(model, p, sequences))


def dynamic_logits(p: Parameters, weights: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """[B, n] of dynamic fusion's outputs [K, B, d] under these weights [K, B, H]."""
    values = linear(p, "value", outputs).unflatten(-1, (weights.shape[-1], HEAD_SIZE))
    mixed = linear(p, "out", (weights[..., None] * values).sum(0).flatten(1))
    return _head(p, "", outputs.mean(0) + mixed)


def _sum_shapes(model: Model, task: Task) -> Shapes:
    found: Shapes = {}
    for k, width in enumerate(model.tap_widths):
        found |= norm_shapes(f"output_norms.{k}", width) | linear_shapes(f"project.{k}", width, model.width)
    return found | head_shapes("", model.width, task)


def _sum(model: Model, p: Parameters, sequences: Sequences, keep: torch.Tensor | None) -> torch.Tensor:
    found = [linear(p, f"project.{k}", norm(p, f"output_norms.{k}", u)) for k, u in enumerate(taps(model, p, sequences))]
    return _head(p, "", torch.stack(found).sum(0))


def slot(layer: int, layers: int, depth: int) -> int:
    """Where layer 1..layers of a source stands in a trunk of `depth` layers: ceil(layer depth / layers)."""
    return -(-layer * depth // layers)


def _adapters_shapes(model: Model, task: Task) -> Shapes:
    found: Shapes = {}
    for s, source in enumerate(model.sources):
        found[f"enter.{s}"] = ("zero", (model.width, source.width))
        for layer in range(source.layers):
            found[f"up.{s}.{layer}"] = ("orthonormal", (model.width, source.width))
            found[f"down.{s}.{layer}"] = ("orthonormal", (source.width, model.width))
            found[f"gates.{s}.{layer}"] = ("zero", ())
    return found | head_shapes("", model.width, task)


def _adapters_at_reference(model: Model, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values with which the whole equals its reference source; the others' gates are closed, their D = U^T."""
    changed = {name: found[name.replace("down.", "up.", 1)].T.contiguous() for name in found if name.startswith("down.")}
    eye, s = torch.eye(model.width), model.reference
    changed[f"enter.{s}"] = eye
    for layer in range(model.sources[s].layers):
        changed |= {f"up.{s}.{layer}": eye.clone(), f"down.{s}.{layer}": eye.clone(), f"gates.{s}.{layer}": torch.ones(())}
    return changed


def _adapters(model: Model, p: Parameters, sequences: Sequences, keep: torch.Tensor | None) -> torch.Tensor:
    x = torch.stack(
        [functional.linear(embed(p, f"s{s}.embedding", sequences), p[f"enter.{s}"]) for s in range(len(model.sources))]
    ).sum(0)
    depth = max(source.layers for source in model.sources)
    for level in range(1, depth + 1):
        embedded, only_end = level == 1, level == depth
        after = sequences.ends(x, embedded) if only_end else sequences.spread(x, embedded)
        for s, source in enumerate(model.sources):
            for layer in range(source.layers):
                if slot(layer + 1, source.layers, depth) != level:
                    continue
                own = functional.linear(x, p[f"down.{s}.{layer}"])
                before = sequences.ends(own, embedded) if only_end else sequences.spread(own, embedded)
                name = f"s{s}.layers.{layer}"
                found = block(p, name, own, sequences, source.heads, embedded=embedded, only_end=only_end)
                after = after + p[f"gates.{s}.{layer}"] * functional.linear(found - before, p[f"up.{s}.{layer}"])
        x = after
    return _head(p, "", x)


FUSIONS: dict[str, Fusion] = {
    "none": Fusion(lambda model, task: {}, _plain),
    "concat": Fusion(_concat_head, _concat),
    "weighted": Fusion(_weighted_shapes, _weighted),
    "dropout": Fusion(_concat_head, _dropout),
    "layer-norm": Fusion(_layer_norm_shapes, _layer_norm),
    "attention": Fusion(_attention_shapes, _attention),
    "attention-over-positions": Fusion(_over_positions_shapes, _over_positions),
    "dynamic": Fusion(_dynamic_shapes, _dynamic),
    "sum": Fusion(_sum_shapes, _sum),
    "adapters": Fusion(_adapters_shapes, _adapters),
    "mean-logits": Fusion(lambda model, task: {}, _mean_logits),
}
