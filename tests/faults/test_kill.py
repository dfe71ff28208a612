"""Every writing command, stopped by a signal at random moments: what has its name is whole, and a second run ends as one that
was never stopped. `pytest -m slow tests/faults` stops each 200 times by each signal.
"""

import json
import random
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from faults.harness import SIGNALS, content
from faults.tiny_gguf import write_gguf
from test_mmlu import write_archive
from tiny import tiny_source

from eval.pipeline.summary import read_study
from eval.results import read_results
from merge.api import merge_checkpoint
from merge.checkpoint import read_checkpoint
from merge.methods import plan_from_method
from merge.source import resolve
from merge.verify import verify_folder

LAYERS, FEW, MANY = 4, 10, 200
TRIALS = 4
TEXT = "".join(f"Line {i} of a text that says {i * i} and then some more.\n" for i in range(80))
TIMES = {"time_s", "peak_rss_bytes", "questions_per_s", "train_s"}  # keys of records that differ from run to run
STOPPED = "stopped"  # what a command says first when it is asked to end


@dataclass(frozen=True)
class Command:
    """A writing command.

    arguments   of the first run and, after that, of `again`
    check       raises if what a stopped run has left under its names is not whole
    same        what of a finished run has to be the same however often it was stopped
    before      makes what is there when it starts
    kept        what a stopped run has finished, and the next must not lose
    """

    script: str
    arguments: list
    again: list
    check: Callable[[Path], None]
    same: Callable[[Path], object]
    before: Callable[[Path], None] = lambda folder: None
    kept: Callable[[Path], list] = lambda folder: []


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_cache):
    """A model of four layers, data for it, and a .gguf file."""
    folder = tmp_path_factory.mktemp("inputs")
    merge_checkpoint(plan_from_method("drop-last", 32, 32 - LAYERS), tiny_source("llama3-8b", tiny_cache), folder / "model")
    for name in ("plan.json", "report.json"):
        (folder / "model" / name).unlink()
    write_archive(folder / "mmlu", count=5)
    (folder / "text.txt").write_text(TEXT)
    write_gguf(folder / "tiny.gguf")
    for name, alpha in (("a", 0.6), ("b", 0.2)):
        content = {"steps": [{"into": 2, "remove": 3, "alpha": alpha}], "num_hidden_layers": LAYERS}
        (folder / f"{name}.json").write_text(json.dumps({"schema_version": 1, "name": name} | content))
    recipe = {
        "schema_version": 1, "host": {"model": str(folder / "model")},
        "donors": [{"model": str(folder / "model"), "taps": [1]}],
        "fusion": {"mode": "gate", "sites": [1.0], "rank": 4, "heads": 2},
        "training": {
            "text": [str(folder / "text.txt")], "updates": 4, "block": 16, "batch": 2, "learning_rate": 0.01,
            "evaluate_every": 2,
        },
    }  # fmt: skip
    (folder / "fuse.json").write_text(json.dumps(recipe))
    return folder


def without_times(value):
    """A record without what differs from run to run."""
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if key not in TIMES and not key.endswith("_s")}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def weights(folder):
    """All files but those that say when and how fast they were made, and the card, which may name the command."""
    timed = ("report.json", "README.md", "fusion.json", "training.png")  # a picture is drawn when the folder is there
    found = {name: data for name, data in content(folder).items() if name not in timed}
    if "training.csv" in found:  # its last column is seconds
        found["training.csv"] = [line.rpartition(b",")[0] for line in found["training.csv"].splitlines()]
    return found


