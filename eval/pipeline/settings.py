"""What a study is: a model, what is merged, which controls stand beside it, and what is measured of each.

The same names stand in a YAML file (configs/study.yaml is one) and on the command line of scripts/pipeline.py.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from merge.records import Fields, read_yaml

from ..errors import DataError

CONTROLS = ("drop-last", "drop-greedy", "dropped", "uniform")  # what each is: `arms.make_arms`
PARTS = ("mmlu", "text", "cloze", "generation", "speed")  # measurements; each can be skipped
PROMPTS = ("The capital of France is", "Once upon a time, there was a", "To make a cup of tea, you first")


@dataclass(frozen=True)
class Mmlu:
    """Which questions, and how they are asked: `limit` of every subject; no `data_dir`: from the Hub."""

    data_dir: str | None = None
    subjects: tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int = 5


@dataclass(frozen=True)
class Text:
    """Plain text for perplexity: its first `tokens`; the last `choose_tokens` of the file choose what drop-greedy removes."""

    file: str | None = None  # the test split of WikiText-2 from the Hub if not given
    tokens: int | None = None
    choose_tokens: int = 4096


@dataclass(frozen=True)
class Cloze:
    """LAMBADA: the last word of a passage. A parquet or JSON-lines file with a column `text`; from the Hub if not given."""

    file: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Generation:
    """What is written after each prompt, greedily."""

    prompts: tuple[str, ...] = PROMPTS
    tokens: int = 40


@dataclass(frozen=True)
class Speed:
    """Batches of random token ids: `prompt` tokens are read at once, `generate` written one by one; medians of `repeats`."""

    batches: tuple[int, ...] = (1, 16)
    prompt: int = 128
    generate: int = 32
    repeats: int = 3


@dataclass(frozen=True)
class Settings:
    """A study. `merges` are alphas files or plans; the other names are explained where they are used."""

    model: str
    merges: tuple[str, ...]
    revision: str | None = None
    controls: tuple[str, ...] = CONTROLS
    skip: tuple[str, ...] = ()
    dtype: str = "auto"
    device: str = "auto"
    batch_size: str = "auto"
    keep_checkpoints: bool = True
    mmlu: Mmlu = field(default_factory=Mmlu)
    text: Text = field(default_factory=Text)
    cloze: Cloze = field(default_factory=Cloze)
    generation: Generation = field(default_factory=Generation)
    speed: Speed = field(default_factory=Speed)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in study.json and in a YAML file."""
        return asdict(self)


SECTIONS: dict[str, type] = {"mmlu": Mmlu, "text": Text, "cloze": Cloze, "generation": Generation, "speed": Speed}
_PLAIN = {"model": str, "revision": str, "dtype": str, "device": str, "batch_size": (str, int)}
_LISTS = ("merges", "controls", "skip")
_LEAST = {"num_fewshot": 0, "tokens": 2, "choose_tokens": 64}  # of numbers; 1 for all others


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a study's YAML file, for `make_settings`; paths in it are relative to where the command is run.

    Raises:
        RecordError: it cannot be read.
        DataError: it is not a mapping.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a study; expected a mapping with model and merges")
    return content


def make_settings(content: Mapping[str, Any], where: str) -> Settings:
    """The study that plain data describes; `where` names it in errors.

    Raises:
        RecordError: unknown or mistyped names; all are named at once.
        DataError: a value that makes no sense.
    """
    found = Fields(where)
    content = {**content}
    found.check_version(content.pop("schema_version", None))
    keep = content.pop("keep_checkpoints", True)
    if not isinstance(keep, bool):
        found.problem(f"'keep_checkpoints' is {keep!r}, expected true or false")
    kinds: dict[str, Any] = {name: (*(kind if isinstance(kind, tuple) else (kind,)), None) for name, kind in _PLAIN.items()}
    kinds |= {name: (list, None) for name in _LISTS} | {name: (dict, None) for name in SECTIONS}
    values = dict(zip(kinds, found.take(content, **kinds), strict=True))
    given: dict[str, Any] = {name: values[name] for name in _PLAIN if values[name] is not None}
    if "batch_size" in given:
        given["batch_size"] = str(given["batch_size"])
    given |= {name: _texts(found, name, values[name]) for name in _LISTS if values[name] is not None}
    for name, kind in SECTIONS.items():
        if values[name] is not None:
            given[name] = _section(found, name, kind, values[name])
    for name in ("model", "merges"):
        if not given.get(name):
            found.problem(f"{name!r} is missing")
    found.done()
    settings = Settings(**given, keep_checkpoints=keep)
    for name, known in (("controls", CONTROLS), ("skip", PARTS)):
        for one in getattr(settings, name):
            if one not in known:
                near = difflib.get_close_matches(one, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise DataError(f"{where}: {name} holds {one!r} ({hint})")
    if len(settings.skip) == len(PARTS):
        raise DataError(f"{where}: every measurement is skipped; leave at least one of {', '.join(PARTS)}")
    return settings


def merged(content: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A file's content with what the command line gives in its place; None gives nothing."""
    result = dict(content)
    for name, value in given.items():
        if isinstance(value, Mapping):
            inner = {key: one for key, one in value.items() if one is not None}
            if inner:
                result[name] = {**(result.get(name) or {}), **inner}
        elif value is not None:
            result[name] = value
    return result


def absolute(settings: Settings, name: str = "a study") -> Settings:
    """The same study with its files as absolute paths, so that it can be gone on with from anywhere.

    Raises:
        DataError: the name of a file, in the file `name`, is none.
    """

    def full(path: str | None) -> str | None:
        if path is not None and "\0" in path:
            raise DataError(f"{name}: {path!r} is no name of a file: it holds a null character")
        return os.path.realpath(os.path.expanduser(path)) if path is not None else None  # unlike pathlib's, for any string

    model = settings.model
    return replace(
        settings,
        model=full(model) or model if os.path.exists(os.path.expanduser(model)) else model,
        merges=tuple(full(path) or path for path in settings.merges),
        mmlu=replace(settings.mmlu, data_dir=full(settings.mmlu.data_dir)),
        text=replace(settings.text, file=full(settings.text.file)),
        cloze=replace(settings.cloze, file=full(settings.cloze.file)),
    )


def _section(found: Fields, name: str, kind: type, value: Any) -> Any:
    """One of SECTIONS from plain data."""
    lists = {one.name for one in fields(kind) if str(one.type).startswith("tuple")}
    texts = {one.name for one in fields(kind) if str(one.type).startswith(("str", "tuple[str"))} - lists
    kinds = {one.name: (list if one.name in lists else str if one.name in texts else int, None) for one in fields(kind)}
    given: dict[str, Any] = {}
    for key, one in zip(kinds, found.take(value, name, **kinds), strict=True):
        if one is None:
            continue
        if key == "batches":
            if not one or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in one):
                found.problem(f"{name}: 'batches' is {one!r}, expected positive whole numbers")
                continue
            one = tuple(one)
        elif key in lists:
            one = _texts(found, f"{name}: {key}", one)
        elif isinstance(one, int) and one < _LEAST.get(key, 1):
            found.problem(f"{name}: {key!r} is {one}, expected at least {_LEAST.get(key, 1)}")
            continue
        given[key] = one
    return kind(**given)


def _texts(found: Fields, name: str, values: list[Any]) -> tuple[str, ...]:
    """A list of texts."""
    wrong = [value for value in values if not isinstance(value, str)]
    if wrong:
        found.problem(f"{name} holds {wrong[0]!r}, expected texts")
    return tuple(str(value) for value in values)
