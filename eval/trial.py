"""A trial of a plan on cached hidden states: only the changed layers are run, and of the last one only what is scored.

    cut         the first row of a plan that changes anything; below it every plan gives the same hidden states
    states      hidden states entering row `cut`, one [tokens, D] for each shared prefix and the packs after it (eval/tree)
    answer      a scored position: after it comes a letter, or the next token of a text; A of them
    tail        what the rows from `cut` on run: for each, its base layer's module with some of its weights replaced

The last row needs keys and values of every token, but queries, attention output and MLP at the answers only. Both are had from
the model's own layer: its cache is replaced by one that keeps keys and values and stops there, then by one that returns
them. So every family that PrefixLM runs can be tried, and gradients flow from the answers to the replaced weights.
"""

import functools
import hashlib
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
from merge.families import ATTENTION_READERS, FAMILIES
from merge.plan import Plan
from merge.publish import whole_file
from merge.space import Space

from .errors import TrialError
from .lm import PrefixLM
from .tree import Limits, Pack
from .tree import plan as prefix_trees

NORM = "input_layernorm.weight"
# In the last layer, packs are joined to few groups, since keys of the prefix are copied for each, but masked entries (answers
# times tokens) cost time too. Groups go side by side into few calls, since every call reads all weights and its gradient writes
# them, but large copies of keys are slow. Blocks bound what is in memory at a time.
GROUP_ENTRIES, CALL_TOKENS, BLOCK_TOKENS = 2**15, 2**13, 2**16
SAMPLED = 256  # values of a tensor that tell it from others
HEAD_ROWS = 256  # answers whose logits over the whole vocabulary exist at a time


@dataclass(frozen=True)
class LayerWeights:
    """One surviving layer: the module of layer `base`, with the weights in `changed` (by name in the layer) replaced."""

    base: int
    changed: Mapping[str, torch.Tensor]


@dataclass
class PackAnswers:
    """A pack whose tokens are at `start` and after in its cluster; answer number `answers[i]` is at node `rows[i]`."""

    pack: Pack
    start: int
    rows: list[int]
    answers: list[int]


@dataclass
class ClusterStates:
    """Hidden states [N, D] of a shared prefix (its first `past` tokens; 0 without one) and of the packs that continue it."""

    hidden: torch.Tensor
    past: int
    packs: list[PackAnswers]

    @property
    def depth(self) -> list[int]:
        """Position of every token in its sequence."""
        return [*range(self.past), *(position for pack in self.packs for position in pack.pack.depth)]


@dataclass
class States:
    """Everything that trials of plans which change nothing below row `cut` need."""

    cut: int
    clusters: list[ClusterStates]
    num_answers: int
    blocks: "list[_Block]" = field(default_factory=list)  # how the last layer takes them; laid out by the first trial
    same: dict[tuple[int, str], torch.Tensor] = field(
        default_factory=dict
    )  # what the first layer makes of a block in any trial

    @property
    def nbytes(self) -> int:
        """Size of the hidden states."""
        return sum(cluster.hidden.nbytes for cluster in self.clusters)

    @property
    def num_tokens(self) -> int:
        """Tokens whose hidden states are kept."""
        return sum(len(cluster.hidden) for cluster in self.clusters)

    def save(self, path: Path, **more: torch.Tensor) -> None:
        """Writes one safetensors file, with more tensors by name."""
        save_file = importlib.import_module("safetensors.torch").save_file
        shape = [
            {"past": cluster.past, "packs": [vars(pack) | {"pack": vars(pack.pack)} for pack in cluster.packs]}
            for cluster in self.clusters
        ]
        metadata = {"cut": str(self.cut), "num_answers": str(self.num_answers), "clusters": json.dumps(shape)}
        with whole_file(path) as scratch:
            save_file({**more, **{str(i): cluster.hidden for i, cluster in enumerate(self.clusters)}}, scratch, metadata)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> "tuple[States, dict[str, torch.Tensor]]":
        """What `save` wrote: the states, and the other tensors.

        Raises:
            TrialError: the file is damaged.
        """
        safetensors = importlib.import_module("safetensors")
        try:
            return cls._read(safetensors, path, device)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TrialError(f"{path} does not hold hidden states ({type(error).__name__}); remove it") from error

    @classmethod
    def _read(cls, safetensors: Any, path: Path, device: str) -> "tuple[States, dict[str, torch.Tensor]]":
        with safetensors.safe_open(path, "pt", device=device) as file:
            metadata = file.metadata()
            clusters = [
                ClusterStates(
                    file.get_tensor(str(i)),
                    shape["past"],
                    [PackAnswers(**pack | {"pack": Pack(**pack["pack"])}) for pack in shape["packs"]],
                )
                for i, shape in enumerate(json.loads(metadata["clusters"]))
            ]
            more = {name: file.get_tensor(name) for name in file.keys() if not name.isdecimal()}
        return cls(int(metadata["cut"]), clusters, int(metadata["num_answers"])), more


