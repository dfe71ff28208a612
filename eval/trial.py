"""A trial of a plan on cached hidden states: only the changed layers are run, and of the last one only what is scored.

    cut         the first row of a plan that changes anything; below it every plan gives the same hidden states
    states      hidden states entering row `cut`, one [tokens, D] per shared prefix and per pack of a prefix tree (eval/tree)
    answer      a scored position: after it comes a letter, or the next token of a text; A of them
    tail        what the rows from `cut` on run: for each, its base layer's module with some of its weights replaced

The last row needs keys and values of every token, but queries, attention output and MLP at the answers only. Both are had from
the model's own layer: its cache is replaced by one that keeps keys and values and stops there, then by one that returns
them. So every family that PrefixLM runs can be tried, and gradients flow from the answers to the replaced weights.
"""

import functools
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call

from merge.blueprint import Blend, Output, make_blueprint
from merge.checkpoint import Checkpoint
from merge.plan import Plan

from .errors import TrialError
from .lm import PrefixLM
from .tree import Limits, Pack
from .tree import plan as prefix_trees

HEAD_ROWS = 256  # answers whose logits over the whole vocabulary exist at a time


@dataclass(frozen=True)
class LayerWeights:
    """One surviving layer: the module of layer `base`, with the weights in `changed` (by name in the layer) replaced."""

    base: int
    changed: Mapping[str, torch.Tensor]


@dataclass
class PackStates:
    """A pack with its hidden states [S, D]; `rows[i]` is the node of the answer whose number is `answers[i]`."""

    pack: Pack
    hidden: torch.Tensor
    rows: list[int]
    answers: list[int]
    masks: dict[bool, Any] = field(default_factory=dict)  # of the answers' rows, made once


@dataclass
class ClusterStates:
    """The hidden states of a shared prefix [P, D] (None without one) and of the packs that continue it."""

    prefix: torch.Tensor | None
    packs: list[PackStates]


@dataclass
class States:
    """Everything that trials of plans which change nothing below row `cut` need."""

    cut: int
    clusters: list[ClusterStates]
    num_answers: int

    @property
    def nbytes(self) -> int:
        """Size of the hidden states."""
        return sum(hidden.nbytes for _, hidden in self._tensors())

    @property
    def num_tokens(self) -> int:
        """Tokens whose hidden states are kept."""
        return sum(len(hidden) for _, hidden in self._tensors())

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        save_file = importlib.import_module("safetensors.torch").save_file
        shape = [[vars(pack.pack) | {"rows": pack.rows, "answers": pack.answers} for pack in c.packs] for c in self.clusters]
        metadata = {"cut": str(self.cut), "num_answers": str(self.num_answers), "clusters": json.dumps(shape)}
        scratch = path.with_name(path.name + ".partial")
        save_file({name: hidden.contiguous() for name, hidden in self._tensors()}, scratch, metadata)
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> "States":
        """What `save` wrote."""
        with importlib.import_module("safetensors").safe_open(path, "pt", device=device) as file:
            metadata, names = file.metadata(), set(file.keys())
            clusters = []
            for c, packs in enumerate(json.loads(metadata["clusters"])):
                found = []
                for p, values in enumerate(packs):
                    rows, answers = values.pop("rows"), values.pop("answers")
                    found.append(PackStates(Pack(**values), file.get_tensor(f"{c}.{p}"), rows, answers))
                prefix = file.get_tensor(f"{c}.prefix") if f"{c}.prefix" in names else None
                clusters.append(ClusterStates(prefix, found))
        return cls(int(metadata["cut"]), clusters, int(metadata["num_answers"]))

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for c, cluster in enumerate(self.clusters):
            if cluster.prefix is not None:
                yield f"{c}.prefix", cluster.prefix
            for p, pack in enumerate(cluster.packs):
                yield f"{c}.{p}", pack.hidden


