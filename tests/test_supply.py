"""What is installed with the project, and code that comes with models."""

import ast
import importlib.metadata as metadata
import re

from packaging.requirements import Requirement
from tiny import ROOT

OWN = "layerfuse"


def name_of(text):
    return re.sub(r"[-_.]+", "-", text).lower()


def pinned():
    """{name: version} of constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return {name_of(name): version for name, version in found.items()}


def needed():
    """The names of everything that the project and its extras bring with them here."""

    found, todo = set(), [(OWN, "test"), (OWN, "completion")]
    while todo:
        name, extra = todo.pop()
        try:
            requirements = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:  # of a test environment that is not whole; its name is known all the same
            continue
        for text in requirements:
            one = Requirement(text)
            if one.marker is not None and not one.marker.evaluate({"extra": extra}):
                continue
            for more in {"", *one.extras}:
                if (name_of(one.name), more) not in found:
                    found.add((name_of(one.name), more))
                    todo.append((one.name, more))
    return {name for name, _ in found}


def test_every_version_is_exact():
    assert all(re.fullmatch(r"\d[\w.+!-]*", version) for version in pinned().values())


def test_nothing_comes_in_an_unknown_version():
    assert needed() - pinned().keys() - {OWN} == set()


def trusting(path):
    """Calls in a file that may run a model's own code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield node.lineno


def test_code_that_comes_with_a_model_is_never_trusted():
    """Not by a keyword; and that a folder's code is not run, tests/faults/test_hostile.py shows."""
    files = [path for folder in ("merge", "eval", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [(path.name, line) for path in files for line in trusting(path)] == []


def test_a_trusting_call_would_be_seen(tmp_path):
    (tmp_path / "x.py").write_text("load('m', trust_remote_code=True)\nload('m', trust_remote_code=False)\n")
    assert list(trusting(tmp_path / "x.py")) == [1]
