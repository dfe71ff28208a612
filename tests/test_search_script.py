"""scripts/search_alphas.py as a user runs it, and what it says is what merging and evaluating afterwards gives."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from test_mmlu import write_archive
from tiny import ROOT, tiny_source

from eval.mmlu import SUBJECTS
from eval.load import load_model
from eval.objective import (
    PARTS,
    Encoded,
    Part,
    capture_questions,
    capture_text,
    measure,
    scores,
    split_questions,
)
from eval.search_report import table, verdict
from eval.trial import LayerWeights, Tail


@pytest.fixture
def run(tmp_path, tiny_cache):
    environment = os.environ | {"XDG_CACHE_HOME": str(tiny_cache), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "text.txt").write_text("Plain text to be predicted, and a little more of it. " * 60)
    write_archive(tmp_path / "mmlu", [name for name in SUBJECTS if name != "anatomy"], count=3)
    data = write_archive(tmp_path / "mmlu", ["anatomy"], count=8)

    def call(script, *arguments, status=0):
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done

    questions = ("--split", "test", "--objective", "anatomy", "--num-fewshot", 1)
    text = ("--text", "text.txt", "--text-tokens", 200, "--text-window", 100)
    call.common = ("--model", "tiny:llama3-8b", "--data-dir", data, *questions, *text)
    return call


def test_repeated_windows_and_questions_count_as_often_as_they_are(tiny_cache):
    """Equal inputs are run once; the mean is over what was asked."""
    lm, _ = load_model(tiny_source("llama3-8b", tiny_cache).checkpoint(), "cpu", "float32", self_check=False)
    tail = Tail(lm)
    windows = [[5, 6, 7, 8], [1, 2, 3], [5, 6, 7, 9], [5, 6, 7, 8]]
    layers = [LayerWeights(31, {})]
    found = measure(tail, layers, Part(None, capture_text(tail, windows, 31)))["text"]
    alone = [measure(tail, layers, Part(None, capture_text(tail, [one], 31)))["text"] for one in windows]
    np.testing.assert_allclose(found, np.concatenate(alone), atol=1e-5)
    encoded = Encoded((("a", 0), ("a", 1), ("a", 2)), ((1, 2, 3), (4, 5), (1, 2, 3)), (0, 1, 2), (65, 66, 67, 68))
    questions = measure(tail, layers, Part(capture_questions(tail, encoded, 31), ()))
    one, _, other = questions["ce"]
    assert one != other  # the same prompt, another right letter
    np.testing.assert_allclose(questions["kl"], 0.0, atol=1e-5)


def numbers(**values):
    return {"held-out": {name: np.array(one, dtype=float) for name, one in values.items()}}


@pytest.mark.parametrize(
    ("found", "control", "said"),
    [
        (numbers(kl=[0.1, 0.2] * 9), numbers(kl=[1.1, 1.25] * 9), "kl -1.0250 nats [-1.0378, -1.0122] against dropped, better"),
        (numbers(kl=[1.0, 0.2] * 9), numbers(kl=[0.1, 1.1] * 9), "no difference shown: nothing was found"),
        (numbers(kl=[2.0, 2.2] * 9), numbers(kl=[1.1, 1.2] * 9), "worse: nothing was found"),
        (numbers(kl=[0.1] * 9), numbers(kl=[np.nan] * 9), "where no control has a number"),
        (numbers(kl=[np.nan] * 9), numbers(kl=[1.0] * 9), "not a number, so nothing was found"),
        (numbers(kl=[0.1]), numbers(kl=[0.2]), "too few values for an interval"),
        (numbers(text=[1.0]), numbers(text=[2.0]), "kl: nothing was held out"),
        (numbers(acc=[1, 1, 1]), numbers(acc=[0, 0, 0]), "acc +1.0000 [+1.0000, +1.0000] against dropped, no difference shown"),
        (numbers(acc=[1] * 9), numbers(acc=[0] * 9), "against dropped, better"),
    ],
)
def test_the_verdict_claims_no_more_than_is_shown(found, control, said):
    term = "acc" if "acc" in found["held-out"] else "kl"
    assert said in verdict({"original": control, "dropped": control, "found": found}, [term])


def test_a_control_without_a_number_is_not_the_best_one():
    measured = {"start": numbers(kl=[np.nan] * 9), "dropped": numbers(kl=[3.0, 3.1] * 9), "found": numbers(kl=[2.0, 2.2] * 9)}
    assert "against dropped, better" in verdict(measured, ["kl"])


def test_unknown_errors_are_not_numbers_in_json():
    found = scores({"kl": np.array([0.5]), "text": np.array([1.0, 2.0])})
    assert found["kl"]["low"] is None
    assert found["perplexity"]["high"] is None
    assert "NaN" not in json.dumps(found)
    assert table({"scores": {"found": {"held-out": found}}}).splitlines()[-1].split()[2:] == ["0.5000", "4.4817"]
    assert table({"scores": {"found": {"held-out": scores({"kl": np.array([np.nan] * 3)})}}}).endswith("not a number")


def test_shares_of_few_questions_stay_between_0_and_1():
    found = scores({"kl": np.array([0.25, 0.75]), "acc": np.array([1.0, 0.0]), "agreement": np.array([1.0, 1.0])})
    shown = table({"scores": {"found": {"held-out": found}}})
    assert shown.startswith("held out: questions 2; in brackets 95 % intervals")
    assert "0.5000 [0.0945, 0.9055]" in shown  # where Student's t gave +- 6.3531
    assert "1.0000 [0.3424, 1.0000]" in shown
    assert "0.5000 [-2.6766, 3.6766]" in shown


def test_alphas_by_gradient_then_merge(run, tmp_path):
    done = run("search_alphas", *run.common, "--layers", 2, "--steps", 5, "--refine", 1, "--out", "found")
    others = json.loads((tmp_path / "found" / "search.json").read_text())["scores"]["found"]["others"]["acc"]
    assert others["count"] == 56  # of three questions each, one is held out
    assert "2 alphas, of which about" in done.stderr
    assert "2 questions are held out: too few" in done.stderr
    assert "held out, found minus the best control: kl " in done.stdout
    assert "the other subjects (" in done.stdout
    report = json.loads((tmp_path / "found" / "search.json").read_text())
    assert set(report["scores"]) == {"original", "start", "dropped", "found"}  # the top layers dropped are drop-last
    assert report["scores"]["original"]["search"]["agreement"]["value"] == 1.0
    assert report["scores"]["original"]["search"]["kl"]["value"] == pytest.approx(0.0, abs=1e-3)
    mean = {name: report["scores"][name]["held-out"]["kl"]["value"] for name in ("found", "start")}
    assert report["differences"]["held-out"]["start"]["kl"]["value"] == pytest.approx(mean["found"] - mean["start"], abs=1e-9)
    header, *rows = (tmp_path / "found" / "trials.csv").read_text().splitlines()
    assert header == "trial,start,step,loss,over_limit,30<-31,29<-30"
    assert len(rows) == 4 + 5 + 1  # starts, the file's among them; steps; the last point
    pictures = {path.name for path in (tmp_path / "found" / "plots").iterdir()}
    assert pictures == {f"{name}.{kind}" for name in ("history", "mixture", "alphas", "slices") for kind in ("png", "csv")}
    curve = [line.split(",") for line in (tmp_path / "found" / "plots" / "slices.csv").read_text().splitlines()[1:]]
    assert min(float(loss) for _, _, loss in curve) <= report["loss"] + 1e-6  # the found point is on every curve
    run("merge", "--alphas", "found/alphas.json", "--model", "tiny:llama3-8b", "--out", "merged", "--verify")
    evaluation = ("--data-dir", run.common[3], "--subjects", "anatomy", "--num-fewshot", 1, "--text", "text.txt")
    run("eval_mmlu", "--model", "merged", *evaluation, "--out", "merged.json")
    accuracies = {part: report["scores"]["found"][part] for part in PARTS}
    right = sum(round(one["acc"]["value"] * one["acc"]["count"]) for one in accuracies.values())
    merged = json.loads((tmp_path / "merged.json").read_text())["scores"]["micro"]
    assert (round(merged["acc"] * merged["count"]), merged["count"]) == (right, 8)


def test_coefficients_for_dropped_layers(run, tmp_path):
    run(
        "search_alphas",
        *run.common,
        "--remove",
        "5,17",
        "--target",
        "text",
        "--steps",
        4,
        "--refine",
        1,
        "--out",
        "found",
        "--objective",
        "nll",
    )
    plan = json.loads((tmp_path / "found" / "plan.json").read_text())
    assert len(plan["rows"]) == 30
    assert set(plan["rows"][4]["groups"]) >= {"mlp.up_proj", "input_layernorm"}
    report = json.loads((tmp_path / "found" / "search.json").read_text())
    assert {"dropped", "drop-last"} < set(report["scores"])
    assert "kl" not in report["scores"]["found"]["held-out"]
    nll = {name: report["scores"][name]["search"]["text"]["value"] for name in ("found", "dropped")}
    assert nll["found"] <= nll["dropped"]
    assert not (tmp_path / "found" / "alphas.json").exists()
    run("merge", "--plan", "found/plan.json", "--model", "tiny:llama3-8b", "--out", "merged", "--verify")


def test_a_study_goes_on(run, tmp_path):
    common = (*run.common, "--layers", 2, "--method", "tpe", "--storage", "sqlite:///study.db", "--target", "acc")
    common = (*common, "--max-perplexity", 1e9)
    run("search_alphas", *common, "--trials", 4, "--states", "states", "--no-others", "--no-plots")
    again = ("--trials", 6, "--states", "states", "--no-others")
    assert "give --resume to go on with it" in run("search_alphas", *common, *again, "--overwrite", status=1).stderr
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "states").iterdir()}
    assert len(kept) == 2 * len(PARTS)  # questions and text
    assert "holds the results of a search" in run("search_alphas", *common, *again, status=2).stderr
    run("search_alphas", *common, *again, "--resume")
    report = json.loads((tmp_path / "found" / "search.json").read_text())
    assert (report["evaluations"], report["trials"]) == (2, 6)
    assert len((tmp_path / "found" / "trials.csv").read_text().splitlines()) == 7
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "states").iterdir()}  # read, not made again
    strict = (*common[:-1], 1.5, "--name", "b", "--trials", 4, "--overwrite", "--no-others")
    assert "no trial met the limit" in run("search_alphas", *strict, status=1).stderr


def test_greedy_removal_then_coefficients(run, tmp_path):
    common = ("--model", "tiny:mistral-7b", *run.common[-6:], "--text-batch", 100)
    done = run("search_alphas", *common, "--greedy", 2, "--objective", "perplexity", "--steps", 3, "--refine", 1, "--no-plots")
    assert done.stdout.startswith("removed, in this order: ")
    report = json.loads((tmp_path / "found" / "search.json").read_text())
    assert (report["target"], report["space"]) == ("text", "coefficients")
    assert "against" in report["verdict"]
    assert not (tmp_path / "found" / "plots").exists()
    control = ("--control", "found/plan.json", "--out", "again", "--no-plots")
    scaled = ("--scale-kept", "--start", "dropped", "--objective", "nll", "--steps", 2, "--refine", 1)
    run("search_alphas", *common, "--remove", "1", *scaled, *control)
    rows = json.loads((tmp_path / "again" / "plan.json").read_text())["rows"]
    assert [bool(row.get("groups")) for row in rows[:4]] == [True] * 4  # layer 2 has nothing to mix in, and is scaled
    assert "found/plan" in json.loads((tmp_path / "again" / "search.json").read_text())["scores"]
    other = ("--model", "tiny:llama3.2-1b", *common[2:], "--layers", 1, "--objective", "nll", *control, "--overwrite")
    assert "32" in run("search_alphas", *other, status=1).stderr  # the plan is of a model with so many layers


def test_parts_share_out_every_subject():
    ids = [(subject, i) for subject in "ab" for i in range(8)]
    parts = split_questions(ids, 0)
    assert sorted(one for part in parts.values() for one in part) == ids
    assert [len(parts[part]) for part in PARTS] == [8, 4, 4]
    again = split_questions(list(reversed(ids)), 0)
    assert {part: set(chosen) for part, chosen in parts.items()} == {part: set(chosen) for part, chosen in again.items()}
    assert parts != split_questions(ids, 1)


@pytest.mark.parametrize(("count", "sizes"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1]), (7, [5, 1, 1]), (8, [4, 2, 2])])
def test_small_subjects_are_in_every_part(count, sizes):
    parts = split_questions([("a", i) for i in range(count)], 0)
    assert [len(parts[part]) for part in PARTS] == sizes


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "give one of --alphas, --layers, --remove and --greedy"),
        (["--layers", "2", "--remove", "3"], 2, "give one of"),
        (["--layers", "32"], 1, "cannot remove 32 of 32 layers"),
        (["--layers", "2", "--scale-kept"], 2, "--scale-kept goes with --remove or --greedy"),
        (["--layers", "2", "--target", "acc"], 2, "accuracy has no gradient"),
        (["--remove", "x"], 2, "expected layer numbers"),
        (["--remove", "77"], 1, "there is no layer 77"),
        (["--layers", "2", "--objective", "nll", "--target", "kl"], 2, "leave --target kl out"),
        (["--layers", "2", "--max-perplexity", "0.5"], 2, "expected more than 1"),
        (["--layers", "2", "--resume"], 2, "use --method gp or tpe"),
        (["--layers", "2", "--method", "gp", "--resume"], 2, "--resume needs --storage"),
        (["--layers", "2", "--method", "gp", "--text-batch", "9"], 2, "--text-batch is for --method gradient"),
        (["--layers", "2", "--target", "text"], 2, "--objective anatomy says nothing; leave it out"),
        (["--layers", "2", "--slices", "-1"], 2, "--slices is -1"),
        (["--layers", "2", "--text-window", "1"], 1, "expected at least 2 of each"),
        (["--layers", "2", "--start", "nowhere", "--no-others"], 1, "no start has 'nowhere' in its name"),
        (["--greedy", "32"], 1, "cannot remove 32 of 32"),
        (["--layers", "2", "--control", "nowhere.json"], 1, "nowhere.json"),
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
