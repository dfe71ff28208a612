"""Every writing command on small inputs: what it writes, when that is whole, and what of it two runs have in common."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from faults.harness import content
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

LAYERS = 4
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


def write_inputs(folder: Path, tiny_cache: Path) -> None:
    """A model of four layers, data for it, and a .gguf file."""
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


def without_times(value):
    """A record without what differs from run to run."""
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if key not in TIMES and not key.endswith("_s")}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def weights(folder):
    """All files but those that say when and how fast they were made, and the card, which may name the command."""
    timed = ("report.json", "README.md", "fusion.json", "training.png")
    found = {name: data for name, data in content(folder).items() if name not in timed}
    if "training.csv" in found:  # its last column is seconds
        found["training.csv"] = [line.rpartition(b",")[0] for line in found["training.csv"].splitlines()]
    return found


def finished_trials(path: Path) -> list[tuple[int, float]]:
    """(number, value) of the finished trials in a storage."""
    query = "select t.number, v.value from trials t join trial_values v using (trial_id) where t.state = 'COMPLETE'"
    if not path.exists():
        return []
    with closing(sqlite3.connect(path)) as database:
        if not database.execute("select 1 from sqlite_master where name = 'trial_values'").fetchall():
            return []
        return sorted(database.execute(query).fetchall())


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
        found = finished_trials(folder / "s.db")
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
