"""Where dtype, device and threads are decided, and nowhere else.

Three dtypes meet in a merge: what the source files hold (storage), what sums are made in (compute: float32, or float64 for
float64 sources), and what is written (output: `--dtype`, by default as the source). A model that is run has one dtype and a
placement: which of its parts are where.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import MergeError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")  # what a person can ask for
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors -> torch
ROOM = 1.2  # memory that a model takes while it is run, in multiples of its weights; beyond it layers are offloaded
MAX_WORKERS = 4  # copying is bound by memory bandwidth, which a few threads use up


@dataclass(frozen=True)
class Placement:
    """Where a model is run: `device` takes the inputs, `device_map` is accelerate's; `reason` says why, for the log."""

    device: str
    dtype: str
    device_map: "str | dict[str, str]"
    reason: str


@dataclass(frozen=True)
class Runtime:
    """Where sums are made and with how many threads; `reason` says why, for the log."""

    device: str
    workers: int
    reason: str


def decide(device: str = "auto") -> Runtime:
    """The runtime for `device`: 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'.

    Raises:
        MergeError: the device is not there.
    """
    workers = max(
        1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    )
    if device in ("auto", "cpu"):
        why = "asked for" if device == "cpu" else "a merge is bound by reading and writing files, not by arithmetic"
        return Runtime("cpu", workers, why)
    _check_device(device)
    return Runtime(device, workers, "asked for")


def place_model(
    device: str, dtype: str, *, num_parameters: int, stored: str, process_device: str | None = None, processes: int = 1
) -> Placement:
    """Where and in what dtype to run a model for scoring.

    On a GPU in bfloat16, else in the dtype that it is stored in (float16 becomes float32 on a CPU); whole on one device
    where its weights have room there, otherwise spread by accelerate over GPUs, memory and disk. Under `accelerate launch`
    each of the `processes` has the model whole on its own `process_device`.

    Args:
        device: 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'.
        dtype: one of DTYPES.
        stored: torch name of the dtype that most of the checkpoint is in.

    Raises:
        MergeError: the device is not there.
    """
    torch = importlib.import_module("torch")
    psutil = importlib.import_module("psutil")
    if device == "auto":
        device = process_device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        reason = f"one of {processes} processes" if process_device else "a GPU is here" if device != "cpu" else "no GPU here"
    else:
        _check_device(device)
        return Placement(device, _run_dtype(device, dtype, stored), {"": device}, "asked for")
    dtype = _run_dtype(device, dtype, stored)
    needed = ROOM * num_parameters * torch_dtype(dtype).itemsize
    on_gpu = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available / processes
    where = f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed"
    if needed <= free or process_device:
        return Placement(device, dtype, {"": device}, f"{reason}; {where}")
    over = "the other GPUs, memory and disk" if on_gpu else "disk"
    return Placement(device, dtype, "auto", f"{reason}; {where}: layers without room go to {over}")


def training_device(device: str = "auto") -> str:
    """Where small networks are trained: a GPU where there is one, unless a device is asked for.

    Raises:
        MergeError: the device is not there.
    """
    if device == "auto":
        return "cuda:0" if importlib.import_module("torch").cuda.is_available() else "cpu"
    _check_device(device)
    return device


def _run_dtype(device: str, dtype: str, stored: str) -> str:
    if dtype != "auto":
        return dtype
    if device.startswith("cuda"):
        return "bfloat16"
    return "float32" if stored in ("float16", "float64") else stored


def _check_device(device: str) -> None:
    torch = importlib.import_module("torch")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().partition("\n")[0]
        raise MergeError(
            f"device {device!r} cannot be used here ({first}); use --device cpu, which gives the same results"
        ) from error


def output_dtype(requested: str, stored: str) -> str:
    """The safetensors dtype to write a tensor in that is stored as `stored`; only floating point is ever converted."""
    if requested == "auto" or stored not in FLOATS:
        return stored
    return next(name for name, torch_name in FLOATS.items() if torch_name == requested)


def compute_dtype(stored: str) -> str:
    """The torch dtype that sums of tensors stored as `stored` are made in."""
    return "float64" if stored == "F64" else "float32"


@contextmanager
def one_thread_each(torch: Any) -> Iterator[None]:
    """Makes torch's operations single-threaded inside: the blocks of a merge are spread over threads of our own.

    Nested parallelism on blocks that fit the cache costs more in barriers than it gains.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of that name."""
    dtype: torch.dtype = getattr(importlib.import_module("torch"), name)
    return dtype