def commands(inputs):
    source = resolve(str(inputs / "model"))
    common = ["--data-dir", inputs / "mmlu", "--num-fewshot", 1, "--text", inputs / "text.txt"]

    def merged(folder):
        if (folder / "out").exists():
            verify_folder(folder / "out", source)

    def replaced(folder):
        verify_folder(folder / "out", source)  # it is there at every moment

    def old(folder):
        merge_checkpoint(plan_from_method("uniform", LAYERS, 1), source, folder / "out")

    def converted(folder):
        for one in (folder / "cache" / "layerfuse" / "gguf").glob("[!.]*"):
            read_checkpoint(one)
            assert {"tokenizer.json", "model.safetensors", "config.json"} <= {path.name for path in one.iterdir()}

    def evaluated(folder):
        if (folder / "r.json").exists():
            read_results(folder / "r.json")

    def fused(folder):
        if (folder / "out").exists():
            read_checkpoint(folder / "out")

    def trials(folder):
        """(number, parameters, value) of the finished trials of a study; none twice."""
        if not (folder / "s.db").exists():
            return []
        query = "select t.number, v.value from trials t join trial_values v using (trial_id) where t.state = 'COMPLETE'"
        with closing(sqlite3.connect(folder / "s.db")) as database:
            if not database.execute("select 1 from sqlite_master where name = 'trial_values'").fetchall():
                return []
            found = sorted(database.execute(query).fetchall())
        assert len({number for number, _ in found}) == len(found) <= TRIALS
        return found

    def searched(folder):
        trials(folder)
        if (folder / "found" / "search.json").exists():
            json.loads((folder / "found" / "search.json").read_text())

    def studied(folder):
        for path in (folder / "study").glob("*/results.json"):
            if "scores" in json.loads(path.read_text()):
                read_results(path)

    def measured(folder):
        study = read_study(folder / "study")
        assert study.record["finished"]
        return [
            (model.name, without_times(model.parts.get("text")), model.record["scores"], model.answers)
            for model in study.models
        ]

    alphas = ["--model", inputs / "model", "--alphas", inputs / "a.json", "--out", "out"]
    replace = [*alphas, "--overwrite"]
    scored = ["--model", inputs / "model", *common, "--subjects", "anatomy,virology", "--out", "r.json"]
    search = [
        "--model", inputs / "model", "--alphas", inputs / "a.json", "--method", "tpe", "--trials", TRIALS, "--objective",
        "perplexity", "--text", inputs / "text.txt", "--text-tokens", 200, "--text-window", 100, "--no-plots", "--storage",
        "sqlite:///s.db", "--resume", "--out", "found",
    ]  # fmt: skip
    study = [
        "--model", inputs / "model", "--alphas", inputs / "a.json", *common, "--subjects", "anatomy", "--choose-tokens", 64,
        "--text-tokens", 100, "--skip", "cloze,speed,generation", "--controls", "drop-last,drop-greedy", "--out", "study",
    ]  # fmt: skip
    fuse = ["--config", inputs / "fuse.json", "--out", "out"]
    return {
        "merge": Command("merge", alphas, alphas, merged, lambda folder: weights(folder / "out")),
        "replace": Command("merge", replace, replace, replaced, lambda folder: weights(folder / "out"), before=old),
        "convert": Command(
            "merge", ["--model", inputs / "tiny.gguf", "--method", "drop-last", "--layers", 1, "--dry-run"],
            ["--model", inputs / "tiny.gguf", "--method", "drop-last", "--layers", 1, "--dry-run"], converted,
            lambda folder: content(folder / "cache" / "layerfuse" / "gguf"),
        ),
        "fuse": Command("fuse", fuse, fuse, fused, lambda folder: weights(folder / "out")),
        # A trial that was killed has no value, and another takes its place.
        "search": Command("search_alphas", search, search, searched, lambda folder: len(trials(folder)), kept=trials),
        "eval": Command(
            "eval_mmlu", scored, [*scored, "--resume"], evaluated,
            lambda folder: [without_times(read_results(folder / "r.json")[0]["scores"]), read_results(folder / "r.json")[1]],
        ),
        "pipeline": Command("pipeline", study, [*study, "--resume"], studied, measured),
    }  # fmt: skip


NAMES = ("merge", "replace", "convert", "fuse", "search", "eval", "pipeline")


def attack(name, inputs, folder, warm, count, numbers):
    """Stops a command `count` times by each signal, each time in a new folder, and lets it end."""
    command = commands(inputs)[name]

    def begin(where):
        (where / "work").mkdir(parents=True)
        command.before(where / "work")
        return where / "work", {"XDG_CACHE_HOME": str(where / "work" / "cache")}

    work, environment = begin(folder / "whole")
    whole = warm.run(command.script, command.arguments, work, **environment)
    assert whole.status == 0, whole.stderr
    expected, names = command.same(work), sorted(path.name for path in work.iterdir())
    rng, stopped, moments = random.Random(f"{name} {numbers}"), 0, []
    for turn in range(count):
        number = numbers[turn % len(numbers)]
        work, environment = begin(folder / str(turn))
        after = rng.uniform(0.0, 1.05 * whole.time_s)
        ended = warm.run(command.script, command.arguments, work, stop=(after, number), **environment)
        if ended.status != 0:
            stopped += 1
            moments.append(after / whole.time_s)
            assert ended.status in (-number, SIGNALS[number]), ended.stderr
            if ended.status > 0:  # it ended by itself, and said so in one line
                assert ended.stderr.strip().splitlines()[-1].startswith(STOPPED), ended.stderr
                assert "Traceback" not in ended.stderr
        command.check(work)
        kept = command.kept(work)
        again = warm.run(command.script, command.again, work, **environment)
        if again.status in (1, 2):  # it was done, which it said, and what is there is not replaced
            assert "--overwrite" in again.stderr, f"after {ended.status} at {after:.2f} s: {again.stderr}"
            assert ended.status in (0, -number) or "had been finished" in ended.stderr
        else:
            assert again.status == 0, f"after {ended.status} at {after:.2f} s: {again.stderr}"
        assert command.same(work) == expected
        assert set(kept) <= set(command.kept(work))
        left = {path.name for path in work.iterdir()} - set(names)
        assert not left, f"left behind: {left}"
        shutil.rmtree(folder / str(turn))
    return stopped, moments


@pytest.mark.parametrize("name", NAMES)
def test_stopped_at_random_moments(name, inputs, tmp_path, warm):
    stopped, _ = attack(name, inputs, tmp_path, warm, FEW, list(SIGNALS))
    assert stopped >= FEW // 3  # most moments are before the end


@pytest.mark.slow
@pytest.mark.parametrize("number", list(SIGNALS), ids=lambda number: signal.Signals(number).name)
@pytest.mark.parametrize("name", NAMES)
def test_stopped_at_very_many_moments(name, number, inputs, tmp_path, warm):
    stopped, moments = attack(name, inputs, tmp_path, warm, MANY, [number])
    assert stopped >= MANY // 2
    assert np.ptp(moments) > 0.5  # early ones and late ones
    print(f"{name}, {signal.Signals(number).name}: stopped {stopped} of {MANY}")
