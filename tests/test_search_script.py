"""scripts/search_alphas.py as a user runs it, and what it says is what merging and evaluating afterwards gives."""

import json
import os
import subprocess
import sys

import pytest
from test_mmlu import write_archive
from tiny import ROOT

from eval.objective import PARTS, split_questions


@pytest.fixture
def run(tmp_path, tiny_cache):
    environment = os.environ | {"XDG_CACHE_HOME": str(tiny_cache), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "text.txt").write_text("Plain text to be predicted, and a little more of it. " * 60)
    data = write_archive(tmp_path / "mmlu", count=8)

    def call(script, *arguments, status=0):
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done

    questions = ("--split", "test", "--objective", "anatomy", "--num-fewshot", 1)
    text = ("--text", "text.txt", "--text-tokens", 200, "--text-window", 100)
    call.common = ("--model", "tiny:llama3-8b", "--data-dir", data, *questions, *text)
    return call


def test_alphas_by_gradient_then_merge(run, tmp_path):
    done = run("search_alphas", *run.common, "--layers", 2, "--steps", 5, "--refine", 1, "--out", "found")
    assert "2 alphas, of which about" in done.stderr
    assert "held out, found against the same layers dropped: kl " in done.stdout
    report = json.loads((tmp_path / "found" / "search.json").read_text())
    assert set(report["scores"]) == {"original", "start", "dropped", "drop-last", "found"}
    assert report["scores"]["dropped"] == report["scores"]["drop-last"]  # the top layers are what is dropped here
    assert report["scores"]["original"]["search"]["agreement"] == 1.0
    assert report["scores"]["original"]["search"]["kl"] == pytest.approx(0.0, abs=1e-3)
    header, *rows = (tmp_path / "found" / "trials.csv").read_text().splitlines()
    assert header == "candidate,start,loss,30<-31,29<-30"
    assert len(rows) == 1
    run("merge", "--alphas", "found/alphas.json", "--model", "tiny:llama3-8b", "--out", "merged", "--verify")
    evaluation = ("--data-dir", run.common[3], "--subjects", "anatomy", "--num-fewshot", 1, "--text", "text.txt")
    run("eval_mmlu", "--model", "merged", *evaluation, "--out", "merged.json")
    accuracies = {part: report["scores"]["found"][part] for part in PARTS}
    right = sum(round(one["acc"] * one["questions"]) for one in accuracies.values())
    merged = json.loads((tmp_path / "merged.json").read_text())["scores"]["micro"]
    assert (round(merged["acc"] * merged["count"]), merged["count"]) == (right, 8)


def test_coefficients_for_dropped_layers(run, tmp_path):
    run("search_alphas", *run.common, "--remove", "5,17", "--target", "text", "--steps", 4, "--refine", 1, "--out", "found")
    plan = json.loads((tmp_path / "found" / "plan.json").read_text())
    assert len(plan["rows"]) == 30
    assert set(plan["rows"][4]["groups"]) >= {"mlp.up_proj", "input_layernorm"}
    report = json.loads((tmp_path / "found" / "search.json").read_text())
    assert "kl" not in report["scores"]["found"]["held-out"]
    assert report["scores"]["found"]["search"]["text_nll"] <= report["scores"]["dropped"]["search"]["text_nll"]
    assert not (tmp_path / "found" / "alphas.json").exists()
    run("merge", "--plan", "found/plan.json", "--model", "tiny:llama3-8b", "--out", "merged", "--verify")


def test_a_study_goes_on(run, tmp_path):
    common = (*run.common, "--layers", 2, "--method", "tpe", "--storage", "sqlite:///study.db", "--target", "acc")
    common = (*common, "--max-perplexity", 1e9)
    run("search_alphas", *common, "--trials", 4)
    assert "give --resume to go on with it" in run("search_alphas", *common, "--trials", 6, status=1).stderr
    run("search_alphas", *common, "--trials", 6, "--resume")
    assert json.loads((tmp_path / "found" / "search.json").read_text())["evaluations"] == 2
    assert "no trial met the limit" in run("search_alphas", *common[:-1], 1.5, "--name", "b", "--trials", 4, status=1).stderr


def test_parts_share_out_every_subject():
    ids = [(subject, i) for subject in "ab" for i in range(8)]
    parts = split_questions(ids, 0)
    assert sorted(one for part in parts.values() for one in part) == ids
    assert [len(parts[part]) for part in PARTS] == [8, 4, 4]
    again = split_questions(list(reversed(ids)), 0)
    assert {part: set(chosen) for part, chosen in parts.items()} == {part: set(chosen) for part, chosen in again.items()}
    assert parts != split_questions(ids, 1)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "give one of --alphas, --layers and --remove"),
        (["--layers", "2", "--remove", "3"], 2, "give one of"),
        (["--layers", "32"], 1, "cannot remove 32 of 32 layers"),
        (["--layers", "2", "--target", "acc"], 2, "accuracy has no gradient"),
        (["--remove", "x"], 2, "expected layer numbers"),
        (["--remove", "77"], 1, "there is no layer 77"),
        (["--layers", "2", "--steps", "0"], 2, "--steps is 0"),
        (["--layers", "2", "--split", "validation"], 1, "neither val/SUBJECT_val.csv"),
        (["--layers", "2", "--text-tokens", "100000"], 1, "the text has"),
        (["--layers", "2", "--objective", "anatomi"], 1, "did you mean anatomy"),
    ],
)
def test_bad_input(arguments, status, said, run):
    done = run("search_alphas", *run.common, *arguments, status=status)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
