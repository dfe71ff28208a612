"""Strict JSON: what reaches disk comes back exactly, or every problem is named at once.

`read_json` refuses what the json module lets pass: duplicate keys, NaN and infinities.
`Fields` takes a mapping apart by a small specification and collects unknown, missing and mistyped keys.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .errors import RecordError

SCHEMA_VERSION = 1  # of alphas files, plans and reports


def read_json(path: Path, *, max_bytes: int = 100_000_000) -> Any:
    """The content of a JSON file.

    Raises:
        RecordError: the file cannot be read, is larger than `max_bytes`, is not JSON, repeats a key or holds NaN.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise RecordError(f"{path} has {path.stat().st_size:,} bytes; expected a JSON file below {max_bytes:,}")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {why_not_read(path, error)}") from error


def why_not_read(path: Path, error: OSError) -> str:
    """Why a file or folder cannot be read, as the end of a message; of one that is not there, what may have been meant."""
    if not isinstance(error, FileNotFoundError):
        return error.strerror or str(error)
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    near = difflib.get_close_matches(path.name, [one.name for one in path.parent.iterdir()], n=3)
    return "no such file or folder" + (f"; did you mean {', '.join(str(path.parent / name) for name in near)}?" if near else "")


def parse_json(text: bytes | str, where: str) -> Any:
    """The value that `text` encodes; `where` names it in errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise RecordError(f"{where}: key {key!r} stands twice in one object; remove one of them")
            found[key] = value
        return found

    def refuse(constant: str) -> Any:
        raise RecordError(f"{where}: found {constant}, expected finite numbers")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
        if (b"\\ud" if isinstance(text, bytes) else "\\ud") in text.lower():  # type: ignore[operator]
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text, and could be written nowhere
        return value
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError covers bad syntax and bad UTF-8
        raise RecordError(f"{where} is not valid JSON: {error}") from error


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice; reads 1e-3 as a number, as YAML 1.2 and JSON do, and PyYAML by itself does not."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} stands twice in one mapping, line {node.start_mark.line + 1}")
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, of which JSON is a part.

    Raises:
        RecordError: it cannot be read, is not YAML, or repeats a key.
    """

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {why_not_read(path, error)}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


class Fields:
    """Takes mappings apart and collects every problem; `done()` raises them together.

    >>> fields = Fields("a.json")
    >>> name, = fields.take({"name": "x"}, name=str)
    >>> fields.done()
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def take(self, mapping: Any, at: str = "", /, **types: Any) -> list[Any]:
        """The values of `types`' keys, in that order; None for what is absent or wrong.

        A type in a tuple that ends in None marks an optional key: `name=(str, None)`.
        """
        place = f"{at}: " if at else ""
        if not isinstance(mapping, Mapping):
            self.problem(f"{place}found {_kind(mapping)}, expected an object with {', '.join(types)}")
            return [None] * len(types)
        for key in mapping:
            if key not in types:
                near = difflib.get_close_matches(str(key), types, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(types)}"
                self.problem(f"{place}unknown key {key!r} ({hint})")
        values = []
        for key, expected in types.items():
            allowed = expected if isinstance(expected, tuple) else (expected,)
            value = mapping.get(key)
            if value is None:
                if allowed[-1] is not None:
                    self.problem(f"{place}{key!r} is missing")
            elif not _is_a(value, allowed):
                names = " or ".join(_TYPE_NAMES[kind] for kind in allowed if kind is not None)
                self.problem(f"{place}{key!r} is {_kind(value)}, expected {names}")
                value = None
            values.append(value)
        return values

    def check_version(self, version: Any) -> None:
        """Collects a problem unless `version` is the one that this release reads."""
        if version is not None and version != SCHEMA_VERSION:
            self.problem(f"'schema_version' is {version!r}, expected {SCHEMA_VERSION}; this file needs another release")

    def done(self) -> None:
        """Raises RecordError with all collected problems, if there are any."""
        if self.problems:
            raise RecordError(f"{self.where}: " + "; ".join(self.problems))


@contextmanager
def named(where: str) -> Iterator[None]:
    """Puts `where` in front of the message of a RecordError raised inside."""
    try:
        yield
    except RecordError as error:
        raise RecordError(f"{where}: {error}") from error


_TYPE_NAMES = {str: "a string", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


def _is_a(value: Any, allowed: tuple[Any, ...]) -> bool:
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) > 1 << 63):  # True is an int to Python only
        return False
    return any(isinstance(value, (int, float) if kind is float else kind) for kind in allowed if kind is not None)


def _kind(value: Any) -> str:
    text = "a number beyond 64 bits" if isinstance(value, int) and abs(value) > 1 << 63 else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
