"""Checkpoints and files that somebody broke, or made to break in: one line that names the file, nothing written, nothing run.

A few hundred cases in `make test`; `pytest -m slow tests/faults` has ten thousand.
"""

import json
import shutil

import pytest
from faults.harness import content
from faults.mutate import KINDS, REFUSED, damage, damage_text
from test_mmlu import write_archive
from tiny import tiny_source

from eval.evaluation import evaluate_mmlu
from eval.mmlu import read_mmlu
from merge.api import Options, merge_checkpoint
from merge.methods import plan_from_method
from merge.source import resolve
from merge.verify import verify_folder

LAYERS, FEW, MANY = 3, 300, 10_000
FEW_FILES, MANY_FILES = 40, 400  # of every kind of file
LONGEST_S = 5.0
MEMORY_BYTES = 2**30  # beside what the imports take


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_cache):
    """A model of three layers in several shards, and files of every kind that scripts read."""
    folder = tmp_path_factory.mktemp("inputs")
    plan = plan_from_method("drop-last", 32, 32 - LAYERS)
    merge_checkpoint(plan, tiny_source("llama3-8b", tiny_cache), folder / "model", Options(max_shard_size="4KB"))
    for name in ("plan.json", "report.json"):
        (folder / "model" / name).unlink()
    assert len(list((folder / "model").glob("*.safetensors"))) > 1
    steps = {"steps": [{"into": 1, "remove": 2, "alpha": 0.6}], "num_hidden_layers": LAYERS}
    (folder / "alphas.json").write_text(json.dumps({"schema_version": 1, "name": "a"} | steps))
    rows = [{"base": 0}, {"base": 2, "mix": {"1": 0.5, "2": 0.5}, "groups": {"mlp.down_proj": {"1": 1.0}}}]
    (folder / "plan.json").write_text(json.dumps({"schema_version": 1, "num_hidden_layers": LAYERS, "rows": rows}))
    write_archive(folder / "mmlu", count=3)
    (folder / "text.txt").write_text("Some text, " * 200)
    study = {"model": str(folder / "model"), "merges": [str(folder / "alphas.json")], "skip": ["mmlu", "cloze", "speed"]}
    study |= {"text": {"file": str(folder / "text.txt"), "choose_tokens": 64, "tokens": 64}, "controls": []}
    (folder / "study.json").write_text(json.dumps(study | {"generation": {"prompts": ["A"], "tokens": 2}}))
    fusion = {
        "schema_version": 1, "host": {"model": str(folder / "model")},
        "donors": [{"model": str(folder / "model"), "taps": [1]}],
        "fusion": {"mode": "gate", "sites": [1.0], "rank": 4, "heads": 2},
    }  # fmt: skip
    (folder / "fusion.json").write_text(json.dumps(fusion))
    evaluate_mmlu(
        resolve(str(folder / "model")), read_mmlu(folder / "mmlu", ["anatomy"]), num_fewshot=1, out=folder / "scores.json"
    )
    return folder


def refuse(ended, names, what):
    """The ways in which a command may end on bad input."""
    assert "Traceback" not in ended.stderr, f"{what}: {ended.stderr}"
    assert ended.time_s < 4 * LONGEST_S, what  # on a machine that does other things too; the report has the figures
    if ended.status == 0:
        return False
    assert ended.status in (1, 2), f"{what}: {ended.status} {ended.stderr}"
    lines = [line for line in ended.stderr.strip().splitlines() if line.startswith("error: ") or ": error: " in line]
    assert len(lines) == 1, f"{what}: {ended.stderr!r}"
    assert any(name in lines[0] for name in names), f"{what}: no file is named: {lines[0]!r}"
    assert len(lines[0]) < 2000, what
    return True


