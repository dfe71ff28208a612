"""Trains the fusers of a fused model on text, everything else frozen; one process or several, by accelerate.

    loss      causal cross-entropy of the host's tokens, + w KL(teacher || model) where there is a teacher
    fusers    in float32 while they are trained, whatever the backbones are in
    order     of blocks, and dropout, are functions of (seed, update) alone: a run that is gone on with is the run that was not
              interrupted, to the same bytes

With several processes each takes its rows of every update's batch; the result differs from that of one by rounding alone.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional

from ..publish import whole_file
from .errors import FusionError
from .modeling_fusion import FusionForCausalLM
from .recipe import Training

CHECKPOINT_S = 60.0
MOMENTS = ("exp_avg", "exp_avg_sq")
COLUMNS = ("update", "loss", "held_out", "learning_rate", "tokens_per_s")


@dataclass
class Trained:
    """The fusers' values by their names in the model (float32), and the log, a row of COLUMNS for every update."""

    values: dict[str, torch.Tensor]
    log: list[list[float]] = field(default_factory=list)
    time_s: float = 0.0


def train(
    model: FusionForCausalLM,
    blocks: torch.Tensor,
    held_out: torch.Tensor,
    recipe: Training,
    *,
    accelerator: Accelerator | None = None,
    teacher: torch.nn.Module | None = None,
    logits_of: Callable[[list[int], torch.Tensor], torch.Tensor] | None = None,
    checkpoint: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[int, Mapping[str, float]], object] = lambda tokens, row: None,
) -> Trained:
    """Trains `model.fusers` in place; the same values come back.

    Args:
        blocks, held_out: [N, block] host ids.
        teacher: a causal model with the host's vocabulary, whose distribution is learned too.
        logits_of: given numbers of blocks and their ids, the model's logits; where what does not change was computed before.
        checkpoint: a file to go on from where it exists; written about once a minute.
        identity: what must be the same for that.
        progress: told after every update of its tokens and its row of the log.

    Raises:
        FusionError: the checkpoint is of another run, the batch does not divide, or the loss is no longer a number.
    """
    accelerator = accelerator or Accelerator()
    world, rank = accelerator.num_processes, accelerator.process_index
    check_batch(recipe, world)
    model.fusers.float()
    optimiser = torch.optim.AdamW(
        model.fusers.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    state = Trained({name: value.detach() for name, value in model.fuser_parameters().items()})
    key = json.dumps([asdict(recipe), identity, list(blocks.shape)])
    if checkpoint is not None and checkpoint.exists():
        _restore(checkpoint, key, model, optimiser, state)
    wrapped, prepared = accelerator.prepare(model, optimiser)
    wrapped.train()
    begun, saved = time.perf_counter() - state.time_s, time.monotonic()
    for update in range(len(state.log), recipe.updates):
        started = time.perf_counter()
        rate = learning_rate(recipe, update)
        for group in optimiser.param_groups:
            group["lr"] = rate
        torch.manual_seed(recipe.seed * 1_000_003 + update * world + rank)  # of dropout
        rows = _rows(len(blocks), recipe, update)[rank::world]
        loss = torch.zeros((), device=accelerator.device)
        for some in (rows[part :: recipe.gradient_accumulation_steps] for part in range(recipe.gradient_accumulation_steps)):
            ids = blocks[some].to(accelerator.device)
            logits = wrapped(ids, use_cache=False).logits if logits_of is None else logits_of(some, ids)
            part_loss = _loss(logits[:, :-1].float(), ids, teacher, recipe.distil_weight) / recipe.gradient_accumulation_steps
            accelerator.backward(part_loss)
            loss += part_loss.detach()
        accelerator.clip_grad_norm_(model.fusers.parameters(), recipe.clip)
        prepared.step()
        prepared.zero_grad()
        mean = float(accelerator.reduce(loss, reduction="mean"))
        if not math.isfinite(mean):
            raise FusionError(f"the loss is no longer a number at update {update + 1}; try a smaller learning_rate")
        last = update + 1 == recipe.updates
        measured = math.nan
        if len(held_out) and (last or (update + 1) % recipe.evaluate_every == 0):
            measured = held_out_loss(model, held_out, rows_at_once(recipe, world), accelerator)
        tokens = recipe.batch * blocks.shape[1]
        state.log.append([float(update + 1), mean, measured, rate, tokens / (time.perf_counter() - started)])
        progress(tokens, dict(zip(COLUMNS, state.log[-1], strict=True)))
        if checkpoint is not None and (last or time.monotonic() - saved > CHECKPOINT_S):
            state.time_s = time.perf_counter() - begun
            if accelerator.is_main_process:
                _save(checkpoint, key, model, optimiser, state)
            saved = time.monotonic()
    state.time_s = time.perf_counter() - begun
    model.eval()
    state.values = {name: value.detach().cpu().clone() for name, value in model.fuser_parameters().items()}
    return state


def learning_rate(recipe: Training, update: int) -> float:
    """Of an update counted from 0: a rise over the warm-up, then a cosine that would reach zero after the last."""
    warm = max(1, round(recipe.warmup * recipe.updates))
    if update < warm:
        return recipe.learning_rate * (update + 1) / warm
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (update - warm) / max(1, recipe.updates - warm)))


