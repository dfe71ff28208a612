"""The direction of dependencies, and where the packages come from."""

import ast
import importlib
import subprocess
from pathlib import Path

import pytest
import yaml
from tiny import ROOT

ALLOWED = {"merge": set(), "eval": {"merge"}, "scripts": {"merge", "eval", "scripts"}}
KNOWS_NO_TORCH = {"plan", "records", "alphas", "methods", "families", "layer_config", "checkpoint", "blueprint", "verify"}


def imports_of(path):
    """Top-level names that a file imports, and whether each import is relative."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0], node.level > 0


@pytest.mark.parametrize("path", sorted([*ROOT.glob("merge/**/*.py"), *ROOT.glob("eval/**/*.py")]), ids=str)
def test_direction(path):
    package = path.relative_to(ROOT).parts[0]
    for name, relative in imports_of(path):
        if path.parent == ROOT / "eval" / "tasks" and name == "eval":
            continue  # lm-eval loads these files by their path: they are in no package
        if not relative:
            assert name not in ALLOWED or name in ALLOWED[package], f"{path} imports {name}"
            assert name not in {"_cli", "_checkout", "tests", "benchmarks"}


@pytest.mark.parametrize("module", sorted(KNOWS_NO_TORCH))
def test_plans_and_files_know_no_torch(module):
    assert {"torch", "transformers"}.isdisjoint(name for name, _ in imports_of(ROOT / "merge" / f"{module}.py"))


def test_nobody_imports_eval_as_a_name():
    """`import eval` hides the builtin; always `from eval.x import y`."""
    for path in ROOT.glob("[mest]*/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name != "eval" for alias in node.names), path


def test_packages_are_those_of_this_checkout():
    merge = importlib.import_module("merge")
    assert Path(merge.__file__).resolve().parent == ROOT / "merge"
    assert merge.Plan is importlib.import_module("merge.plan").Plan
    assert all(getattr(merge, name) is not None for name in merge.__all__)
    with pytest.raises(AttributeError):
        merge.no_such_name  # noqa: B018


def test_citation_is_of_this_release():
    record = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert record["version"] == importlib.import_module("merge").__version__
    assert (record["cff-version"], record["type"], record["title"]) == ("1.2.0", "software", "layerfuse")


def test_nothing_private_is_tracked():
    """Data sets, weights and results do not belong in the repository."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    assert [path for path in paths if path.is_file() and path.stat().st_size > 1_000_000] == []