class Tail:
    """The layers of a model above a cut, run on cached states.

    Raises:
        TrialError: the model cannot share prefixes, or is spread over several devices.
    """

    def __init__(self, lm: PrefixLM) -> None:
        if lm.not_shared_because is not None:
            raise TrialError(f"trials need a model whose prefixes can be shared: {lm.not_shared_because}")
        if len({p.device for p in lm.model.parameters()}) > 1:
            raise TrialError("trials need the whole model on one device; this one is spread over several")
        self.lm = lm
        self.model = lm.model
        self.decoder = lm.model.get_decoder()
        self.layers = list(self.decoder.layers)
        self.weights = [dict(layer.named_parameters()) for layer in self.layers]
        self._tables: list[dict[str, Any]] = []

    @torch.inference_mode()
    def capture(
        self,
        inputs: Sequence[Sequence[int]],
        first: Sequence[int],
        cut: int,
        seen: Callable[[list[int], torch.Tensor], None] = lambda answers, logits: None,
        done: Callable[[int], object] = lambda tokens: None,
    ) -> States:
        """Runs the whole model once and keeps the hidden states entering layer `cut`.

        Args:
            inputs: distinct sequences of token ids.
            first: for each, the index of its first scored position; from there on every position is an answer.
                Answers are numbered in this order.
            seen: called with the numbers of some answers and the original model's logits there [len(answers), V].
            done: called with the number of tokens just run.
        """
        number = [0]
        for tokens, start in zip(inputs, first, strict=True):
            number.append(number[-1] + len(tokens) - start)
        kept: list[torch.Tensor] = []

        def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append((args[0] if args else kwargs["hidden_states"])[0])

        clusters = []
        hook = self.layers[cut].register_forward_pre_hook(keep, with_kwargs=True)
        limits = Limits(self.lm.pack_tokens, scored=self.lm.pack_scored)
        try:
            for cluster in prefix_trees(inputs, first, limits):
                cache = self.lm._encode(cluster.prefix) if cluster.prefix else None
                prefix = kept.pop() if cluster.prefix else None
                packs = []
                for pack in cluster.packs:
                    rows = [node for path in pack.paths for node in path]
                    answers = [number[k] + i for k, path in zip(pack.inputs, pack.paths, strict=True) for i in range(len(path))]
                    seen(answers, self.lm._forward(pack, cache, len(cluster.prefix), rows))
                    packs.append(PackStates(pack, kept.pop(), rows, answers))
                    done(len(pack.tokens))
                clusters.append(ClusterStates(prefix, packs))
        finally:
            hook.remove()
        return States(cut, clusters, number[-1])

    def run(self, states: States, tail: Sequence[LayerWeights]) -> torch.Tensor:
        """Hidden states [A, D] that leave the last layer of `tail` at the answers, before the model's last norm."""
        if not tail:
            raise TrialError("the plan changes no layer that is left; there is nothing to run on cached states")
        parts, order = [], []
        for cluster in states.clusters:
            prefix, hidden = cluster.prefix, [pack.hidden for pack in cluster.packs]
            for layer in tail[:-1]:
                prefix, hidden = self._whole(cluster, layer, prefix, hidden)
            parts += self._last(cluster, tail[-1], prefix, hidden)
            order += [answer for pack in cluster.packs for answer in pack.answers]
        found = torch.cat(parts)
        return found[torch.tensor(order, device=found.device).argsort()]

    def logits(self, hidden: torch.Tensor, tokens: Sequence[int] | None = None) -> torch.Tensor:
        """The model's own last norm and head on [A, D]: logits of `tokens` [A, len(tokens)], or of all [A, V], in float32."""
        replaced = {}
        if tokens is not None:
            head = self.model.get_output_embeddings()
            name = next(name for name, module in self.model.named_modules() if module is head)
            index = torch.tensor(tokens, device=hidden.device)
            replaced = {f"{name}.{key}": value[index] for key, value in head.named_parameters()}
        ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        with self._instead_of_layers([_Given(hidden[:, None])]):
            arguments = {"input_ids": ids, "use_cache": False}
            # A head that is tied to the embedding loses rows here; the embedding, of zeros that nobody reads, keeps its own.
            found = functional_call(self.model, replaced, kwargs=arguments, tie_weights=False).logits
        logits: torch.Tensor = found[:, 0].float()
        return logits

    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [A] of `targets` [A] over the whole vocabulary; the logits exist for a few answers at a time."""

        def some(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return torch.log_softmax(self.logits(rows), -1).gather(1, wanted[:, None])[:, 0]

        if hidden.requires_grad:  # logits are made again on the way back rather than kept
            checkpoint = importlib.import_module("torch.utils.checkpoint").checkpoint
            some = functools.partial(checkpoint, some, use_reentrant=False)
        pieces = zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
        return torch.cat([some(rows, wanted) for rows, wanted in pieces])

    def _whole(
        self, cluster: ClusterStates, layer: LayerWeights, prefix: torch.Tensor | None, hidden: list[torch.Tensor]
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """One layer on every token."""
        past, record = 0, None
        if prefix is not None:
            past = len(prefix)
            record = _Record()
            chain = Pack(end=[past] * past, depth=list(range(past)), tokens=[0] * past)
            prefix = self._call(layer, prefix, chain.depth, record, self.lm._masks(chain, 0))
        after = [
            self._call(layer, one, pack.pack.depth, _After(record), self.lm._masks(pack.pack, past))
            for one, pack in zip(hidden, cluster.packs, strict=True)
        ]
        return prefix, after

    def _last(
        self, cluster: ClusterStates, layer: LayerWeights, prefix: torch.Tensor | None, hidden: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The last layer at the answers of each pack."""
        everything = hidden if prefix is None else [prefix, *hidden]
        past = 0 if prefix is None else len(prefix)
        depth = [*range(past), *(position for pack in cluster.packs for position in pack.pack.depth)]
        capture = _Capture()
        try:
            self._call(self._without_queries(layer), torch.cat(everything), depth, capture, None)
        except _StopHere:
            pass
        sizes = [len(one) for one in everything]
        keys, values = (x.split(sizes, dim=-2) for x in (capture.keys, capture.values))
        result = []
        for i, pack in enumerate(cluster.packs):
            own = i if prefix is None else i + 1
            pair = (keys[own], values[own])
            if prefix is not None:
                pair = (torch.cat([keys[0], keys[own]], dim=-2), torch.cat([values[0], values[own]], dim=-2))
            if not pack.masks:
                pack.masks[True] = self.lm._masks(pack.pack, past, pack.rows)
            rows = hidden[i][torch.tensor(pack.rows, device=hidden[i].device)]
            result.append(
                self._call(layer, rows, [pack.pack.depth[row] for row in pack.rows], _Return(*pair), pack.masks[True])
            )
        return result

    def _call(self, layer: LayerWeights, hidden: torch.Tensor, depth: Sequence[int], cache: Any, masks: Any) -> torch.Tensor:
        """The layer's own forward on tokens [N, D] at positions `depth`."""
        template = self._arguments(layer.base, max(depth) + 1)
        position = torch.tensor(depth, device=hidden.device)
        arguments = {k: v for k, v in template.items() if k not in ("cache_position", "hidden_states")}
        arguments |= {"past_key_values": cache, "use_cache": True, "position_ids": position[None]}
        if "position_embeddings" in template:
            arguments["position_embeddings"] = tuple(t.index_select(1, position) for t in template["position_embeddings"])
        if "cache_position" in template:
            arguments["cache_position"] = position
        per_kind = isinstance(masks, dict)
        arguments["attention_mask"] = masks[self.model.config.layer_types[layer.base]] if per_kind else masks
        found = functional_call(self.layers[layer.base], dict(layer.changed), (hidden[None],), arguments)
        output: torch.Tensor = (found[0] if isinstance(found, tuple) else found)[0]
        return output

    def _without_queries(self, layer: LayerWeights) -> LayerWeights:
        """The same layer with the query matrix cut down to one head of zeros, where queries have a matrix of their own."""
        head_dim = getattr(self.layers[layer.base].self_attn, "head_dim", None)
        queries = {name: weight for name, weight in self.weights[layer.base].items() if name.startswith("self_attn.q_proj.")}
        if head_dim is None or not queries:
            return layer  # fused matrices (Phi-3) compute their queries too
        stubs = {name: weight.new_zeros(head_dim, *weight.shape[1:]) for name, weight in queries.items()}
        return LayerWeights(layer.base, {**layer.changed, **stubs})

    @torch.no_grad()
    def _arguments(self, layer: int, length: int) -> dict[str, Any]:
        """What the model hands to a layer, with rotary tables of at least `length` positions."""
        have = self._tables[0]["_length"] if self._tables else 0
        if have < length:
            length = max(length, min(2 * have, self.lm.max_length), 256)
            ids = torch.zeros(1, length, dtype=torch.long, device=self.lm.device)
            probes = [_Probe(one) for one in self.layers]
            with self._instead_of_layers(probes):
                self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
            self._tables = [probe.arguments | {"_length": length} for probe in probes]
        return {k: v for k, v in self._tables[layer].items() if k != "_length"}

    @contextmanager
    def _instead_of_layers(self, modules: Sequence[torch.nn.Module]) -> Iterator[None]:
        before = self.decoder.layers
        self.decoder.layers = torch.nn.ModuleList(modules)
        count, self.decoder.config.num_hidden_layers = self.decoder.config.num_hidden_layers, len(modules)
        try:
            yield
        finally:
            self.decoder.layers, self.decoder.config.num_hidden_layers = before, count


