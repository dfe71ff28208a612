"""What to fuse, how, and what to train on: one record, from a YAML or JSON file.

    host       the model that answers; `alphas`: a file of alphas with which its layers are fused first
    donors     models whose intermediate states it reads, at `taps`
    fusion     mode, and its settings (configuration_fusion.py)
    training   of the fusers; without it the result equals its host

Taps and sites are layers that have been run: whole numbers, or with a decimal point a share of the model's layers (0.5, 1.0).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..records import Fields, read_yaml
from .budget import BUDGET
from .configuration_fusion import DEFAULTS
from .errors import FusionError
from .streams import ALIGNMENTS


@dataclass(frozen=True)
class Backbone:
    """A source; `alphas` of the host; of donors `taps`, by default budget.TAPS, or the last layer where outputs are mixed, and
    `alignment` of their tokens with the host's (streams.py).
    """

    model: str
    revision: str | None = None
    alphas: str | None = None
    taps: tuple[float, ...] = ()
    alignment: str = "map"


@dataclass(frozen=True)
class Training:
    """AdamW on the fusers, causal language modelling of the host's tokens.

    text            files (.txt, .parquet and .jsonl with a column "text") and data sets of the Hub
    block           host tokens in a row; `batch` rows in an update, over all processes
    gradient_accumulation_steps    parts of a process's rows that are run one after the other, for less memory
    warmup          share of the updates in which the rate rises; then it falls to zero as a cosine
    distil          the model whose distribution is learned beside the text, with weight `distil_weight`
    held_out        share of the blocks that are kept from training to measure on
    """

    text: tuple[str, ...]
    updates: int = 200
    block: int = 512
    batch: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    held_out: float = 0.05
    evaluate_every: int = 50
    distil: str | None = None
    distil_weight: float = 1.0


SMALLEST = 1e-12  # of what has to be above zero
RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("updates", "batch", "gradient_accumulation_steps", "evaluate_every"), (1, 1e9, "at least 1")),
    **dict.fromkeys(("warmup", "held_out"), (0, 1 - SMALLEST, "a share from 0 to below 1")),
    **dict.fromkeys(("weight_decay", "distil_weight"), (0, 1e6, "0 or more")),
    "block": (2, 1e9, "at least 2"),
    "learning_rate": (SMALLEST, 1e3, "a number above 0, such as 1e-3"),
    "clip": (SMALLEST, 1e9, "a number above 0: the largest norm of the gradient"),
    "seed": (0, 2**32, "0 to 2 ** 32"),
}


@dataclass(frozen=True)
class Recipe:
    """A fused model."""

    host: Backbone
    donors: tuple[Backbone, ...]
    fusion: dict[str, Any] = field(default_factory=dict)
    budget: int = BUDGET
    training: Training | None = None


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file.

    Raises:
        RecordError, FusionError: what is wrong with it.
    """
    return recipe_from(read_yaml(path), str(path))


def recipe_from(content: Any, where: str) -> Recipe:
    """The recipe in plain data; `where` names it in errors, which are those of `read_recipe`."""
    found = Fields(where)
    version, host, donors, fusion, budget, training = found.take(
        content, schema_version=int, host=dict, donors=list, fusion=(dict, None), budget=(float, None),
        training=(dict, None),
    )  # fmt: skip
    found.check_version(version)
    first = _backbone(found, "host", host, alphas=(str, None))
    others = tuple(
        _backbone(found, f"donor {i}", one, taps=(list, None), alignment=(str, None)) for i, one in enumerate(donors or [])
    )
    trained = _training(found, training) if training is not None else None
    kinds = {name: float if name in ("dropout", "weight") else type(value) for name, value in DEFAULTS.items()}
    chosen = found.take(fusion or {}, "fusion", **{name: (kind, None) for name, kind in kinds.items()})
    settings = {name: value for name, value in zip(kinds, chosen, strict=True) if value is not None}
    found.done()
    if not others:
        raise FusionError(f"{where}: there are no donors; expected at least one")
    limit = BUDGET if budget is None else budget
    if limit < 1 or not math.isfinite(limit):
        raise FusionError(f"{where}: budget is {limit}; expected a number of parameters, such as 8e9")
    return Recipe(first, others, settings, int(limit), trained)


def _backbone(found: Fields, at: str, content: Any, **optional: Any) -> Backbone:
    names = ("model", "revision", *optional)
    values = found.take(content or {}, at, model=str, revision=(str, None), **optional)
    given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    if given.get("model") == "":
        found.problem(f"{at}: 'model' is empty, expected a Hub id, a folder, a .gguf file or tiny:NAME")
    if "taps" in given:
        given["taps"] = tuple(given["taps"])
    if given.get("alignment", "map") not in ALIGNMENTS:
        found.problem(f"{at}: 'alignment' is {given['alignment']!r}, expected one of {', '.join(ALIGNMENTS)}")
    return Backbone(**({"model": ""} | given))


def _training(found: Fields, content: Any) -> Training | None:
    kinds = {
        one.name: (type(one.default) if one.default is not None else str) for one in fields(Training) if one.name != "text"
    }
    text, *rest = found.take(content, "training", text=list, **{name: (kind, None) for name, kind in kinds.items()})
    given = {name: value for name, value in zip(kinds, rest, strict=True) if value is not None}
    for name, (least, most, what) in RANGES.items():
        if name in given and not least <= given[name] <= most:
            found.problem(f"training: {name!r} is {given[name]}, expected {what}")
    if text is not None and (not text or not all(isinstance(one, str) for one in text)):
        found.problem("training: 'text' must name at least one file or data set")
    return None if text is None else Training(tuple(map(str, text)), **given)


def layer_numbers(what: str, given: Sequence[Any], layers: int) -> list[int]:
    """Taps or sites of a model with that many layers, in rising order.

    Raises:
        FusionError: one is outside the model; two are the same layer.
    """
    found = []
    for one in given:
        if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one):
            raise FusionError(f"{what} {one!r} is no layer; expected a whole number, or a share such as 0.5 or 1.0")
        if isinstance(one, float) and not 0 < one <= 1:
            raise FusionError(f"{what} {one} is outside the model; expected a share above 0 and up to 1.0, or a whole number")
        number = max(1, math.floor(one * layers + 0.5)) if isinstance(one, float) else one
        if not 1 <= number <= layers:
            raise FusionError(f"{what} {one} is outside the model; expected 1 to {layers}, the number of its layers")
        found.append(number)
    if len(set(found)) < len(found):
        raise FusionError(f"{what}s {list(given)} of {layers} layers name one layer twice")
    return sorted(found)
