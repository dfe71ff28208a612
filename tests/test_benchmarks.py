"""benchmarks/all.py on benchmarks that take no time: what it runs, keeps, compares and refuses."""

import json
import os
import subprocess
import sys

import pytest
from test_mmlu import write_archive
from tiny import ROOT

import benchmarks.all as runner

FAKES = {
    "good": """
import json, sys
said = dict(zip(sys.argv[1::2], sys.argv[2::2]))
half = open(said["--half"]).read()
print("a table")
print(json.dumps({"ratio": 2.0, "times": {"a, b": [9, 1, 2]}, "same": True, "half": half, "no number": None, "bits": 3}))
""",
    "broken": "import sys; print('begun'); sys.exit('it broke here')",
    "slow": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(300)'])",
    "mute": "print('done')",
    "renamed": "print('{\"other\": 1}')",
}
FIGURES = {
    "times/a, b": ("time", "s", runner.LOWER),
    "ratio": ("ratio", "", runner.HIGHER),
    "same": ("same", "", runner.HIGHER),
    "half": ("a text", "", runner.HIGHER),
    "no number": ("nothing", "", runner.HIGHER),
}


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs main() on the fakes; (exit status, the record). `call.arguments` are enough for every fake."""
    lines = {}
    for name, code in FAKES.items():
        (tmp_path / f"{name}.py").write_text(code)
        options = " --model {model} --data {data} --half {half} --work {work}" if name == "good" else ""
        lines[name] = (2.0 if name == "slow" else 60.0, f"'{tmp_path / name}.py'{options}")
    (tmp_path / "m.gguf").touch()
    (tmp_path / "text.txt").write_text("onetwo")
    monkeypatch.setitem(runner.SETS, "small", lines)
    monkeypatch.setattr(runner, "FIGURES", dict.fromkeys(FAKES, FIGURES))
    out = tmp_path / "out.json"

    def main(*more):
        status = runner.main([*call.arguments, *map(str, more)])
        return status, json.loads(out.read_text())

    call = main
    call.arguments = ["--model", str(tmp_path / "m.gguf"), "--data-dir", str(tmp_path), "--text", str(tmp_path / "text.txt")]
    call.arguments += ["--out", str(out), "--against", str(tmp_path / "before.json")]
    return call


def test_one_that_fails_does_not_stop_the_others(call, tmp_path, capsys):
    status, record = call("--note", "beside other work")
    assert (status, record["note"]) == (1, "beside other work")
    assert {"commit", "machine", "versions", "load"} <= record.keys()
    found = record["benchmarks"]
    assert list(found) == list(FAKES)
    good = found["good"]
    assert good["command"] == f"python '{tmp_path}/good.py' --model m.gguf --data MMLU --half half of text.txt --work WORK"
    assert {name: one["value"] for name, one in good["figures"].items()} == {"time": 2, "ratio": 2.0, "same": 1.0}
    assert found["broken"]["error"] == "exit status 1\n      it broke here"
    assert found["slow"]["error"] == "stopped after 2 s"
    assert found["slow"]["seconds"] < 100  # the process that it started would hold its output open for longer
    assert found["mute"]["error"] == "the last line of its stdout is no JSON\n      done"
    assert found["renamed"]["error"].startswith("its JSON has none of times/a, b, ratio")
    said = capsys.readouterr()
    assert "it broke here" in said.err
    last = json.loads(said.out.splitlines()[-1])
    assert last == {"out": str(tmp_path / "out.json"), "benchmarks": 5, "failed": ["broken", "slow", "mute", "renamed"]}


def test_comparison_with_the_committed_figures(call, tmp_path, capsys):
    """A figure is compared where the command was the same; those without a unit come first."""
    status, record = call("--only", "good", "--note", "beside other work")
    assert status == 0
    assert f"there is no {tmp_path / 'before.json'} to compare with" in capsys.readouterr().err
    figures = record["benchmarks"]["good"]["figures"]
    figures["ratio"]["value"], figures["time"]["value"] = 4.0, 1.0
    figures["gone"] = {"value": 7.0, "unit": "s", "better": "lower"}
    record["machine"]["processor"], record["commit"] = "another", "abc1234"
    (tmp_path / "before.json").write_text(json.dumps(record))
    call("--only", "good")
    said = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.out.splitlines()[:-1]]
    assert rows[0] == ["benchmark", "figure", "now", "committed (abc1234)", "ratio"]
    assert rows[2:] == [
        ["good", "ratio", "2", "4", "0.50 worse"],
        ["good", "same", "1", "1", "1.00"],
        ["good", "time, s", "2", "1", "2.00 worse"],
        ["good", "gone, s", "", "7", ""],
    ]
    assert "is of another machine" in said.err
    assert "before.json says: beside other work" in said.err
    call("--only", "good", "--add", "good=--other 1")
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert all(not row[4].strip() for row in rows)


def test_nothing_runs_that_cannot_end_well(call, tmp_path, capsys):
    (tmp_path / "bad.json").write_text("[1]")
    for more, said in (
        (["--only", "god"], "there is no benchmark 'god' in small; did you mean good?"),
        (["--add", "goood=--x"], "there is no benchmark 'goood' in small; did you mean good?"),
        (["--text", tmp_path], f"there is no file {tmp_path}"),
        (["--dir", tmp_path / "no"], f"there is no folder {tmp_path / 'no'}"),
        (["--out", tmp_path / "no" / "out.json"], f"there is no folder {tmp_path / 'no'}"),
        (["--against", tmp_path / "bad.json"], "bad.json is no record of benchmarks/all.py"),
    ):
        with pytest.raises(SystemExit, match="2"):
            call(*more)
        assert said in capsys.readouterr().err
    for missing, option in enumerate(("--model", "--data-dir", "--text")):
        with pytest.raises(SystemExit, match="2"):
            runner.main(call.arguments[: 2 * missing] + call.arguments[2 * missing + 2 :])
        assert f"{option} is needed for good" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_output_is_whole_or_as_before(call, tmp_path, monkeypatch):
    (tmp_path / "out.json").write_text("before")

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        call()
    assert (tmp_path / "out.json").read_text() == "before"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", runner.SETS)
def test_every_command_exists(name):
    """Scripts and options are there, figures are named, and the GPU's set has an end and a rehearsal."""
    for member, (_, line) in runner.SETS[name].items():
        assert runner.FIGURES[member]
        script, *rest = line.split()
        code = (ROOT / script).read_text()
        assert [option for option in rest if option.startswith("--") and f'"{option}"' not in code] == [], member
    assert runner.SETS["gpu"].keys() == runner.SETS["rehearsal"].keys()
    assert sum(limit for limit, _ in runner.SETS["gpu"].values()) < 600


@pytest.mark.slow
def test_rehearsal_of_the_gpu_set(tmp_path, tiny_cache):
    """Every member runs on a CPU and gives all its figures but the GPU's memory; without a GPU the real one is refused."""
    data = write_archive(tmp_path / "mmlu", ["anatomy"])
    environment = os.environ | {"XDG_CACHE_HOME": str(tiny_cache), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "all.py"), "--gpu", "--data-dir", str(data)]
    command += ["--out", str(tmp_path / "gpu.json"), "--model", "tiny:llama3-8b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch finds no GPU here; --gpu --device cpu runs the same on tiny shapes" in done.stderr
    done = subprocess.run([*command, "--device", "cpu"], env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    for member, found in record["benchmarks"].items():
        names = {name for path, (name, *_) in runner.FIGURES[member].items() if not path.endswith("peak_gpu_gb")}
        assert names <= found["figures"].keys(), member