@dataclass(frozen=True)
class _Group:
    """Neighbouring packs of a cluster as one, which begins at token `start` of a block; all padded to the same size in a call.

    rows [R]: tokens of the block that are answers, and their numbers. depth: [R]. masks: [1, 1, R, past + size] by kind of
    attention. pieces: of a block's keys, the prefix (if any) and the group's own.
    """

    rows: torch.Tensor
    numbers: list[int]
    depth: torch.Tensor
    masks: dict[str | None, torch.Tensor]
    pieces: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class _Call:
    """B groups side by side, as the last layer takes them.

    rows, depth: [B, R], padded with each group's first. real: [B, R], whether a row is an answer. masks: [B, 1, R, T], by kind
    of attention where there are several. pieces: for each group, and how much its keys are padded by.
    """

    rows: torch.Tensor
    real: torch.Tensor
    depth: torch.Tensor
    masks: Any
    pieces: list[tuple[tuple[int, ...], int]]

    def gather(self, split: Sequence[torch.Tensor]) -> torch.Tensor:
        """Keys or values [B, heads, T, head_dim] from a block's, split into pieces [1, heads, N, head_dim]."""
        row = []
        for pieces, padding in self.pieces:
            row += [split[piece] for piece in pieces]
            if padding:
                row.append(split[0].new_zeros(1, split[0].shape[1], padding, split[0].shape[3]))
        whole: torch.Tensor = torch.cat(row, dim=2)[0].unflatten(1, (len(self.pieces), -1))
        return whole.transpose(0, 1)