def first_changed(plan: Plan) -> int:
    """The first row that is not the layer of its own number as it is; the number of rows if there is none."""
    return next((i for i, row in enumerate(plan.rows) if not (row.is_unit and row.base == i)), len(plan.rows))


def plan_tail(
    tail: Tail, plan: Plan, checkpoint: Checkpoint, cut: int, *, allow_mixed_attention: bool = False
) -> list[LayerWeights]:
    """The rows of a plan from `cut` on, with the weights that `merge` would write for the checkpoint of this model.

    Sums are made in float32 and rounded once to the model's dtype, as the executor does for a checkpoint in that dtype.

    Raises:
        PlanError: the plan does not fit the model.
        TrialError: the plan changes a row below `cut`.
    """
    if first_changed(plan) < cut:
        raise TrialError(f"the plan changes row {first_changed(plan)}, but the cached states enter row {cut}")
    blueprint = make_blueprint(plan, checkpoint, allow_mixed_attention=allow_mixed_attention)
    source = {
        f"{checkpoint.stack}.{index}.{name}": weight
        for index, layer in enumerate(tail.weights)
        for name, weight in layer.items()
    }
    tails: list[dict[str, torch.Tensor]] = [{} for _ in plan.rows[cut:]]
    for output in blueprint.outputs:
        index, _, name = output.name.removeprefix(f"{checkpoint.stack}.").partition(".")
        if output.mixed and output.name.startswith(f"{checkpoint.stack}.") and int(index) >= cut:
            tails[int(index) - cut][name] = _weight(output, source, blueprint.norm_offset)
    return [LayerWeights(row.base, changed) for row, changed in zip(plan.rows[cut:], tails, strict=True)]