def attack_checkpoint(seed, inputs, folder, warm):
    """One damaged checkpoint, merged."""
    work = folder / "work"
    shutil.copytree(inputs / "model", work / "model")
    kind, expected = damage(work / "model", seed)
    before = content(work)
    arguments = ["--model", "model", "--method", "uniform", "--layers", 1, "--out", "out"]
    ended = warm.run("merge", arguments, work, limits={"memory": MEMORY_BYTES})
    what = f"case {seed} ({kind})"
    assert not (work / "executed").exists(), f"{what}: code was run"
    if refuse(ended, [path.name for path in (inputs / "model").iterdir()] + ["model"], what):
        assert content(work) == before, f"{what}: something was written"
    else:
        assert expected != REFUSED, f"{what} was accepted"
        verify_folder(work / "out", resolve(str(work / "model")))
    shutil.rmtree(work)
    return kind, ended


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints(kind, inputs, tmp_path, warm):
    for turn in range(FEW // len(KINDS) + 1):
        attack_checkpoint(KINDS.index(kind) + turn * len(KINDS), inputs, tmp_path, warm)


@pytest.mark.slow
def test_very_many_damaged_checkpoints(inputs, tmp_path, warm):
    worst, refused = 0.0, 0
    for seed in range(MANY):
        _, ended = attack_checkpoint(seed, inputs, tmp_path, warm)
        worst, refused = max(worst, ended.time_s), refused + (ended.status != 0)
    print(f"{refused} of {MANY} refused, the slowest in {worst:.2f} s")
    assert worst < LONGEST_S


FILES = {  # file -> script and options that read it; FILE stands for its name
    "alphas.json": ("merge", ["--model", "model", "--alphas", "FILE", "--out", "out"]),
    "plan.json": ("merge", ["--model", "model", "--plan", "FILE", "--out", "out"]),
    "fusion.json": ("fuse", ["--config", "FILE", "--out", "out"]),
    "study.json": ("pipeline", ["--config", "FILE", "--out", "out", "--no-report"]),
    "scores.json": ("compare", ["FILE", "other.json"]),
    "scores.parquet": ("compare", ["scores.json", "other.json"]),
    "mmlu/test/anatomy_test.csv": (
        "eval_mmlu", ["--model", "model", "--data-dir", "mmlu", "--subjects", "anatomy", "--num-fewshot", 1, "--out", "r.json"],
    ),
}  # fmt: skip


def read_by_its_script(name, seed, inputs, work, warm):
    """How a script ends that reads a file of WORK, what was there before, and what was done to the file (no seed: nothing)."""
    shutil.copytree(inputs, work)
    for suffix in ("json", "parquet"):
        shutil.copy(work / f"scores.{suffix}", work / f"other.{suffix}")
    if name == "study.json":  # absolute paths are of the originals
        (work / name).write_text((work / name).read_text().replace(str(inputs), str(work)))
    kind = "whole" if seed is None else damage_text(work / name, seed)
    before = content(work)
    script, arguments = FILES[name]
    arguments = [name if one == "FILE" else one for one in arguments]
    return warm.run(script, arguments, work, limits={"memory": MEMORY_BYTES}), before, kind


@pytest.mark.parametrize("name", FILES)
def test_whole_files(name, inputs, tmp_path, warm):
    """What is damaged below is accepted before it is."""
    ended, _, _ = read_by_its_script(name, None, inputs, tmp_path / "work", warm)
    assert ended.status == 0, ended.stderr


def attack_file(name, seed, inputs, folder, warm):
    """One damaged file, read by the script that it is for."""
    work = folder / "work"
    ended, before, kind = read_by_its_script(name, seed, inputs, work, warm)
    others = ["cannot be read"] if name == "study.json" else []  # a file that it names
    if refuse(
        ended,
        [name.rpartition("/")[2], "command line", "model", "out", "anatomy", *others],
        f"{name}, case {seed} ({kind})",
    ):
        written = {path: data for path, data in content(work).items() if not path.startswith("r.progress")}
        assert written == before or name == "study.json", f"{name}, case {seed}: something was written"
    shutil.rmtree(work)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name, inputs, tmp_path, warm):
    for seed in range(FEW_FILES if name in ("alphas.json", "plan.json", "scores.json") else FEW_FILES // 4):
        attack_file(name, seed, inputs, tmp_path, warm)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_very_many_damaged_files(name, inputs, tmp_path, warm):
    for seed in range(MANY_FILES):
        attack_file(name, seed, inputs, tmp_path, warm)
