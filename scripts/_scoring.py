"""What the scripts that score a model share: options of the run, loading, and how they end in several processes."""

import argparse
import logging
import os
from pathlib import Path

from _cli import UsageError, find_model

from merge.runtime import DTYPES
from merge.source import Source


def add_run_options(result: argparse.ArgumentParser) -> None:
    """--dtype, --device and --batch-size."""
    how = result.add_argument_group("model run")
    how.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, else as stored (default)")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    how.add_argument("--batch-size", default="auto", metavar="N", help="prompts per call; auto: as many as fit (default)")


def add_text_options(group: "argparse._ArgumentGroup", text_help: str) -> None:
    """--text, or --dataset and what says which texts of it."""
    group.add_argument("--text", type=Path, metavar="FILE", help=text_help)
    group.add_argument(
        "--dataset", metavar="ID_OR_DIR", help="a data set in its place, of the Hub or a folder of parquet files"
    )
    group.add_argument("--dataset-config", metavar="NAME", help="its configuration")
    group.add_argument("--dataset-split", default="train", metavar="NAME", help="default: train")
    group.add_argument("--text-column", default="text", metavar="NAME", help="default: text")


def has_text(arguments: argparse.Namespace) -> bool:
    """Whether a text or a data set is named; both are too many."""
    if arguments.text is not None and arguments.dataset is not None:
        raise UsageError("give one of --text and --dataset")
    return arguments.text is not None or arguments.dataset is not None


def read_texts(arguments: argparse.Namespace, characters: int) -> list[str]:
    """The text as a whole, or the data set's texts up to so many characters."""
    from eval.run import dataset_texts, plain_text

    if arguments.text is not None:
        return [plain_text(arguments.text)]
    how = (arguments.dataset_config, arguments.dataset_split, arguments.text_column)
    return dataset_texts(arguments.dataset, *how, characters)


def find_source(arguments: argparse.Namespace) -> Source:
    """The model that --model names; a wrong or partial one is refused before anything is imported or loaded."""
    if not arguments.model:
        raise UsageError("give --model")
    check_run(arguments)
    return find_model(arguments.model, arguments)


def check_run(arguments: argparse.Namespace) -> None:
    """Refuses a wrong --batch-size, and has lm-eval and datasets be quiet."""
    if arguments.batch_size != "auto" and not (arguments.batch_size.isdecimal() and int(arguments.batch_size)):
        raise UsageError(f"--batch-size is {arguments.batch_size!r}, expected a positive number of prompts, or auto")
    quieten(arguments)


def quieten(arguments: argparse.Namespace) -> None:
    """Has lm-eval and datasets say what goes wrong, and with -v what they do."""
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR if not arguments.verbose else logging.INFO)


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Refuses numbers below 1 (below 0 for examples per question) in the options named."""
    for name in names:
        value, least = getattr(arguments, name), 0 if name == "num_fewshot" else 1
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} is {value}, expected at least {least}")


def check_out(arguments: argparse.Namespace, out: Path, *others: Path) -> None:
    """Refuses a results file that cannot be written, before any work is done; what exists is replaced only if asked."""
    if not out.name.endswith(".json"):
        raise UsageError(f"--out is {out}, expected a name that ends in .json")
    for path in (out, *others):
        if path.is_dir():
            raise UsageError(f"{path} is a folder, expected the name of a file")
        if path.exists() and not arguments.overwrite:
            raise UsageError(f"{path} exists; give --overwrite, or another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"{out.parent} cannot be written to")


def quiet_here(arguments: argparse.Namespace) -> bool:
    """Whether this process shows no bar: asked to be quiet, or not the first of several."""
    return arguments.quiet or int(os.environ.get("RANK", "0")) != 0
