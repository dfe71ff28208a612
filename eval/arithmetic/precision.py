"""In which precision matrix products are made; parameters, sums and everything else are float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import StudyError

PRECISIONS = ("float32", "bfloat16")


@contextmanager
def matmul_precision(name: str, device: str = "cpu") -> Iterator[None]:
    """Matrix products inside have their factors rounded to `name`, whatever torch is set to; sums of products stay float32.

    Raises:
        StudyError: this machine makes no such products.
    """
    check_precision(name, device)
    with _products("ieee" if name == PRECISIONS[0] else "bf16"):
        yield


def check_precision(name: str, device: str = "cpu") -> None:
    """Raises StudyError if products cannot be made that way: what is called bfloat16 must not be float32 in silence."""
    if name == "bfloat16" and not device.startswith("cpu"):
        raise StudyError(f"matmul_precision bfloat16 works only on CPUs, found {device}; leave it out, or give --device cpu")
    if name == "bfloat16" and not has_bfloat16_products():
        raise StudyError("matmul_precision is bfloat16; torch makes no such products on this CPU (with AMX it does); omit it")


def has_bfloat16_products() -> bool:
    """Whether this CPU rounds factors to bfloat16 when it is allowed to; measured, as oneDNN does not say."""
    factor = torch.full((128, 128), 1 + 2**-10)  # rounds to 1
    with _products("bf16"):
        return bool(torch.mm(factor, torch.eye(128))[0, 0] == 1)


@contextmanager
def _products(precision: str) -> Iterator[None]:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # a property of the module object
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
