"""How fast a model reads and writes, and how much memory that takes.

Batches of random token ids of equal length: what is measured is arithmetic and memory traffic, not any text.
"""

import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .memory import PeakMemory, weight_bytes


@dataclass(frozen=True)
class Speed:
    """Tokens per second over the whole batch, medians of the repeats with the slowest and the fastest of them.

    `peak_bytes` is of reading the prompts: weights, keys and values, and everything else that is alive at one time.
    """

    batch: int
    prompt: int
    generate: int
    prefill_per_s: float
    prefill_range: tuple[float, float]
    decode_per_s: float
    decode_range: tuple[float, float]
    peak_bytes: int


@torch.inference_mode()
def measure_speed(
    model: Any, batch: int, prompt: int = 128, generate: int = 32, repeats: int = 3, *, seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:  # fmt: skip
    """The speed of a causal model of transformers, after one run that warms it up."""
    device = model.get_input_embeddings().weight.device
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (batch, prompt), generator=random).to(device)

    last = _last_only(model)

    def once() -> tuple[float, float]:
        begun = _now(device, clock)
        output = model(input_ids=ids, use_cache=True, **last)
        read = _now(device, clock)
        for _ in range(generate):
            following = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=following, past_key_values=output.past_key_values, use_cache=True)
        return batch * prompt / (read - begun), batch * generate / (_now(device, clock) - read)

    once()
    found = [once() for _ in range(repeats)]
    read, written = [one for one, _ in found], [one for _, one in found]
    return Speed(
        batch, prompt, generate,
        statistics.median(read), (min(read), max(read)),
        statistics.median(written), (min(written), max(written)),
        _peak(model, ids),
    )  # fmt: skip


def _last_only(model: Any) -> dict[str, int]:
    """How a model is told that generation needs no other logits than the last; not every one can be."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _now(device: torch.device, clock: Callable[[], float]) -> float:
    """The time when all work that was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def _peak(model: Any, ids: torch.Tensor) -> int:
    """Bytes alive at one time while the prompts are read."""
    if ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ids.device)
        model(input_ids=ids, use_cache=True, **_last_only(model))
        return int(torch.cuda.max_memory_allocated(ids.device))
    with torch.inference_mode(False), torch.no_grad(), PeakMemory() as memory:  # see eval/memory.py
        model(input_ids=ids.clone(), use_cache=True, **_last_only(model))
    return int(weight_bytes(model) + memory.peak)
