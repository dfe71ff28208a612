"""Where dtype, device and threads are decided, and nowhere else.

Three dtypes meet in a merge: what the source files hold (storage), what sums are made in (compute: float32, or float64 for
float64 sources), and what is written (output: `--dtype`, by default as the source).
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
MAX_WORKERS = 4  # copying is bound by memory bandwidth, which a few threads use up


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
    torch = importlib.import_module("torch")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().partition("\n")[0]
        raise MergeError(
            f"device {device!r} cannot be used here ({first}); use --device cpu, which gives the same bytes"
        ) from error
    return Runtime(device, workers, "asked for")


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
