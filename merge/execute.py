"""Carries out a blueprint: kept tensors are copied as bytes, mixed ones are summed block by block.

The physical limit is moving the kept bytes from one file to another, so that goes to the kernel (copy_file_range: no
decoding, no user memory) on threads of its own while sums are made beside it. A sum takes blocks that stay in the cache:
read from each source, convert to float32, multiply, add, convert once, write. No tensor, shard or model is ever held.

Arithmetic: terms in ascending layer order, each product and each sum rounded to float32 (no fused multiply-add), one
rounding to nearest even at the end. These are IEEE operations, so every machine and device writes the same bytes.
"""

import errno
import fcntl
import importlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .blueprint import Blend, Blueprint, Output, Shard, Term
from .checkpoint import Tensor
from .errors import CheckpointError
from .runtime import FLOATS, Runtime, compute_dtype, one_thread_each, torch_dtype
from .threads import Stop, pool_of

if TYPE_CHECKING:
    import torch

COPY_CHUNK = 64_000_000  # bytes per system call: a stop request is noticed between two
COPY_JOB = 512_000_000  # bytes per thread task: long runs are shared between threads
MIX_BLOCK = 131_072  # elements: input, two float32 buffers and output take 1.6 MB, which fits a core's L2 cache; smaller
# blocks spend their time handing Python's lock from thread to thread
MIX_JOB = 4_000_000  # elements per thread task
_FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file

Progress = Callable[[int], None]  # called with the number of bytes just written, from any thread


@dataclass(frozen=True)
class Traffic:
    """Bytes moved: `linked_by` tells for each linked file whether blocks were shared ('reflink') or the name ('hard link')."""

    copied: int
    mixed: int
    linked: int
    linked_by: dict[str, str]


@dataclass(frozen=True)
class _Copy:
    source: Path
    source_start: int
    target: int  # file descriptor
    target_start: int
    nbytes: int


@dataclass(frozen=True)
class _Sum:
    output: Output
    target: int
    target_start: int  # of the whole tensor
    first: int  # element
    count: int


