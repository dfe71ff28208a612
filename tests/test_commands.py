"""Every command that --help or a page shows is one that its program accepts."""

import argparse
import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from string import Template

import pytest
from tiny import ROOT

SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if not path.name.startswith("_"))
BENCHMARKS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if not path.name.startswith("_"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "alphas" / "README.md"]
COMMAND = re.compile(r"(?:python3?|accelerate launch(?: --\w+ \d+)*) ((?:scripts|benchmarks)/\w+\.py)([^`\n]*)")
SHELL = {"|", "&&", "||", ">", ">>", ";"}  # where a command of the shell ends


def commands_in(text):
    """(lines above it, (program, its arguments)) of every command in a text; variables that the text sets are filled in."""
    variables = {}
    joined = re.sub(r" *\\\n\s*", " \0", text)  # \0: one line, still counted as two
    number = 0
    for line in joined.split("\n"):
        if re.match(r"[A-Z]+=", line):
            variables |= dict(re.findall(r"\b([A-Z]+)=(\S+)", line))
        for program, rest in COMMAND.findall(line.replace("\0", "")):
            rest = re.split(r"\s{2,}[^-\s]", Template(rest).substitute(variables).rstrip())[0]
            words = shlex.split(rest, comments=True)
            end = next((index for index, word in enumerate(words) if word in SHELL), len(words))
            yield number, (program, words[:end])
        number += 1 + line.count("\0")


def texts_in(path):
    """A page; or a program's docstring and its constants, EXAMPLES among them. Each with the number of its first line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [(text, 1)]
    values = [node.value for node in ast.parse(text).body if isinstance(node, (ast.Expr, ast.Assign))]
    return [(node.value, node.lineno) for node in values if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def all_commands():
    return [
        pytest.param(program, words, id=f"{path.relative_to(ROOT)}:{first + number}")
        for path in [*PAGES, *SCRIPTS, *BENCHMARKS]
        for text, first in texts_in(path)
        for number, (program, words) in commands_in(text)
    ]


@cache
def module(program):
    """A script or benchmark, imported under a name of its own: `merge` is a package."""
    path = ROOT / program
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class ParsedError(Exception):
    """A benchmark has read its command line."""


@pytest.mark.parametrize(("program", "words"), all_commands())
def test_is_accepted(program, words, monkeypatch):
    assert (ROOT / program).is_file(), f"there is no {program}"
    for word in words:
        assert not word.startswith("configs/") or (ROOT / word).is_file(), f"there is no {word}"
    if program.startswith("scripts/"):
        arguments = module(program).options().parse_args(words)
        if check := getattr(module(program), "_check_usage", None):
            check(arguments)
        return
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self, arguments=None):
        parse(self, arguments)
        raise ParsedError

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(ParsedError):
        module(program).main()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_has_three_examples(path):
    text = module(f"scripts/{path.name}").options().format_help()
    assert len(re.findall(r"^  (?:make|\S*python|accelerate) ", text, re.MULTILINE)) >= 3
    assert len(re.findall(rf"scripts/{path.name}", text)) >= 2


def test_commands_are_found():
    """The reader above, on what it has to read."""
    text = (
        "`python scripts/a.py X` shows\n    accelerate launch --num_processes 4 scripts/b.py --m DIR        # several\n"
        'F=one G=two\npython scripts/c.py --runs $F,$G-x \\\n    --text "a b"   then this happens\n'
        "python scripts/d.py --json > e"
    )
    assert list(commands_in(text)) == [
        (0, ("scripts/a.py", ["X"])),
        (1, ("scripts/b.py", ["--m", "DIR"])),
        (3, ("scripts/c.py", ["--runs", "one,two-x", "--text", "a b"])),
        (5, ("scripts/d.py", ["--json"])),
    ]
    assert len(all_commands()) > 100


def test_help_is_quick():
    """No script imports for its options what takes a second to import."""
    code = (
        "import runpy, sys; sys.path.insert(0, 'scripts')\n"
        f"for path in {[str(path) for path in SCRIPTS]}: runpy.run_path(path)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'scipy.stats', 'pandas', 'matplotlib', 'optuna'}\n"
        "heavy.add('huggingface_hub.hf_api')  # the Hub's client\n"
        "sys.exit(' '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
