"""Plan x checkpoint headers = every output tensor with its sources, its shard and its offset, before a byte is read.

All that can be wrong with applying a plan to a model is found here. What comes out says for every byte of the result where
it comes from; `execute` carries it out, `verify` recomputes it, `--dry-run` prints it.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from huggingface_hub import split_state_dict_into_shards_factory

from .checkpoint import DTYPE_BITS, FUSED, SINGLE_FILE, Checkpoint, Tensor, encode_header, is_tied
from .errors import PlanError
from .families import FAMILIES, GROUPS, group_of, kind_of, norm_read_by
from .layer_config import CutConfig, cut_config, mixed_attention
from .plan import SUM_TOLERANCE, Mix, Plan, Row
from .runtime import DTYPES, FLOATS, output_dtype

DEFAULT_SHARD_SIZE = "5GB"  # decimal, as the Hub counts; the Hub's own default


@dataclass(frozen=True)
class Term:
    """One summand: coefficient x tensor, whose columns are first multiplied by `gain` (a norm weight) if there is one."""

    tensor: Tensor
    coefficient: float
    gain: Tensor | None = None


@dataclass(frozen=True)
class Blend:
    """A tensor after steps, each rounded: for (alpha, other) in order, value <- round(alpha value + (1 - alpha) other)."""

    tensor: Tensor
    steps: tuple[tuple[float, "Blend"], ...] = ()


@dataclass(frozen=True)
class Output:
    """One tensor of the result: the sum of `terms`, columns divided by `divisor`; `blend` where every step is rounded."""

    name: str
    dtype: str
    terms: tuple[Term, ...]
    divisor: Tensor | None = None
    blend: Blend | None = None

    @property
    def base(self) -> Tensor:
        """A source tensor of the same shape; the only one of a kept tensor."""
        return self.terms[0].tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, the same as that of every term."""
        return self.base.shape

    @property
    def nbytes(self) -> int:
        """Size in the result."""
        return self.base.numel * DTYPE_BITS[self.dtype] // 8

    @property
    def mixed(self) -> bool:
        """Whether the values differ from every source tensor's, so that they have to be computed."""
        return len(self.terms) > 1 or self.terms[0].coefficient != 1.0 or self.terms[0].gain is not None

    @property
    def kept(self) -> bool:
        """Whether the bytes are those of a source tensor."""
        return not self.mixed and self.dtype == self.base.dtype