def _weight(output: Output, source: Mapping[str, torch.Tensor], norm_offset: float) -> torch.Tensor:
    if output.blend is not None:
        return _blended(output.blend, source)
    total: torch.Tensor | None = None
    for term in output.terms:
        part = source[term.tensor.name].float() * term.coefficient
        if term.gain is not None:
            part = part * (source[term.gain.name].float() + norm_offset)
        total = part if total is None else total + part
    assert total is not None  # an output has at least one term
    if output.divisor is not None:
        total = total / (source[output.divisor.name].float() + norm_offset)
    return total.to(source[output.base.name].dtype)


def _blended(blend: Blend, source: Mapping[str, torch.Tensor]) -> torch.Tensor:
    value = source[blend.tensor.name]
    for alpha, other in blend.steps:
        value = (alpha * value.float() + (1.0 - alpha) * _blended(other, source).float()).to(value.dtype)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# What stands in for the model's caches and layers


class _StopHere(Exception):  # noqa: N818 (not an error)
    """Keys and values are known; nothing after them is needed."""


class _Capture:
    """Keeps keys and values and goes no further."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.keys, self.values = keys, values
        raise _StopHere


class _Record:
    """Keeps keys and values of a prefix."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = keys, values
        return keys, values


class _After:
    """Puts new keys and values behind those of a prefix, if there is one."""

    def __init__(self, prefix: _Record | None) -> None:
        self.prefix = prefix

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.prefix is None:
            return keys, values
        return torch.cat([self.prefix.keys, keys], dim=-2), torch.cat([self.prefix.values, values], dim=-2)


class _Return:
    """Returns keys and values that are known already."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values


class _Given(torch.nn.Module):
    """A layer whose output is given."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output
        self.attention_type = "full_attention"

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.output


class _Probe(torch.nn.Module):
    """A layer that notes what it is called with and passes its input on."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.arguments = kwargs
        return hidden_states
