# PYTHON_ARGCOMPLETE_OK
"""Joins models of different architectures: a host that reads the intermediate states of donors, as one Hugging Face model."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
import logging
import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from _cli import CONFIGS, UsageError, parser, publishes, run
from _progress import bar, counter


EXAMPLES = """\
  python scripts/fuse.py --config configs/fusion/tiny.yaml --out runs/tiny-fused          random twins, a minute on a CPU
  python scripts/fuse.py --config configs/fusion/llama3-19l+gemma2.json --dry-run         what it would be, from headers alone
  accelerate launch scripts/fuse.py --config configs/fusion/tiny.yaml --out runs/fused    several processes"""


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    result.add_argument("--config", type=Path, required=True, metavar="FILE", help="host, donors, fusion and training")
    result.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: runs/ and the name of the config)")
    result.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    result.add_argument("--dry-run", action="store_true", help="parameters and layers, from configs and headers alone")
    result.add_argument("--no-training", action="store_true", help="assemble only: the result equals its host")
    how = result.add_argument_group("how")
    how.add_argument("--dtype", default="auto", help="of the backbones: auto (as stored), float32, bfloat16, float16")
    how.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1 for training (default: a GPU where there is one)"
    )
    how.add_argument("--updates", type=int, metavar="N", help="instead of the config's")
    how.add_argument("--text", metavar="A,B,...", help="files or data sets to train on instead of the config's")
    return result


def main(arguments: argparse.Namespace) -> int:
    """Reads the recipe, finds the models, makes the folder."""
    from merge.errors import ModelNotFoundError
    from merge.fusion.assemble import make_parts
    from merge.fusion.errors import FusionError
    from merge.fusion.make import LOG_FILE, fuse
    from merge.fusion.recipe import read_recipe
    from merge.source import resolve

    recipe = change(read_recipe(arguments.config), arguments)
    models = [recipe.host, *recipe.donors]
    distil = recipe.training.distil if recipe.training else None
    try:
        sources = [resolve(one.model, revision=one.revision, configs=CONFIGS, headers_only=arguments.dry_run) for one in models]
        teacher = resolve(distil, configs=CONFIGS) if distil and not arguments.dry_run else None
        parts = make_parts(recipe, sources, dtype=arguments.dtype)
    except (FusionError, ModelNotFoundError) as error:
        raise type(error)(f"{arguments.config}: {error}") from error
    if arguments.dry_run:
        print(described(parts))
        return 0
    from eval.plots import loss_curve  # what is missing to draw is found before hours of training

    def draw(folder: Path, held_out_before: float | None) -> None:
        loss_curve(folder / LOG_FILE, folder / "training.png", held_out_before)

    out = (arguments.out or Path("runs") / arguments.config.stem).resolve()
    accelerator, device = runtime(arguments.device)
    first = accelerator is None or accelerator.is_main_process
    total = recipe.training.updates * recipe.training.batch * recipe.training.block if recipe.training else 0
    with counter("training", "token", total, arguments.quiet or not first) as progress:

        def told(tokens: int, row: Any) -> None:
            progress.update(tokens)
            progress.set_postfix_str(f"loss {row['loss']:.4f}")
            if row["held_out"] == row["held_out"]:
                logging.info("update %d: loss %.4f, held out %.4f", row["update"], row["loss"], row["held_out"])

        publishes(arguments, out)
        found = fuse(
            parts, out, device=device, accelerator=accelerator,
            teacher=teacher, overwrite=arguments.overwrite,
            command=shlex.join(["python", *sys.argv]), copying=bar("copying", arguments.quiet), training=told, draw=draw,
        )  # fmt: skip
    if first:
        print(in_words(parts, found))
        print(json.dumps({"out": str(out), **asdict(found)}))
    return 0


def change(recipe: Any, arguments: argparse.Namespace) -> Any:
    """The recipe with what the command line says instead."""
    if arguments.no_training:
        if arguments.updates or arguments.text:
            raise UsageError("--no-training goes with neither --updates nor --text")
        return replace(recipe, training=None)
    changes: dict[str, Any] = {}
    if arguments.updates is not None:
        if arguments.updates < 1:
            raise UsageError(f"--updates is {arguments.updates}; expected at least 1")
        changes["updates"] = arguments.updates
    if arguments.text:
        changes["text"] = tuple(name.strip() for name in arguments.text.split(","))
    if changes and recipe.training is None:
        raise UsageError(f"{arguments.config} has no training that --updates or --text could change")
    return replace(recipe, training=replace(recipe.training, **changes)) if changes else recipe


def runtime(device: str) -> tuple[Any, str]:
    """(accelerator where there are several processes, device of training)."""
    from merge.runtime import training_device

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None, training_device(device)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu")
    return accelerator, str(accelerator.device)


def described(parts: Any) -> str:
    """What a recipe comes to, for a person."""
    combination = parts.combination
    layers = [f"{len(one.plan.rows)} of {one.checkpoint.num_hidden_layers} layers" for one in parts.blueprints]
    lines = [
        f"host    {parts.sources[0].name}: {layers[0]}",
        *(
            f"donor   {source.name}: {kept}, read after {', '.join(map(str, taps))}"
            for source, kept, taps in zip(parts.sources[1:], layers[1:], parts.taps, strict=True)
        ),
        f"fusion  {parts}",
        f"        {combination.parameters:,} parameters, {combination.fuser_parameters:,} of them trained; budget "
        f"{combination.budget:,}",
    ]
    return "\n".join(lines)


def in_words(parts: Any, found: Any) -> str:
    """What was made, for a person."""
    host, *donors = (source.name for source in parts.sources)
    said = [
        f"{host} reads {' and '.join(donors)}: {found.parameters:,} parameters, {found.fuser_parameters:,} of them the fusers'"
    ]
    if found.held_out is not None:
        said.append(
            f"held-out text: {found.held_out_before:.4f} -> {found.held_out:.4f} nats per token after {found.tokens:,} tokens"
        )
    return "\n".join(said)


if __name__ == "__main__":
    run(main, options(), "stopped; the same command goes on from the last checkpoint, which training writes once a minute")