@dataclass(frozen=True)
class Shard:
    """One file of the result: header, then `outputs` in order from offset `len(header)`; or a link to a source file."""

    file: str
    outputs: tuple[Output, ...]
    linked_to: str | None = None

    @property
    def header(self) -> bytes:
        """The length field and header of the file."""
        return encode_header((out.name, out.dtype, out.shape, out.nbytes) for out in self.outputs)

    @property
    def placed(self) -> list[tuple[Output, int]]:
        """Each output with its absolute byte offset."""
        position = len(self.header)
        result = []
        for output in self.outputs:
            result.append((output, position))
            position += output.nbytes
        return result

    @property
    def nbytes(self) -> int:
        """Size of the tensors, without the header."""
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class Blueprint:
    """Everything about a result that headers alone can tell."""

    plan: Plan
    checkpoint: Checkpoint
    shards: tuple[Shard, ...]
    cut: CutConfig
    warnings: tuple[str, ...]
    norm_offset: float

    @property
    def outputs(self) -> list[Output]:
        """All tensors of the result in the order of the shards."""
        return [output for shard in self.shards for output in shard.outputs]

    @property
    def num_parameters(self) -> int:
        """Parameters of the result, tied ones once, buffers not counted."""
        return count_parameters({output.name: output.base for output in self.outputs}, self.cut.config)

    @property
    def bytes_total(self) -> int:
        """Size of all tensors of the result."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def bytes_to_write(self) -> int:
        """Size of what has to be written: everything that is not linked, headers included."""
        return sum(shard.nbytes + len(shard.header) for shard in self.shards if shard.linked_to is None)

    @property
    def bytes_to_compute(self) -> int:
        """Size of the tensors that are copied or summed: what a progress bar counts."""
        return sum(shard.nbytes for shard in self.shards if shard.linked_to is None)

    @property
    def bytes_to_read(self) -> int:
        """Size of the source tensors that have to be read, once for each use."""
        used = [term for shard in self.shards if shard.linked_to is None for out in shard.outputs for term in out.terms]
        return sum(term.tensor.nbytes for term in used)

    @property
    def index(self) -> dict[str, object] | None:
        """The content of the index file; None for a single shard, which needs none."""
        if len(self.shards) == 1:
            return None
        weight_map = {output.name: shard.file for shard in self.shards for output in shard.outputs}
        metadata = {"total_size": self.bytes_total, "total_parameters": self.num_parameters}
        return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def make_blueprint(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    link: bool = False,
    allow_mixed_attention: bool = False,
) -> Blueprint:
    """How `plan` applied to `checkpoint` is put together.

    Args:
        dtype: one of `runtime.DTYPES`; 'auto' keeps every tensor's own.
        max_shard_size: bytes, or a text such as '5GB' in the Hub's decimal units.
        link: shards of the source in which nothing changes become shards of the result as they are.
        allow_mixed_attention: accept what `layer_config.mixed_attention` finds, as a warning.

    Raises:
        PlanError: the plan does not fit the model; the message names the tensor, what was found and what to do.
    """
    if checkpoint.model_type == FUSED:
        raise PlanError(
            f"{checkpoint.folder} is a fused model, whose fusers were made for its host as it is; fuse the host's layers "
            "first: 'alphas' of the host in the config of scripts/fuse.py"
        )
    if plan.num_hidden_layers != checkpoint.num_hidden_layers:
        raise PlanError(
            f"the plan is for {plan.num_hidden_layers} layers but {checkpoint.folder} has {checkpoint.num_hidden_layers}; "
            "use a plan made for this model"
        )
    if dtype not in DTYPES:
        raise PlanError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    cut = cut_config(checkpoint.config, plan.keep)
    if dtype != "auto":
        cut.config.update({key: dtype for key in ("dtype", "torch_dtype") if key in cut.config} or {"dtype": dtype})
    attention = mixed_attention(plan, checkpoint.config)
    if attention and not allow_mixed_attention:
        more = f" (and {len(attention) - 1} more)" if len(attention) > 1 else ""
        raise PlanError(f"{attention[0]}{more}; to do it all the same, give --allow-mixed-attention")
    if dtype != "auto" and checkpoint.quantised:
        raise PlanError(f"{checkpoint.folder}: quantised weights cannot be converted to {dtype}; use --dtype auto")
    family = FAMILIES.get(checkpoint.model_type)
    _check_mode(plan, checkpoint)

    outputs = [Output(name, output_dtype(dtype, t.dtype), (Term(t, 1.0),)) for name, t in checkpoint.rest.items()]
    for index, row in enumerate(plan.rows):
        for name, tensor in checkpoint.layers[row.base].items():
            full_name = f"{checkpoint.stack}.{index}.{name}"
            outputs.append(_output(plan, row, name, full_name, output_dtype(dtype, tensor.dtype), checkpoint))

    # In the source's order neighbours stay neighbours, so that long runs are copied in one piece; wide dtypes first, so
    # that each tensor is aligned to its own.
    order = {file.name: position for position, file in enumerate(checkpoint.files)}
    outputs.sort(key=lambda out: (-DTYPE_BITS[out.dtype], order[out.base.file], out.base.start))
    shards = _into_shards(outputs, checkpoint, max_shard_size, link)
    return Blueprint(plan, checkpoint, shards, cut, tuple(attention), family.norm_offset if family else 0.0)


def count_parameters(tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> int:
    """Number of parameters in `tensors`: a head that is tied to the embeddings counts once, buffers not at all."""
    has_head = "lm_head.weight" in tensors
    skip = {"lm_head.weight"} if is_tied(config, has_head) else set()
    return sum(t.numel for name, t in tensors.items() if name not in skip and not name.endswith("rotary_emb.inv_freq"))


def _check_mode(plan: Plan, checkpoint: Checkpoint) -> None:
    mixes = not all(row.is_unit for row in plan.rows)
    if mixes and checkpoint.quantised:
        raise PlanError(
            f"{checkpoint.folder}: the weights are quantised (config.json: quantization_config), and packed numbers cannot "
            "be averaged; dequantise the model first, or drop layers instead of mixing them"
        )
    if mixes and plan.tensors == "fold-norms" and checkpoint.model_type not in FAMILIES:
        raise PlanError(
            f"fold-norms needs to know how {checkpoint.model_type!r} applies its norms; known: {', '.join(FAMILIES)}; "
            "use --tensors projections"
        )
    names = list(checkpoint.layers[0])

    def norm_of(name: str) -> str | None:
        return norm_read_by(name, names)

    known = sorted({group_of(name) for name in names})
    for index, row in enumerate(plan.rows):
        for group in row.groups:
            if group not in known:
                raise PlanError(f"row {index}: there is no tensor group {group!r} in this model; it has {', '.join(known)}")
            if plan.tensors == "fold-norms" and group in {group_of(n) for n in map(norm_of, names) if n}:
                raise PlanError(
                    f"row {index}: group {group!r} is folded into the matrices that read it; leave it out or use 'all'"
                )
        unknown = [] if row.is_unit else [name for name in names if kind_of(name) is None]
        if unknown:
            raise PlanError(
                f"row {index}: {checkpoint.stack}.{row.base}.{unknown[0]} is of no known kind, so it cannot be said whether "
                f"to mix it; known: {', '.join(GROUPS)}; only dropping layers is possible for this model"
            )


def _output(plan: Plan, row: Row, name: str, full_name: str, dtype: str, checkpoint: Checkpoint) -> Output:
    """The tensor `name` of the layer that `row` makes."""
    layers = checkpoint.layers
    mix = _mix_of(plan, row, name)
    if mix == {row.base: 1.0}:
        return Output(full_name, dtype, (Term(layers[row.base][name], 1.0),))
    base = layers[row.base][name]
    for layer in mix:
        _check_mixable(base, layers[layer][name])
    if kind_of(name) == "norm":
        _check_norm_mix(full_name, mix, checkpoint)
    if plan.arithmetic == "sequential":
        terms = tuple(Term(layers[layer][name], c) for layer, c in mix.items())
        return Output(full_name, dtype, terms, blend=_blend(plan, row.base, name, layers))
    norm = norm_read_by(name, list(layers[row.base])) if plan.tensors == "fold-norms" else None
    if norm is None:
        return Output(full_name, dtype, tuple(Term(layers[layer][name], c) for layer, c in mix.items()))
    gains = {layer: layers[layer][norm] for layer in {*mix, row.base}}
    for gain in gains.values():
        _check_mixable(gains[row.base], gain)
    terms = tuple(Term(layers[layer][name], c, gains[layer]) for layer, c in mix.items())
    return Output(full_name, dtype, terms, divisor=gains[row.base])


def _mix_of(plan: Plan, row: Row, name: str) -> Mix:
    """The coefficients of one tensor: its group's own, or the row's where the plan's mode includes its kind."""
    group = group_of(name)
    mixed_kinds = ("projection", "norm") if plan.tensors == "all" else ("projection",)
    mix = row.groups.get(group) or (row.mix if kind_of(name) in mixed_kinds else {row.base: 1.0})
    return {layer: mix[layer] for layer in sorted(mix) if mix[layer] != 0.0} or mix  # sums go upwards, whoever made the plan