@dataclass(frozen=True)
class _Block:
    """Neighbouring clusters whose keys and values are computed together.

    depth: [1, N]. sizes: of the pieces of the N tokens: prefixes and groups. numbers: of the answers as the calls give them.
    """

    clusters: list[int]
    depth: torch.Tensor
    sizes: list[int]
    calls: list[_Call]
    numbers: list[int]


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
        self.model = lm.model.requires_grad_(False)  # gradients go to replaced weights only
        self.decoder = lm.model.get_decoder()
        self.layers = list(self.decoder.layers)
        self.weights = [dict(layer.named_parameters()) for layer in self.layers]
        model_type = self.model.config.get_text_config().model_type
        self._known_norms = model_type in FAMILIES
        self._norm_offset = FAMILIES[model_type].norm_offset if model_type in FAMILIES else 0.0
        self._tables: list[dict[str, Any]] = []

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells this model, in this dtype, from others: a hash of config, names, shapes and a sample of every weight."""
        config = {key: value for key, value in self.model.config.to_dict().items() if not key.startswith("_")}
        how = self.model.config._attn_implementation
        found = hashlib.sha256(json.dumps([config, how], sort_keys=True, default=str).encode())
        for name, weight in self.model.named_parameters():
            flat = weight.detach().flatten()
            sample = flat[:: max(1, len(flat) // SAMPLED)].float().cpu().numpy()
            found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + sample.tobytes())
        return found.hexdigest()

    def key(self, inputs: Sequence[Sequence[int]], first: Sequence[int], cut: int) -> str:
        """Names what `capture` would give: of this model, these inputs and this cut."""
        packs = (self.lm.pack_tokens, self.lm.pack_scored)
        content = json.dumps([self.fingerprint, [list(one) for one in inputs], list(first), cut, packs])
        return hashlib.sha256(content.encode()).hexdigest()[:20]

    @torch.no_grad()
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
                packs = []
                for pack in cluster.packs:
                    rows = [node for path in pack.paths for node in path]
                    answers = [number[k] + i for k, path in zip(pack.inputs, pack.paths, strict=True) for i in range(len(path))]
                    packs.append(PackAnswers(pack, sum(map(len, kept)), rows, answers))
                    seen(answers, self.lm._forward(pack, cache, len(cluster.prefix), rows))
                    done(len(pack.tokens))
                clusters.append(ClusterStates(torch.cat(kept), len(cluster.prefix), packs))
                kept.clear()
        finally:
            hook.remove()
        return States(cut, clusters, number[-1])

    def run(self, states: States, tail: Sequence[LayerWeights]) -> torch.Tensor:
        """Hidden states [A, D] that leave the last layer of `tail` at the answers, before the model's last norm."""
        if not tail:
            raise TrialError("the plan changes no layer that is left; there is nothing to run on cached states")
        hidden = [cluster.hidden for cluster in states.clusters]
        for layer in tail[:-1]:
            hidden = [self._whole(cluster, layer, one) for cluster, one in zip(states.clusters, hidden, strict=True)]
        return self._last(states, tail[-1], hidden, first=len(tail) == 1)

    def through(self, states: States, layer: LayerWeights) -> States:
        """The states that leave a layer, for every token."""
        clusters = [
            ClusterStates(self._whole(cluster, layer, cluster.hidden), cluster.past, cluster.packs)
            for cluster in states.clusters
        ]
        return States(states.cut, clusters, states.num_answers, states.blocks)

    def answers(self, states: States) -> torch.Tensor:
        """The states themselves at the answers, [A, D]."""
        parts = [
            cluster.hidden[torch.tensor(pack.rows, device=cluster.hidden.device) + pack.start]
            for cluster in states.clusters
            for pack in cluster.packs
        ]
        numbers = [answer for cluster in states.clusters for pack in cluster.packs for answer in pack.answers]
        return _in_order(parts, numbers)

    def logits(self, hidden: torch.Tensor, tokens: Sequence[int] | None = None) -> torch.Tensor:
        """The model's own last norm and head on [A, D]: logits of `tokens` [A, len(tokens)], or of all [A, V], in float32."""
        replaced = {}
        if tokens is not None:
            head = self.model.get_output_embeddings()
            name = next(name for name, module in self.model.named_modules() if module is head)
            index = torch.tensor(tokens, device=hidden.device)
            replaced = {f"{name}.{key}": value[index] for key, value in head.named_parameters()}
        ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        with instead_of_layers(self.decoder, [_Given(hidden[:, None])]):
            arguments = {"input_ids": ids, "use_cache": False}
            # A head that is tied to the embedding loses rows here; the embedding, of zeros that nobody reads, keeps its own.
            found = functional_call(self.model, replaced, kwargs=arguments, tie_weights=False).logits
        logits: torch.Tensor = found[:, 0].float()
        return logits

    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [A] of `targets` [A] over the whole vocabulary; the logits exist for a few answers at a time."""

        def some(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return torch.log_softmax(self.logits(rows), -1).gather(1, wanted[:, None])[:, 0]

        def with_gradient(rows: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            given = rows.detach().requires_grad_(True)
            value = some(given, wanted)
            return value.detach(), torch.autograd.grad(value.sum(), given)[0]

        pieces = zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return torch.cat([some(rows, wanted) for rows, wanted in pieces])
        # A row's value depends on that row alone, so its gradient [D] can be had at once, while its logits [V] exist.
        values, gradients = zip(*(with_gradient(rows, wanted) for rows, wanted in pieces), strict=True)
        found: torch.Tensor = _Known.apply(hidden, torch.cat(values), torch.cat(gradients))
        return found

    def _whole(self, cluster: ClusterStates, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        """One layer on every token of a cluster [N, D] -> [N, D]."""
        past, record = cluster.past, None
        result = []
        if past:
            record = _Record()
            chain = Pack(end=[past] * past, depth=list(range(past)), tokens=[0] * past)
            result.append(self._call(layer, hidden[None, :past], [chain.depth], record, self.lm._masks(chain, 0))[0])
        for pack in cluster.packs:
            one = hidden[None, pack.start : pack.start + len(pack.pack.tokens)]
            masks = self.lm._masks(pack.pack, past)
            result.append(self._call(layer, one, [pack.pack.depth], _After(record), masks)[0])
        return torch.cat(result)

    def _last(self, states: States, layer: LayerWeights, hidden: Sequence[torch.Tensor], first: bool) -> torch.Tensor:
        """The last layer at the answers [A, D]; `first`: it is also the first, so `hidden` is the same in every trial."""
        if not states.blocks:
            with _plain():
                states.blocks.extend(list(self._blocks(states)))  # whole or not at all
        result = []
        for index, block in enumerate(states.blocks):

            def whole(block: _Block = block) -> torch.Tensor:
                return torch.cat([hidden[cluster] for cluster in block.clusters])

            def asking(block: _Block = block, whole: Callable[[], torch.Tensor] = whole) -> torch.Tensor:
                return whole()[torch.cat([call.rows.flatten() for call in block.calls])]

            keys, values = self._keys_values(states, index, layer, whole, first)
            rows = (self._same(states, index, "asking", asking) if first else asking()).split(
                [call.rows.numel() for call in block.calls]
            )
            # Split, not sliced: the gradient of every slice of a large tensor is a large tensor, mostly of zeros.
            split = keys.split(block.sizes, dim=2), values.split(block.sizes, dim=2)
            for call, some in zip(block.calls, rows, strict=True):
                cache = _Return(*(call.gather(one) for one in split))
                result.append(self._call(layer, some.view(*call.rows.shape, -1), call.depth, cache, call.masks)[call.real])
        return _in_order(result, [number for block in states.blocks for number in block.numbers])

    def _same(self, states: States, block: int, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What every trial on these states makes alike, made once."""
        if (block, name) not in states.same:
            with _plain():
                states.same[block, name] = make()
        return states.same[block, name]

    def _keys_values(
        self, states: States, index: int, layer: LayerWeights, whole: Callable[[], torch.Tensor], first: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of every token of a block in one layer, each [1, heads, N, head_dim]."""
        capture, short = _Capture(), self._folded(self._without_queries(layer), first)
        depth = states.blocks[index].depth
        module = self.layers[layer.base]
        norm = getattr(module, "input_layernorm", None)
        try:
            if norm is None or not first or NORM in short.changed:
                self._call(short, whole()[None], depth, capture, None)
            else:
                # The first layer above the cut gets the same input in every trial, and its norm is the same too: the layer's
                # own, or one of ones where a changed weight went into the matrices.
                own = NORM not in layer.changed
                ones = {} if own else {"weight": torch.ones_like(norm.weight) - self._norm_offset}
                name = f"normed {layer.base}" if own else "normed by ones"
                normed = self._same(states, index, name, lambda: functional_call(norm, ones, (whole()[None],)))
                attention = {k.removeprefix("self_attn."): v for k, v in short.changed.items() if k.startswith("self_attn.")}
                arguments = self._at(layer.base, depth, capture, None)
                functional_call(module.self_attn, attention, (), {"hidden_states": normed, **arguments})
        except _StopHere:
            pass
        return capture.keys, capture.values

    def _folded(self, layer: LayerWeights, first: bool) -> LayerWeights:
        """The layer with a changed input norm multiplied into the matrices that read it, where that saves work and is exact.

        Its gradient then needs no gradient of the states of every token. In float32 only: products would be rounded.
        """
        weight = layer.changed.get(NORM)
        exact = self._known_norms and "input_layernorm.bias" not in self.weights[layer.base]
        if weight is None or not first or not exact or weight.dtype != torch.float32:
            return layer
        gain = weight + self._norm_offset
        changed = {name: value for name, value in layer.changed.items() if name != NORM}
        for name, own in self.weights[layer.base].items():
            if name.removesuffix(".weight") in ATTENTION_READERS and name.endswith(".weight"):
                changed[name] = (changed[name] if name in changed else own) * gain
        return LayerWeights(layer.base, changed)

    def _blocks(self, states: States) -> Iterator[_Block]:
        """Neighbouring clusters together, as long as they have at most BLOCK_TOKENS tokens."""
        device = self.lm.device
        clusters: list[int] = []
        depth, sizes, groups = list[int](), list[int](), list[_Group]()
        for i, cluster in enumerate(states.clusters):
            prefix = (len(sizes),) if cluster.past else ()
            sizes += [cluster.past] if cluster.past else []
            for group in self._groups(cluster, len(depth), prefix, len(sizes)):
                groups.append(group)
                sizes.append(group.length - cluster.past)
            depth += cluster.depth
            clusters.append(i)
            after = states.clusters[i + 1 : i + 2]
            if after and len(depth) + len(after[0].hidden) <= BLOCK_TOKENS:
                continue
            calls, numbers = [], list[int]()
            for some in _alike(groups):
                calls.append(_side_by_side(some))
                numbers += [number for group in some for number in group.numbers]
            yield _Block(clusters, torch.tensor([depth], device=device), sizes, calls, numbers)
            clusters, depth, sizes, groups = [], [], [], []

    def _groups(self, cluster: ClusterStates, offset: int, prefix: tuple[int, ...], piece: int) -> Iterator[_Group]:
        """Neighbouring packs of a cluster joined, as long as their mask stays within GROUP_ENTRIES."""
        device, joined, rows, numbers, start = self.lm.device, Pack(), list[int](), list[int](), offset + cluster.past
        for i, pack in enumerate(cluster.packs):
            before = len(joined.tokens)
            joined.tokens += pack.pack.tokens
            joined.depth += pack.pack.depth
            joined.end += [end + before for end in pack.pack.end]
            rows += [row + before for row in pack.rows]
            numbers += pack.answers
            after = cluster.packs[i + 1 : i + 2]
            together = [len(joined.tokens) + len(one.pack.tokens) for one in after]
            if after and (len(rows) + len(after[0].rows)) * (cluster.past + together[0]) <= GROUP_ENTRIES:
                continue
            masks = self.lm._masks(joined, cluster.past, rows)
            kinds: dict[str | None, torch.Tensor] = dict(masks.items()) if isinstance(masks, dict) else {None: masks}
            at = torch.tensor(rows, device=device)
            yield _Group(
                at + start,
                numbers,
                torch.tensor(joined.depth, device=device)[at],
                kinds,
                (*prefix, piece),
                cluster.past + len(joined.tokens),
            )
            start, piece = start + len(joined.tokens), piece + 1
            joined, rows, numbers = Pack(), [], []

    def _call(self, layer: LayerWeights, hidden: torch.Tensor, depth: Any, cache: Any, masks: Any) -> torch.Tensor:
        """The layer's own forward on [B, T, D] at positions `depth` [B, T]."""
        arguments = self._at(layer.base, torch.as_tensor(depth, device=hidden.device), cache, masks)
        found = functional_call(self.layers[layer.base], dict(layer.changed), (hidden,), arguments)
        output: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return output

    def _at(self, base: int, position: torch.Tensor, cache: Any, masks: Any) -> dict[str, Any]:
        """The arguments that the model gives to layer `base`, for tokens at `position` [B, T]."""
        template = self._arguments(base, int(position.max()) + 1)
        arguments = {k: v for k, v in template.items() if k not in ("cache_position", "hidden_states")}
        arguments |= {"past_key_values": cache, "use_cache": True, "position_ids": position}
        if "position_embeddings" in template:
            arguments["position_embeddings"] = tuple(table[0][position] for table in template["position_embeddings"])
        if "cache_position" in template:
            arguments["cache_position"] = position[0]
        per_kind = isinstance(masks, dict)
        arguments["attention_mask"] = masks[self.model.config.get_text_config().layer_types[base]] if per_kind else masks
        return arguments

    def _without_queries(self, layer: LayerWeights) -> LayerWeights:
        """The same layer with the query matrix cut down to one head of zeros, where queries have a matrix of their own."""
        attention = getattr(self.layers[layer.base], "self_attn", None)
        head_dim = getattr(attention, "head_dim", None)
        over_all_heads = [
            name
            for name, weight in self.weights[layer.base].items()
            if name.startswith("self_attn.q_norm.") and weight.numel() != head_dim
        ]
        queries = {name: weight for name, weight in self.weights[layer.base].items() if name.startswith("self_attn.q_proj.")}
        if head_dim is None or not queries or over_all_heads:
            return layer  # fused matrices (Phi-3) and norms over all heads compute their queries too
        stubs = {name: weight.new_zeros(head_dim, *weight.shape[1:]) for name, weight in queries.items()}
        return LayerWeights(layer.base, {**layer.changed, **stubs})

    def _arguments(self, layer: int, length: int) -> dict[str, Any]:
        """What the model hands to a layer, with rotary tables of at least `length` positions."""
        have = self._tables[0]["_length"] if self._tables else 0
        if have < length:
            length = max(length, min(2 * have, self.lm.max_length), 256)
            ids = torch.zeros(1, length, dtype=torch.long, device=self.lm.device)
            probes = [Probe(one) for one in self.layers]
            with instead_of_layers(self.decoder, probes), _plain():
                self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
            self._tables = [probe.arguments | {"_length": length} for probe in probes]
        return {k: v for k, v in self._tables[layer].items() if k != "_length"}


@contextmanager
def instead_of_layers(decoder: torch.nn.Module, modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, the decoder has these layers in place of its own."""
    model: Any = decoder
    before, model.layers = model.layers, torch.nn.ModuleList(modules)
    count, model.config.num_hidden_layers = model.config.num_hidden_layers, len(modules)
    try:
        yield
    finally:
        model.layers, model.config.num_hidden_layers = before, count


def _in_order(parts: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """What was found part by part, in the order of the answers' numbers."""
    found = torch.cat(list(parts))
    return found[torch.tensor(numbers, device=found.device).argsort()]


def _alike(groups: Sequence[_Group]) -> Iterator[list[_Group]]:
    """Groups of about the same size together, as many as stay within CALL_TOKENS after padding."""
    some: list[_Group] = []
    for group in sorted(groups, key=lambda one: (one.length, len(one.rows))):
        if some and (len(some) + 1) * group.length > CALL_TOKENS:
            yield some
            some = []
        some.append(group)
    if some:
        yield some


def _side_by_side(groups: Sequence[_Group]) -> _Call:
    """The groups padded to the same number of rows and keys; what is added is hidden."""
    most, length = max(len(group.rows) for group in groups), max(group.length for group in groups)
    masks: dict[str | None, list[torch.Tensor]] = {}
    rows, depth, real = [], [], []
    for group in groups:
        index = torch.zeros(most, dtype=torch.long, device=group.rows.device)
        index[: len(group.rows)] = torch.arange(len(group.rows), device=group.rows.device)
        rows.append(group.rows[index])
        depth.append(group.depth[index])
        real.append(torch.arange(most, device=index.device) < len(group.rows))
        for kind, mask in group.masks.items():
            hide = torch.finfo(mask.dtype).min
            masks.setdefault(kind, []).append(
                torch.nn.functional.pad(mask[:, :, index], (0, length - group.length), value=hide)
            )
    whole = {kind: torch.cat(several) for kind, several in masks.items()}
    pieces = [(group.pieces, length - group.length) for group in groups]
    return _Call(torch.stack(rows), torch.stack(real), torch.stack(depth), whole[None] if None in whole else whole, pieces)


class Mixture:
    """The rows of a search space from a cut on, with weights as sums that gradients flow through.

    The layers that can be mixed in a row are kept stacked, one copy beside the model, so that a sum reads them once.
    """

    def __init__(self, tail: Tail, space: Space, cut: int) -> None:
        self.rows = space.rows[cut:]
        if any(row.mixed or row.base != i for i, row in enumerate(space.rows[:cut])):
            raise TrialError(f"the space changes a row below {cut}, where the cached states enter")
        names = [name for name in tail.weights[0] if name.rpartition(".")[0] in space.groups]
        self.stacks = [
            {name: torch.stack([tail.weights[layer][name].detach() for layer in row.layers]) for name in names}
            for row in self.rows
            if row.mixed
        ]

    def layers(self, mixes: Sequence[Mapping[str, torch.Tensor]]) -> list[LayerWeights]:
        """The tail for coefficients of every mixed row (`Space.mixes`)."""
        found, mixed = [], iter(zip(self.stacks, mixes, strict=True))
        for row in self.rows:
            changed = {}
            if row.mixed:
                stack, table = next(mixed)
                # A tensor with bias and weight has one coefficient; sums are in float32 and rounded once, as in the executor.
                changed = {
                    name: torch.tensordot(table[name.rpartition(".")[0]].float(), layers.float(), dims=1).to(layers.dtype)
                    for name, layers in stack.items()
                }
            found.append(LayerWeights(row.base, changed))
        return found


def first_mixed(space: Space) -> int:
    """The first row that plans of the space may change."""
    return next((i for i, row in enumerate(space.rows) if row.mixed or row.base != i), len(space.rows))


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
        if not output.name.startswith(f"{checkpoint.stack}."):
            continue
        index, _, name = output.name.removeprefix(f"{checkpoint.stack}.").partition(".")
        own = f"{checkpoint.stack}.{plan.rows[int(index)].base}.{name}"
        # Not mixed does not mean the base layer's own: a coefficient of 1 on another layer is a copy of that one's tensor.
        if int(index) >= cut and (output.mixed or output.base.name != own):
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


@contextmanager
def _plain() -> Iterator[None]:
    """Inside, tensors are made that later trials may take gradients through, whatever mode this trial is run in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Known(torch.autograd.Function):
    """Values [A] of the rows of `hidden` [A, D] whose gradients [A, D] are known."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, values: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradients)
        return values

    @staticmethod
    def backward(ctx: Any, *incoming: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return incoming[0][:, None] * gradients, None, None


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


class Probe(torch.nn.Module):
    """A layer that notes what it is called with and passes its input on."""

    hidden: torch.Tensor
    arguments: dict[str, Any]

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.hidden, self.arguments = hidden_states, kwargs
        return hidden_states
