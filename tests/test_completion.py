"""TAB in a real bash, by argcomplete's own function for `python FILE`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if not path.name.startswith("_"))
ACTIVATE = Path(sys.executable).with_name("activate-global-python-argcomplete")
BASH = """
eval "$({activate} --dest=-)"
complete -p -D
COMP_WORDS=({line}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9
_python_argcomplete_global python
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(line, **changes):
    """What bash is told for the command line `line`."""
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH.format(line=line, activate=ACTIVATE)],
        cwd=ROOT, env=os.environ | {"PATH": path} | changes, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    registered, *answers = done.stdout.splitlines()
    assert "_python_argcomplete_global" in registered, done.stderr
    return [answer.strip() for answer in answers if answer]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_is_marked(path):
    """argcomplete's shell code looks into the first kilobyte."""
    assert path.read_text().startswith("# PYTHON_ARGCOMPLETE_OK\n")


def test_options_and_their_values():
    pytest.importorskip("argcomplete")
    assert completed("python scripts/merge.py --me") == ["--method"]
    assert completed("python scripts/merge.py --method drop-") == ["drop-last", "drop-keep-last"]
    assert "configs/" in completed("python scripts/merge.py --model conf")


def test_no_torch_for_it(tmp_path):
    pytest.importorskip("argcomplete")
    report = tmp_path / "imports.txt"
    asked = {"_ARGCOMPLETE": "2", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer")}
    asked |= {"COMP_LINE": "python scripts/merge.py --me", "COMP_POINT": "28", "_ARGCOMPLETE_IFS": "\n"}
    with report.open("w") as file:
        command = [sys.executable, "-X", "importtime", "scripts/merge.py"]
        subprocess.run(command, cwd=ROOT, env=os.environ | asked, stderr=file, check=True, timeout=60)
    assert (tmp_path / "answer").read_text() == "--method "
    imported = {line.rpartition("|")[2].strip() for line in report.read_text().splitlines()}
    assert "argcomplete" in imported
    assert imported.isdisjoint({"torch", "transformers", "datasets", "scipy", "pandas", "sklearn"})


def test_without_argcomplete_nothing_runs(tmp_path):
    """A script asked to complete where the library is missing must not begin its work: TAB is no Enter."""
    (tmp_path / "argcomplete.py").write_text("raise ImportError")
    asked = {"_ARGCOMPLETE": "2", "COMP_LINE": "python scripts/demo.py ", "COMP_POINT": "23", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "scripts" / "demo.py")]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | asked, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
