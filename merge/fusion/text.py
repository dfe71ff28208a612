"""Text to train and measure on: files and data sets of the Hub, through `datasets`; blocks of token ids."""

import importlib
import logging
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

import torch

from .errors import FusionError

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}  # every other file is text
COLUMN = "text"


def read_documents(names: Sequence[str]) -> list[str]:
    """The documents of files and of data sets of the Hub, in that order.

    Args:
        names: files, also as patterns with *, **; of text, which are one document each, or .parquet, .jsonl with a column
            "text"; data sets as NAME[:CONFIG][@SPLIT].

    Raises:
        FusionError: one cannot be read, has no column "text", or holds nothing.
    """
    found: list[str] = []
    for name in names:
        if not name.strip():
            raise FusionError("a text has an empty name; expected files, or data sets of the Hub")
        if "*" in name:
            paths = [Path(path) for path in sorted(glob(str(Path(name).expanduser()), recursive=True))]
            rows = [row for path in paths if path.is_file() for row in _from_file(path)]
        elif (path := Path(name).expanduser()).suffix or path.exists():
            rows = _from_file(path)
        else:
            rows = _from_hub(name)
        documents = [row for row in rows if isinstance(row, str) and row.strip()]
        if not documents:
            raise FusionError(f"{name} holds no text; expected files of text, or documents in a column {COLUMN!r}")
        found += documents
    return found


def _from_file(path: Path) -> Any:
    if path.is_dir():
        raise FusionError(f"{path} is a folder; expected files, such as {path}/*.txt")
    if not path.is_file():
        raise FusionError(f"{path}: there is no such file")
    if path.suffix in READERS:
        return _column(str(path), READERS[path.suffix], data_files=str(path), split="train")
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise FusionError(f"{path} cannot be read as text: {error}") from error


def _from_hub(name: str) -> Any:
    rest, _, split = name.partition("@")
    repository, _, config = rest.partition(":")
    return _column(name, repository, config or None, split=split or "train")


def _column(name: str, *arguments: Any, **options: Any) -> Any:
    datasets = importlib.import_module("datasets")
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what goes wrong is said once, here
    try:
        rows = datasets.load_dataset(*arguments, **options)
    except Exception as error:  # datasets raises many kinds here, none of them documented
        cause = error.__cause__ or error
        why = " ".join(str(cause).split())[:200] or (
            "it is empty" if isinstance(cause, StopIteration) else type(cause).__name__
        )
        raise FusionError(f"{name} cannot be read: {why}") from error
    finally:
        logger.setLevel(level)
    if COLUMN not in rows.column_names:
        raise FusionError(f"{name} has the columns {', '.join(rows.column_names)}; expected one named {COLUMN!r}")
    return rows[COLUMN]


def token_blocks(documents: Sequence[str], tokenizer: Any, block: int) -> torch.Tensor:
    """[N, block] ids of the documents one after the other, each behind the tokenizer's bos (or eos, or nothing).

    Raises:
        FusionError: there is not one block.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids: list[int] = []
    for document in documents:
        if first is not None:
            ids.append(first)
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // block
    if not count:
        raise FusionError(f"the text has {len(ids):,} tokens, not one block of {block}; give more text or a smaller block")
    return torch.tensor(ids[: count * block]).reshape(count, block)


def split_blocks(blocks: torch.Tensor, held_out: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(to train on, held out), both in an order that the seed decides; at least one block is trained on.

    Raises:
        FusionError: there are too few blocks to hold any out.
    """
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    count = round(held_out * len(blocks))
    if held_out and not 0 < count < len(blocks):
        raise FusionError(f"{len(blocks)} blocks are too few to hold out {held_out} of them; give more text or smaller blocks")
    return blocks[order[count:]], blocks[order[:count]]