def check_batch(recipe: Training, processes: int) -> None:
    """Raises FusionError unless every process gets as many rows, in as many equal parts as are asked for."""
    steps = recipe.gradient_accumulation_steps
    if recipe.batch % (processes * steps):
        pieces = f" in {steps} parts each" if steps > 1 else ""
        parts = f"{processes} process{'es' * (processes > 1)}{pieces}"
        raise FusionError(f"a batch of {recipe.batch} rows is not shared evenly by {parts}; expected a multiple")


def rows_at_once(recipe: Training, processes: int) -> int:
    """Rows that a process runs at a time."""
    return max(1, recipe.batch // (processes * recipe.gradient_accumulation_steps))


def held_out_loss(model: FusionForCausalLM, blocks: torch.Tensor, batch: int, accelerator: Accelerator) -> float:
    """Nats per token over blocks [N, block], shared among the processes."""
    was, total = model.training, torch.zeros(2, device=accelerator.device)
    model.eval()
    with torch.inference_mode():
        for start in range(accelerator.process_index * batch, len(blocks), accelerator.num_processes * batch):
            ids = blocks[start : start + batch].to(accelerator.device)
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            total[0] += functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            total[1] += ids[:, 1:].numel()
    model.train(was)
    total = accelerator.reduce(total.clone(), reduction="sum")
    return float(total[0] / total[1])


def _rows(count: int, recipe: Training, update: int) -> list[int]:
    """The blocks of an update: every block once in each pass over the data."""
    found = []
    for position in range(update * recipe.batch, (update + 1) * recipe.batch):
        found.append(_order(count, recipe.seed, position // count)[position % count])
    return found


def _order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 7_919 + epoch)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def _loss(logits: torch.Tensor, ids: torch.Tensor, teacher: Any, weight: float) -> torch.Tensor:
    loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    if teacher is None:
        return loss
    with torch.no_grad():
        target = teacher(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    found = functional.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1).mean()
    return loss + weight * found


def _save(path: Path, key: str, model: FusionForCausalLM, optimiser: torch.optim.AdamW, state: Trained) -> None:
    tensors = {}
    for name, value in model.fuser_parameters().items():
        tensors[f"value {name}"] = value.detach().cpu().contiguous()
        for moment in MOMENTS:
            if moment in optimiser.state[value]:
                tensors[f"{moment} {name}"] = optimiser.state[value][moment].cpu().contiguous()
    metadata = {"identity": key, "log": json.dumps(state.log), "time_s": repr(state.time_s)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as scratch:
        save_file(tensors, scratch, metadata)


@contextmanager
def _whole(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise FusionError(f"{path} is damaged ({error}); remove it to train anew") from error


def _restore(path: Path, key: str, model: FusionForCausalLM, optimiser: torch.optim.AdamW, state: Trained) -> None:
    """Puts fusers and optimiser back to what they were."""
    with _whole(path) as file:
        found, names = file.metadata(), set(file.keys())
        if found.get("identity") != key:
            raise FusionError(f"{path} is of a run with other settings; give another --out, or remove it to train anew")
        state.log, state.time_s = json.loads(found["log"]), float(found["time_s"])
        with torch.no_grad():
            for name, value in model.fuser_parameters().items():
                value.copy_(file.get_tensor(f"value {name}"))
                if f"{MOMENTS[0]} {name}" in names:
                    moments = {moment: file.get_tensor(f"{moment} {name}").to(value.device) for moment in MOMENTS}
                    optimiser.state[value] = {"step": torch.tensor(float(len(state.log))), **moments}


def log_text(log: Sequence[Sequence[float]]) -> str:
    """The log as CSV; nothing stands for what was not measured."""
    rows = [",".join("" if math.isnan(x) else f"{x:.8g}" for x in row) for row in log]
    return "\n".join([",".join(COLUMNS), *rows]) + "\n"