def execute(
    blueprint: Blueprint,
    folder: Path,
    runtime: Runtime,
    progress: Progress = lambda nbytes: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Traffic:
    """Writes the shards of a blueprint into `folder`, which must be empty of them.

    `meanwhile` runs in the calling thread while the copying goes on; what it raises ends the whole.

    Raises:
        CheckpointError: a source file is shorter than its header says, or a mixed tensor holds NaN or infinities.
        OSError: writing failed.
    """
    with ExitStack() as stack:
        copies: list[_Copy] = []
        sums: deque[_Sum] = deque()
        linked_by: dict[str, str] = {}
        for shard in blueprint.shards:
            if shard.linked_to is not None:
                linked_by[shard.file] = _link(blueprint.checkpoint.folder / shard.linked_to, folder / shard.file)
                continue
            target = os.open(folder / shard.file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            stack.callback(os.close, target)
            os.ftruncate(target, len(shard.header) + shard.nbytes)
            _write(target, shard.header, 0)
            copies += _copies(blueprint, shard, target)
            sums.extend(_sums(shard, target))

        def drain() -> None:
            with ExitStack() as own:
                summer = _Summer(blueprint, runtime, own)
                while not stop.asked:
                    try:
                        job = sums.popleft()
                    except IndexError:
                        return
                    summer.run(job, progress, stop)

        with pool_of(runtime.workers) as (pool, stop):
            futures = [pool.submit(_or_stop, stop, _copy, job, progress, stop) for job in copies]
            if sums:
                torch = importlib.import_module("torch")  # takes seconds: the copying has begun
                stack.enter_context(one_thread_each(torch))
                futures += [pool.submit(_or_stop, stop, drain) for _ in range(runtime.workers - 1)]
                drain()
            if not stop.asked:
                meanwhile()
            _await(futures)
    return Traffic(
        copied=sum(job.nbytes for job in copies),
        mixed=sum(o.nbytes for s in blueprint.shards if s.linked_to is None for o in s.outputs if not o.kept),
        linked=sum(shard.nbytes for shard in blueprint.shards if shard.linked_to is not None),
        linked_by=linked_by,
    )


def _read_vector(blueprint: Blueprint, tensor: Tensor) -> "torch.Tensor":
    """A small tensor (a norm weight) as the factor that the model multiplies by, in its compute dtype."""
    raw = bytearray(tensor.nbytes)
    with blueprint.checkpoint.path(tensor).open("rb") as file:
        _read(file.fileno(), memoryview(raw), tensor.start, blueprint.checkpoint.path(tensor))
    stored = importlib.import_module("torch").frombuffer(raw, dtype=torch_dtype(FLOATS[tensor.dtype]))
    factor: torch.Tensor = stored.to(torch_dtype(compute_dtype(tensor.dtype))) + blueprint.norm_offset
    return factor


# ---------------------------------------------------------------------------------------------------------------------
# Copying


def _copies(blueprint: Blueprint, shard: Shard, target: int) -> Iterator[_Copy]:
    """The kept tensors of a shard as few long runs: neighbours in both files are one run."""
    run: _Copy | None = None
    for output, start in shard.placed:
        if not output.kept or not output.nbytes:
            continue
        tensor = output.base
        source = blueprint.checkpoint.path(tensor)
        if (
            run
            and run.source == source
            and run.source_start + run.nbytes == tensor.start
            and run.target_start + run.nbytes == start
        ):
            run = _Copy(source, run.source_start, target, run.target_start, run.nbytes + tensor.nbytes)
            continue
        if run:
            yield from _pieces(run)
        run = _Copy(source, tensor.start, target, start, tensor.nbytes)
    if run:
        yield from _pieces(run)


def _pieces(run: _Copy) -> Iterator[_Copy]:
    for done in range(0, run.nbytes, COPY_JOB):
        size = min(COPY_JOB, run.nbytes - done)
        yield _Copy(run.source, run.source_start + done, run.target, run.target_start + done, size)


def _copy(job: _Copy, progress: Progress, stop: Stop) -> None:
    try:
        source = os.open(job.source, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{job.source} cannot be read: {error.strerror or error}") from error
    try:
        copy_range = _kernel_copy if hasattr(os, "copy_file_range") else _plain_copy
        done = 0
        while done < job.nbytes and not stop.asked:
            want = min(COPY_CHUNK, job.nbytes - done)
            try:
                moved = copy_range(source, job.target, want, job.source_start + done, job.target_start + done)
            except OSError as error:
                unsupported = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
                if copy_range is _plain_copy or error.errno not in unsupported:
                    raise
                moved = 0
            if moved == 0:
                if copy_range is _plain_copy:
                    raise CheckpointError(f"{job.source} ended early; it was changed while it was read: run again")
                copy_range = _plain_copy  # another file system, or one that cannot do it
                continue
            done += moved
            progress(moved)
    finally:
        os.close(source)


def _kernel_copy(source: int, target: int, count: int, source_start: int, target_start: int) -> int:
    return os.copy_file_range(source, target, count, source_start, target_start)


def _plain_copy(source: int, target: int, count: int, source_start: int, target_start: int) -> int:
    data = os.pread(source, min(count, 8_000_000), source_start)
    _write(target, data, target_start)
    return len(data)


def _link(source: Path, target: Path) -> str:
    """Makes `target` the same file content as `source` without copying; returns how."""
    real = source.resolve()  # in the Hub's cache, names are links
    with real.open("rb") as original, target.open("xb") as clone:
        try:
            fcntl.ioctl(clone, _FICLONE, original.fileno())
            return "reflink"
        except OSError:
            pass
    target.unlink()
    try:
        os.link(real, target)
    except OSError as error:
        raise OSError(error.errno, f"--link cannot link {real} ({error.strerror}); run without --link") from error
    return "hard link"


def _write(target: int, data: "bytes | memoryview", start: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(target, view, start)
        view, start = view[written:], start + written


def _read(source: int, buffer: memoryview, start: int, path: Path) -> None:
    while buffer:
        try:
            count = os.preadv(source, [buffer], start)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        if count == 0:
            raise CheckpointError(f"{path} ended early; it was changed while it was read: run again")
        buffer, start = buffer[count:], start + count


# ---------------------------------------------------------------------------------------------------------------------
# Summing


def _sums(shard: Shard, target: int) -> Iterator[_Sum]:
    for output, start in shard.placed:
        if output.kept:
            continue
        columns = output.shape[-1] if output.shape else 1
        step = max(1, MIX_JOB // max(columns, 1)) * columns  # whole rows, so that gains line up
        for first in range(0, output.base.numel, max(step, 1)):
            yield _Sum(output, target, start, first, min(step, output.base.numel - first))


class _Summer:
    """One thread's files and buffers."""

    def __init__(self, blueprint: Blueprint, runtime: Runtime, stack: ExitStack) -> None:
        self.torch = importlib.import_module("torch")
        self.blueprint = blueprint
        self.device = runtime.device
        self.stack = stack
        self.files: dict[str, int] = {}
        self.gains: dict[str, torch.Tensor] = {}
        self.buffers: dict[tuple[str, str], tuple[torch.Tensor, memoryview]] = {}

    def run(self, job: _Sum, progress: Progress, stop: Stop) -> None:
        output = job.output
        columns = output.shape[-1] if output.divisor is not None else 1
        step = max(1, MIX_BLOCK // columns) * columns  # whole rows where columns are scaled
        for first in range(job.first, job.first + job.count, step):
            if stop.asked:
                return
            count = min(step, job.first + job.count - first)
            value = self._blend(output.blend, first, count) if output.blend else self._sum(output, first, count)
            result, data = self._buffer("out", FLOATS[output.dtype], count)
            result.copy_(value)
            self._check_finite(output, value, result, first, count)
            _write(job.target, data, job.target_start + first * (len(data) // count))
            progress(len(data))

    def _sum(self, output: Output, first: int, count: int) -> "torch.Tensor":
        """sum_j c_j W_j diag(g_j) diag(1 / g_base) on the elements [first, first + count), in the compute dtype."""
        dtype = compute_dtype(output.base.dtype)
        total, _ = self._buffer("total", dtype, count)
        part, _ = self._buffer("part", dtype, count)
        for index, term in enumerate(output.terms):
            target = part if index else total
            target.copy_(self._load(term.tensor, first, count))
            if term.gain is not None:
                target.view(-1, output.shape[-1]).mul_(self._gain(term.gain))
            if term.coefficient != 1.0:
                target.mul_(term.coefficient)
            if index:
                total.add_(part)
        if output.divisor is not None:
            divisor = self._gain(output.divisor)
            if bool((divisor == 0).any()):
                raise CheckpointError(
                    f"{output.divisor.name} holds zeros, so it cannot be divided out; use --tensors projections"
                )
            total.view(-1, output.shape[-1]).div_(divisor)
        return total

    def _blend(self, blend: Blend, first: int, count: int) -> "torch.Tensor":
        """The elements after all steps, each rounded to the storage dtype."""
        compute = torch_dtype(compute_dtype(blend.tensor.dtype))
        value = self._load(blend.tensor, first, count).to(self.device, copy=True)
        for alpha, other in blend.steps:
            lower = value.to(compute).mul_(alpha)
            upper = self._blend(other, first, count).to(compute).mul_(1.0 - alpha)
            value = lower.add_(upper).to(value.dtype)
        return value

    def _load(self, tensor: Tensor, first: int, count: int) -> "torch.Tensor":
        """Elements of a source tensor in a buffer that the next call overwrites."""
        path = self.blueprint.checkpoint.path(tensor)
        if tensor.file not in self.files:
            self.files[tensor.file] = os.open(path, os.O_RDONLY)
            self.stack.callback(os.close, self.files[tensor.file])
        buffer, data = self._buffer("in", FLOATS[tensor.dtype], count)
        _read(self.files[tensor.file], data, tensor.start + first * (len(data) // count), path)
        return buffer

    def _buffer(self, use: str, dtype: str, count: int) -> "tuple[torch.Tensor, memoryview]":
        """A reusable buffer and, where files are read into or written from it, its bytes."""
        tensor, data = self.buffers.get((use, dtype), (None, memoryview(b"")))
        if tensor is None or tensor.numel() < count:
            on_host = use in ("in", "out")
            size = max(count, MIX_BLOCK)
            tensor = self.torch.empty(size, dtype=torch_dtype(dtype), device="cpu" if on_host else self.device)
            data = memoryview(tensor.view(self.torch.uint8).numpy()) if on_host else memoryview(b"")
            self.buffers[use, dtype] = tensor, data
        if tensor.numel() == count:
            return tensor, data
        return tensor[:count], data[: len(data) // tensor.numel() * count]

    def _gain(self, tensor: Tensor) -> "torch.Tensor":
        if tensor.name not in self.gains:
            gain = _read_vector(self.blueprint, tensor)
            if not bool(self.torch.isfinite(gain).all()):
                raise CheckpointError(f"{self.blueprint.checkpoint.path(tensor)}: {tensor.name} holds NaN or infinity")
            self.gains[tensor.name] = gain.to(self.device)
        return self.gains[tensor.name]

    def _check_finite(self, output: Output, value: "torch.Tensor", result: "torch.Tensor", first: int, count: int) -> None:
        # The sum of a block is finite only if all elements are; it is cheaper than looking at each. Large finite elements
        # can add up to infinity, so a bad sum is only a reason to look.
        if bool(self.torch.isfinite(result.sum(dtype=self.torch.float32))) or bool(self.torch.isfinite(result).all()):
            return
        for term in output.terms:
            self._refuse_non_finite(term, first, count)
        if not bool(self.torch.isfinite(value).all()):
            raise CheckpointError(f"{output.name}: the sum is beyond the range of float32; check the coefficients")
        peak = float(value.abs().max())
        raise CheckpointError(
            f"{output.name}: the value {peak:g} is beyond the range of {FLOATS[output.dtype]}; write another --dtype"
        )

    def _refuse_non_finite(self, term: Term, first: int, count: int) -> None:
        bad = self.torch.isfinite(self._load(term.tensor, first, count)).logical_not().nonzero()
        if len(bad):
            raise CheckpointError(
                f"{self.blueprint.checkpoint.path(term.tensor)}: {term.tensor.name} holds NaN or infinity (element "
                f"{first + int(bad[0])}); mixing would spread it: repair the checkpoint or leave this layer out"
            )


def _or_stop(stop: Stop, work: Callable[..., None], *arguments: object) -> None:
    """Does the work; if it fails, the other threads end too."""
    try:
        work(*arguments)
    except BaseException:
        stop.asked = True
        raise


def _await(futures: list[Future[None]]) -> None:
    """Waits for all, or for the first that fails, whose error is raised."""
    done, _ = wait(futures, return_when="FIRST_EXCEPTION")
    for future in futures:
        if future in done:
            future.result()