def _blend(plan: Plan, layer: int, name: str, layers: tuple[Mapping[str, Tensor], ...]) -> Blend:
    into = [step for step in plan.steps if step.into == layer]
    return Blend(layers[layer][name], tuple((step.alpha, _blend(plan, step.remove, name, layers)) for step in into))


def _check_mixable(one: Tensor, two: Tensor) -> None:
    if one.shape != two.shape:
        raise PlanError(f"{two.name} is {two.shape} but {one.name} is {one.shape}; only equal shapes can be mixed")
    if one.dtype != two.dtype:
        raise PlanError(f"{two.name} is stored as {two.dtype} but {one.name} as {one.dtype}; save the model in one dtype first")
    if one.dtype not in FLOATS:
        raise PlanError(
            f"{one.name} is stored as {one.dtype}; expected one of {', '.join(FLOATS)}: quantised or integer weights cannot "
            "be averaged, dequantise the model first or drop layers instead"
        )


def _check_norm_mix(full_name: str, mix: Mix, checkpoint: Checkpoint) -> None:
    negative = [layer for layer, c in mix.items() if c < 0]
    if negative:
        raise PlanError(
            f"{full_name}: the coefficient of layer {negative[0]} is {mix[negative[0]]:g}; norms cannot be mixed with negative "
            "weights: use --tensors projections"
        )
    family = FAMILIES.get(checkpoint.model_type)
    if family and family.norm_offset and abs(math.fsum(mix.values()) - 1.0) > SUM_TOLERANCE:
        raise PlanError(
            f"{full_name}: the coefficients sum to {math.fsum(mix.values()):g}, but {checkpoint.model_type} stores norms as "
            "weight - 1, which only coefficients that sum to 1 keep; use --tensors projections"
        )


