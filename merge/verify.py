"""Recomputes what a plan says and compares every tensor of an output with it.

Independent of the executor: numpy instead of torch, bit patterns instead of dtypes. Kept tensors must have the source's
bytes. Mixed ones must equal, bit for bit, the sum in the documented order of IEEE float32 operations, and must lie
within rounding of the closed form in float64, which shows that the arithmetic itself is right.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .blueprint import Blend, Blueprint, Output, make_blueprint
from .checkpoint import INDEX_FILE, Checkpoint, Tensor, read_checkpoint
from .errors import VerificationError
from .plan import read_plan
from .records import read_json
from .report import PLAN_FILE, REPORT_FILE, header_hashes, read_source_record
from .runtime import decide
from .source import Source, side_files
from .threads import pool_of

COMPARE_BLOCK = 4_000_000  # bytes compared at once
SUM_BLOCK = 131_072  # elements recomputed at once: the float64 buffers stay in the cache
MANTISSA_BITS = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52}  # stored ones

Array = npt.NDArray[Any]  # numbers in float16, 32 or 64
Bits = npt.NDArray[Any]  # their bit patterns


@dataclass(frozen=True)
class Verification:
    """What was compared. `worst_ulp` is the largest distance to the float64 closed form in units of the last place."""

    num_kept: int
    num_mixed: int
    bytes_compared: int
    mixed_elements: int
    correctly_rounded: int  # mixed elements within half a unit in the last place of the float64 value
    worst_ulp: float
    num_shared: int = 0  # kept tensors that lie in the source's own file (--link), so that there was nothing to compare

    def __add__(self, other: "Verification") -> "Verification":
        return Verification(
            self.num_kept + other.num_kept,
            self.num_mixed + other.num_mixed,
            self.bytes_compared + other.bytes_compared,
            self.mixed_elements + other.mixed_elements,
            self.correctly_rounded + other.correctly_rounded,
            max(self.worst_ulp, other.worst_ulp),
            self.num_shared + other.num_shared,
        )


def verify_folder(
    folder: Path, source: Source, progress: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None
) -> Verification:
    """Compares the output in `folder` with its plan applied to `source`.

    Args:
        progress: called once with the number of bytes to compare; what it returns is called with bytes done.

    Raises:
        VerificationError: a difference; the message names the tensor, the element and both values.
        RecordError, CheckpointError: the output or the source cannot be read at all.
    """
    record, dtype = read_source_record(folder)
    checkpoint = source.checkpoint()
    if header_hashes(checkpoint) != record.header_sha256:
        raise VerificationError(
            f"{folder} was made from another version of {record.spec}: the headers of {checkpoint.folder} have other hashes; "
            "give the right source with --model"
        )
    plan = read_plan(folder / PLAN_FILE)
    blueprint = make_blueprint(plan, checkpoint, dtype=dtype, allow_mixed_attention=True)
    result = read_checkpoint(folder)
    _compare_structure(folder, blueprint, result)
    _compare_side_files(folder, blueprint, result)
    done = progress(blueprint.bytes_total)
    nothing = Verification(0, 0, 0, 0, 0, 0.0)

    def check(output: Output) -> Verification:
        if stop.asked:
            return nothing
        found = result.tensors[output.name]
        one = (_check_kept if output.kept else _check_mixed)(blueprint, output, found, folder / found.file)
        done(output.nbytes)
        return one

    total = nothing
    with pool_of(decide().workers) as (pool, stop):
        for one in pool.map(check, blueprint.outputs):
            total += one
    return total


def _compare_structure(folder: Path, blueprint: Blueprint, result: Checkpoint) -> None:
    if result.config != blueprint.cut.config:
        keys = sorted({*result.config, *blueprint.cut.config})
        key = next(key for key in keys if result.config.get(key) != blueprint.cut.config.get(key))
        found, wanted = result.config.get(key), blueprint.cut.config.get(key)
        raise VerificationError(f"{folder / 'config.json'}: {key!r} is {found!r:.80}, expected {wanted!r:.80}")
    expected = {output.name: output for output in blueprint.outputs}
    for name in expected:
        if name not in result.tensors:
            raise VerificationError(f"{folder}: tensor {name} is missing")
    for name, found in result.tensors.items():
        if name not in expected:
            raise VerificationError(f"{folder}: tensor {name} is not in the plan")
        want = expected[name]
        if (found.dtype, found.shape) != (want.dtype, want.shape):
            raise VerificationError(f"{folder}: {name} is {found.dtype} {found.shape}, expected {want.dtype} {want.shape}")
    if (folder / INDEX_FILE).exists():
        size = read_json(folder / INDEX_FILE).get("metadata", {}).get("total_size")
        if size != blueprint.bytes_total:
            raise VerificationError(f"{folder / INDEX_FILE}: total_size is {size}, expected {blueprint.bytes_total}")


def _compare_side_files(folder: Path, blueprint: Blueprint, result: Checkpoint) -> None:
    handed_on = side_files(blueprint.checkpoint.folder, blueprint.checkpoint.config)
    known = {path.name for path in handed_on} | {shard.file for shard in blueprint.shards}
    known |= {"config.json", "README.md", INDEX_FILE, PLAN_FILE, REPORT_FILE}
    known |= {tensor.file for tensor in result.tensors.values()}
    for path in sorted(folder.iterdir()):
        if path.name not in known and not path.name.startswith("."):
            raise VerificationError(f"{path} does not belong to the output; loaders may read it: remove it")
    for path in handed_on:
        copy = folder / path.name
        if not copy.is_file() or copy.read_bytes() != path.read_bytes():
            raise VerificationError(f"{copy} is missing or differs from the source's {path.name}")


def _check_kept(blueprint: Blueprint, output: Output, found: Tensor, path: Path) -> Verification:
    source = output.base
    same = os.path.samefile(path, blueprint.checkpoint.path(source)) and source.start == found.start  # hard-linked
    with blueprint.checkpoint.path(source).open("rb") as one, path.open("rb") as two:
        for offset in range(0, 0 if same else source.nbytes, COMPARE_BLOCK):
            size = min(COMPARE_BLOCK, source.nbytes - offset)
            expected = _pread(one.fileno(), size, source.start + offset)
            actual = _pread(two.fileno(), size, found.start + offset)
            if expected != actual:
                byte = next(i for i in range(size) if expected[i : i + 1] != actual[i : i + 1])
                raise VerificationError(
                    f"{path}: {output.name} differs from {source.name} at byte {offset + byte} of the tensor "
                    f"({actual[byte : byte + 1].hex()}, expected {expected[byte : byte + 1].hex()})"
                )
    return Verification(1, 0, 0 if same else output.nbytes, 0, 0, 0.0, int(same))


def _check_mixed(blueprint: Blueprint, output: Output, found: Tensor, path: Path) -> Verification:
    total = Verification(0, 1, output.nbytes, 0, 0, 0.0)
    recompute = _Recompute(blueprint, output)
    width = output.shape[-1] if output.divisor is not None else 1
    step = max(1, SUM_BLOCK // width) * width
    with path.open("rb") as file:
        for first in range(0, found.numel, step):
            count = min(step, found.numel - first)
            itemsize = found.nbytes // found.numel
            actual = np.frombuffer(_pread(file.fileno(), count * itemsize, found.start + first * itemsize), f"<u{itemsize}")
            rounded, exact, slack = recompute.block(first, count)
            expected = _encode(rounded, output.dtype)
            wrong = np.flatnonzero(actual != expected)
            if len(wrong):
                index = int(wrong[0])
                got, want = _decode(actual, output.dtype)[index], _decode(expected, output.dtype)[index]
                raise VerificationError(
                    f"{path}: {output.name} element {first + index} is {got!r:.40}, expected {want!r:.40} by the plan "
                    f"({len(wrong)} of {count} elements differ in this block)"
                )
            value = _decode(actual, output.dtype).astype(np.float64)
            ulp = _ulp(value, output.dtype)
            error = np.abs(value - exact)
            if output.blend is None and bool((error > 0.5 * ulp + slack).any()):
                index = int(np.argmax(error - 0.5 * ulp - slack))
                raise VerificationError(
                    f"{path}: {output.name} element {first + index} is {value[index]:g}, but the closed form in float64 is "
                    f"{exact[index]:g}: more than rounding apart"
                )
            in_ulp = error / ulp
            total += Verification(0, 0, 0, count, int((in_ulp <= 0.5).sum()), float(in_ulp.max(initial=0.0)))
    return total


class _Recompute:
    """The values that a mixed tensor must have, block by block."""

    def __init__(self, blueprint: Blueprint, output: Output) -> None:
        self.blueprint = blueprint
        self.output = output
        self.compute: Any = np.float64 if output.base.dtype == "F64" else np.float32
        gains = [term.gain for term in output.terms if term.gain is not None]
        self.gains = {gain.name: self._gain(gain) for gain in [*gains, *([output.divisor] if output.divisor else [])]}

    def block(self, first: int, count: int) -> tuple[Array, Array, Array]:
        """(value in the compute dtype, closed form in float64, bound on their distance from the arithmetic's rounding)."""
        output = self.output
        exact, size = np.zeros(count), np.zeros(count)
        total = np.zeros(count, self.compute)
        width = output.shape[-1] if output.divisor is not None else 1
        for index, term in enumerate(output.terms):
            stored = self._load(term.tensor, first, count)
            part, precise = stored.astype(self.compute), stored.astype(np.float64)
            if term.gain is not None:
                gain = self.gains[term.gain.name]
                part = (part.reshape(-1, width) * gain).reshape(-1)
                precise = (precise.reshape(-1, width) * gain.astype(np.float64)).reshape(-1)
            if term.coefficient != 1.0:
                part = part * self.compute(term.coefficient)
            total = part if index == 0 else total + part
            exact += term.coefficient * precise
            size += np.abs(term.coefficient * precise)
        if output.divisor is not None:
            gain = self.gains[output.divisor.name]
            total = (total.reshape(-1, width) / gain).reshape(-1)
            exact = (exact.reshape(-1, width) / gain.astype(np.float64)).reshape(-1)
            size = (size.reshape(-1, width) / np.abs(gain.astype(np.float64))).reshape(-1)
        slack = size * (len(output.terms) + 4) * float(np.finfo(self.compute).eps)
        if self.compute is np.float64 and output.dtype != "F64":
            slack = slack + size * float(np.finfo(np.float32).eps)  # rounded to float32 on the way
        if output.blend is not None:
            total = self._blend(output.blend, first, count)
        return total, exact, slack

    def _blend(self, blend: Blend, first: int, count: int) -> Array:
        value = self._load(blend.tensor, first, count).astype(self.compute)
        for alpha, other in blend.steps:
            upper = self._blend(other, first, count) * self.compute(1.0 - alpha)
            value = value * self.compute(alpha) + upper
            value = _decode(_encode(value, blend.tensor.dtype), blend.tensor.dtype).astype(self.compute)
        return value

    def _load(self, tensor: Tensor, first: int, count: int) -> Array:
        itemsize = tensor.nbytes // tensor.numel
        with self.blueprint.checkpoint.path(tensor).open("rb") as file:
            data = _pread(file.fileno(), count * itemsize, tensor.start + first * itemsize)
        return _decode(np.frombuffer(data, f"<u{itemsize}"), tensor.dtype)

    def _gain(self, tensor: Tensor) -> Array:
        gain: Array = self._load(tensor, 0, tensor.numel).astype(self.compute) + self.compute(self.blueprint.norm_offset)
        return gain


def _decode(bits: Bits, dtype: str) -> Array:
    """Numbers from bit patterns; bf16 is the upper half of a float32."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])


def _encode(values: Array, dtype: str) -> Bits:
    """Bit patterns of numbers, rounded to nearest even."""
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return rounded.astype(np.uint16)
    kind, width = {"F16": (np.float16, "u2"), "F32": (np.float32, "u4"), "F64": (np.float64, "u8")}[dtype]
    if dtype == "F16":
        values = values.astype(np.float32)  # as torch does: a float64 is rounded to float32 on the way
    return values.astype(kind).view(width)


def _ulp(values: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[np.float64]:
    """The distance between neighbouring numbers of `dtype` around `values`."""
    smallest = {"BF16": -133, "F16": -24, "F32": -149, "F64": -1074}[dtype]
    _, exponent = np.frexp(values)
    exponent = np.where(values == 0, smallest, exponent - 1 - MANTISSA_BITS[dtype])
    return np.asarray(np.ldexp(1.0, np.maximum(exponent, smallest)))


def _pread(file: int, size: int, start: int) -> bytes:
    parts = []
    while size:
        data = os.pread(file, size, start)
        if not data:
            raise VerificationError("a file ended early while it was read; it was changed meanwhile: run again")
        parts.append(data)
        size, start = size - len(data), start + len(data)
    return b"".join(parts)
