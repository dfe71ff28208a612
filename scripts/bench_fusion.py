# PYTHON_ARGCOMPLETE_OK
"""Compares ways of fusing models, each trained alike, with the controls that tell whether the donors matter."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
import logging
from pathlib import Path

from _cli import CONFIGS, parser, run
from _progress import bars
from _scoring import check_positive, quieten

EXAMPLES = """\
  python scripts/bench_fusion.py --config configs/fusion/bench-tiny.yaml --out runs/bench-tiny   random twins, some minutes
  python scripts/bench_fusion.py --config configs/fusion/bench-tiny.yaml --updates 5             a quick look
  python scripts/bench_fusion.py --config MINE.yaml --dtype bfloat16 --device cuda               your models and texts"""


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    result.add_argument("--config", type=Path, required=True, metavar="FILE", help="a recipe with a part named bench")
    result.add_argument(
        "--out", type=Path, default=Path("runs/bench-fusion"), metavar="DIR",
        help="results; arms that are there already are kept (default: %(default)s)",
    )  # fmt: skip
    result.add_argument("--updates", type=int, metavar="N", help="instead of the config's")
    result.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: a GPU where there is one)")
    result.add_argument("--dtype", default="auto", help="of the backbones: auto (as stored), float32, bfloat16")
    return result


def main(arguments: argparse.Namespace) -> int:
    """Assembles once, then trains and measures one arm after the other; what is done is written after each."""
    from dataclasses import replace

    check_positive(arguments, "updates")
    quieten(arguments)
    from eval.errors import EvalError
    from eval.fusion_bench import bench_fusion, read_bench, bench_report, table
    from eval.plots import differences
    from merge.fusion.recipe import recipe_from

    bench, content = read_bench(arguments.config)
    recipe = recipe_from(content, str(arguments.config))
    if recipe.training is None:
        raise EvalError(f"{arguments.config} has no training; expected what the arms are trained on")
    if arguments.updates:
        recipe = replace(recipe, training=replace(recipe.training, updates=arguments.updates))
    rows = bench_fusion(
        bench, recipe, arguments.out, configs=CONFIGS, dtype=arguments.dtype, device=arguments.device,
        told=lambda rows: logging.info("%s", table(rows, bench).splitlines()[-1]), bars=bars(arguments.quiet),
    )  # fmt: skip
    differences(arguments.out / "differences.png", rows, bench)
    print(bench_report(rows, bench))
    print(json.dumps({"out": str(arguments.out), "arms": len(rows)}))
    return 0


if __name__ == "__main__":
    run(main, options(), "stopped; the same command goes on after the last arm that is done")