def _into_shards(outputs: list[Output], checkpoint: Checkpoint, max_shard_size: int | str, link: bool) -> tuple[Shard, ...]:
    linked: dict[str, list[Output]] = {file: [] for file in (_unchanged_files(outputs, checkpoint) if link else [])}
    by_name: dict[str, Output] = {}
    for out in outputs:
        if out.base.file in linked and out.name == out.base.name:
            linked[out.base.file].append(out)
        else:
            by_name[out.name] = out
    contents: list[tuple[str | None, list[Output]]] = [
        (file, sorted(outs, key=lambda out: out.base.start)) for file, outs in linked.items()
    ]
    if by_name:
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda out: out.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=_shard_size(max_shard_size),
        )
        contents += [(None, [by_name[name] for name in names]) for names in split.filename_to_tensors.values()]
    total = len(contents)
    return tuple(
        Shard(SINGLE_FILE if total == 1 else f"model-{i:05d}-of-{total:05d}.safetensors", tuple(outs), linked_to=file)
        for i, (file, outs) in enumerate(contents, start=1)
    )


def _unchanged_files(outputs: Iterable[Output], checkpoint: Checkpoint) -> list[str]:
    """Source files whose every tensor is in the result under its own name with its own bytes."""
    kept = {out.name for out in outputs if out.kept and out.base.name == out.name}
    held: dict[str, list[str]] = {file.name: [] for file in checkpoint.files}
    for tensor in checkpoint.tensors.values():
        held[tensor.file].append(tensor.name)
    return [file for file, names in held.items() if names and kept.issuperset(names)]


def _shard_size(size: int | str) -> int | str:
    """`size`, if it is one that the Hub's parser reads as a positive number of bytes."""
    if isinstance(size, int) or size.isdecimal():
        size = int(size)
        valid = size > 0
    else:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[KMGT]B", size.strip(), re.IGNORECASE)
        valid = match is not None and float(match[1]) > 0
    if not valid:
        raise PlanError(f"shard size {size!r} cannot be read; expected a number of bytes or a text such as 5GB or 500MB")
    return size
