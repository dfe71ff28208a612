"""What an update of the arithmetic study costs, beside a straightforward implementation of its protocol, in one run.

One thread, processor milliseconds per update, a tenth of an evaluation included; data set x_div_y, batches of 512.
  plain     item by item through a DataLoader, nn.MultiheadAttention over all positions (benchmarks/_plain.py)
  layerfuse eval.arithmetic.train, eager and compiled; sampled evaluations after every 10 updates, all pairs after every 100
  bf16      the same compiled, matrix products in bfloat16 (matmul_precision), where the processor has them
Each is timed in turn, several times over; given is the median of means over a hundred updates, and the ratios of medians.

    python benchmarks/arithmetic.py
    python benchmarks/arithmetic.py --grid --device cuda      the study's baseline on all data sets: networks trained together

With --grid the figure is updates of networks per second of the wall clock, evaluations and writing results included.
Last line of stdout: JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=10, help="of ten updates, per turn")
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--dataset", default="x_div_y")
    options.add_argument("--no-compile", action="store_true")
    options.add_argument("--grid", action="store_true")
    options.add_argument("--device", default="cuda", help="with --grid")
    options.add_argument("--updates", type=int, default=7500, help="with --grid, of every network")
    options.add_argument("--seeds", type=int, default=3, help="with --grid")
    arguments = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    if arguments.grid:
        grid(arguments)
        return

    import torch

    torch.set_num_threads(1)
    from benchmarks._plain import Network, Training, copy_weights
    from eval.arithmetic.batches import Member, Recipe
    from eval.arithmetic.models import Model, initialise
    from eval.arithmetic.precision import has_bfloat16_products
    from eval.arithmetic.tasks import make_task, split
    from eval.arithmetic.train import train

    task, model = make_task(arguments.dataset), Model()
    parts, start = split(task, 0), initialise(model, task, 0)
    updates = arguments.rounds * 10

    def pairs(index: torch.Tensor) -> list[tuple[int, int, int]]:
        return list(zip(task.a[index].tolist(), task.b[index].tolist(), task.answer[index].tolist(), strict=True))

    network = Network(task.num_symbols)
    copy_weights(network, start)
    training = Training(network, pairs(parts.train), pairs(parts.validation))

    def plain() -> list[float]:
        return [timed(training.round) for _ in range(arguments.rounds)]

    def ours(compiled: bool, precision: str = "float32") -> list[float]:
        """Seconds of every round; the first, in which code may be compiled, is left out."""
        marks: list[float] = []
        recipe = Recipe(updates=updates + 100, exhaustive_every=100, matmul_precision=precision)
        train(
            model,
            [Member(task, parts, 0, start)],
            recipe,
            compiled=compiled,
            progress=lambda n: marks.append(time.process_time()),
        )
        return [b - a for a, b in pairwise(marks)][9:]

    ways: dict[str, Callable[[], list[float]]] = {"plain": plain, "eager": lambda: ours(False)}
    if not arguments.no_compile:
        ways |= {"compiled": lambda: ours(True)}
    if not arguments.no_compile and has_bfloat16_products():
        ways |= {"bf16": lambda: ours(True, "bfloat16")}
    for one in ways.values():  # warm up
        one()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.turns):
        for name, one in ways.items():
            seconds[name] += one()
    # A mean over a hundred updates holds one evaluation over all pairs, a median of rounds would leave it out.
    ms = {name: statistics.median(_hundreds(several)) / 10 * 1e3 for name, several in seconds.items()}
    for name, value in ms.items():
        low, high = min(_hundreds(seconds[name])) * 100, max(_hundreds(seconds[name])) * 100
        print(
            f"{name:9} {value:7.2f} ms per update ({low:.2f} to {high:.2f})  {ms['plain'] / value:5.2f} times as fast as plain"
        )
    print(
        json.dumps(
            {
                "benchmark": "arithmetic", "dataset": arguments.dataset,
                "cpu_ms_per_update": {k: round(v, 3) for k, v in ms.items()},
                "times_faster": {k: round(ms["plain"] / v, 3) for k, v in ms.items()}, "turns": arguments.turns,
                "torch": torch.__version__, "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                "bfloat16_products": has_bfloat16_products(), "commit": commit(),
            }
        )
    )  # fmt: skip


def grid(arguments: argparse.Namespace) -> None:
    """The baseline on all data sets and seeds, all networks of one size in one batch, as the study is made on a GPU."""
    import torch

    from eval.arithmetic.execute import make_all
    from eval.arithmetic.study import cells, chosen, read_study

    study = chosen(read_study(ROOT / "configs" / "arithmetic" / "study.yaml"), ["baseline"])
    study = replace(study, seeds=arguments.seeds, recipe=replace(study.recipe, updates=arguments.updates))
    device = "cpu:0" if arguments.device == "cpu" else arguments.device  # by the name of "cpu" they are made one by one
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        failed = make_all(study, Path(folder), workers=1, device=device)
        seconds = time.perf_counter() - started
    if failed:
        raise SystemExit("\n".join(f"{cell}: {message}" for cell, message in failed.items()))
    speed = len(cells(study)) * arguments.updates / seconds
    print(f"{len(cells(study))} networks, {arguments.updates} updates each: {seconds:.1f} s, {speed:.0f} updates per second")
    print(
        json.dumps(
            {
                "benchmark": "arithmetic grid", "networks": len(cells(study)), "updates": arguments.updates,
                "time_s": round(seconds, 2), "updates_per_s": round(speed, 1), "torch": torch.__version__,
                "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device, "commit": commit(),
            }
        )
    )  # fmt: skip


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def timed(what: Callable[[], None]) -> float:
    """Processor seconds."""
    started = time.process_time()
    what()
    return time.process_time() - started


def _hundreds(seconds: list[float]) -> list[float]:
    """Means over ten rounds each."""
    return [statistics.fmean(seconds[i : i + 10]) for i in range(0, len(seconds) // 10 * 10, 10)] or [statistics.fmean(seconds)]


if __name__ == "__main__":
    main()
