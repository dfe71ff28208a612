"""MMLU data in both layouts, lm-eval's prompts, and the evaluation and comparison scripts as a user runs them."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import lm_eval.utils
import numpy as np
import pytest
import yaml
from scipy import stats as scipy_stats
from tiny import ROOT

from eval.compare import Difference, text_differences
from eval.errors import DataError, ScoreError
from eval.mmlu import GROUPS, NUM_DEV, SUBJECTS, Subject, partial, quick_and_quiet, read_mmlu, tasks
from eval.results import Answer, all_or_none, macro, question_text, read_results, score, summary, write_results
from eval.stats import paired

ODD = ("None", "nan", 'with "quotes"', "with, comma")  # options that data frame readers turn into something else


def write_archive(folder, subjects=("anatomy", "virology"), count=6):
    for split, number in (("dev", 5), ("test", count)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for subject in subjects:
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                for i in range(number):
                    writer.writerow([f"Question {i} of {subject}?\nSecond line.", *ODD, "ABCD"[(i + len(subject)) % 4]])
    return folder


def test_subjects_and_groups_are_lm_evals():
    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    for group, subjects in GROUPS.items():
        for subject in subjects:
            config = yaml.safe_load((folder / f"mmlu_{subject}.yaml").read_text())
            assert config["tag"] == f"mmlu_{group}_tasks"
    assert len(SUBJECTS) == 57
    assert NUM_DEV == 5 * 57


def test_csv_keeps_every_option_as_text(tmp_path):
    (subject, other) = read_mmlu(write_archive(tmp_path), ["anatomy", "virology"])
    assert subject.test[0].choices == ODD
    assert subject.test[0].question == "Question 0 of anatomy?\nSecond line."
    assert [q.answer for q in subject.test] == [3, 0, 1, 2, 3, 0]
    assert (len(subject.dev), len(other.test)) == (5, 6)


def test_parquet_says_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from_csv = read_mmlu(write_archive(tmp_path / "csv"), ["anatomy"])
    (tmp_path / "parquet").mkdir()
    for split in ("dev", "test"):
        questions = getattr(from_csv[0], split)
        rows = [
            {"question": q.question, "subject": "anatomy", "choices": list(q.choices), "answer": q.answer} for q in questions
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet" / f"{split}.parquet")
    assert read_mmlu(tmp_path / "parquet", ["anatomy"]) == from_csv


def test_prompts_are_lm_evals(tmp_path):
    """The documented form, to the letter; the template cache changes nothing and is taken away again."""
    (subject,) = read_mmlu(write_archive(tmp_path), ["anatomy"])
    environment = lm_eval.utils.env
    before = environment.from_string
    prompts = []
    for cached in (False, True):
        (task,) = tasks([subject], 2)
        if cached:
            with quick_and_quiet():
                task.build_all_requests()
        else:
            task.build_all_requests()
        prompts.append([instance.args for instance in task.instances])
    assert prompts[0] == prompts[1]
    assert environment.from_string == before

    def shown(q):
        return f"{q.question.strip()}\n" + "".join(f"{x}. {c}\n" for x, c in zip("ABCD", q.choices, strict=True)) + "Answer:"

    shots = "".join(f"{shown(q)} {'ABCD'[q.answer]}\n\n" for q in subject.dev[:2])
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    assert prompts[0][:4] == [(head + shots + shown(subject.test[0]), f" {x}") for x in "ABCD"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (["q", "a", "b", "c", "d"], "row 3: found 5 columns, expected 6"),
        (["q", "a", "b", "c", "d", "E"], "row 3: the answer is 'E', expected one of A, B, C, D"),
        (["q", "a", "b", "c", "d", ""], "the answer is ''"),
        (["q", "a", "b", "c", "d", "AB"], "the answer is 'AB'"),
    ],
)
def test_bad_rows_are_named(row, said, tmp_path):
    folder = write_archive(tmp_path)
    path = folder / "test" / "anatomy_test.csv"
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    rows[2] = row
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(DataError, match=said) as caught:
        read_mmlu(folder, ["anatomy"])
    assert str(path) in str(caught.value)


def test_other_bad_data(tmp_path):
    with pytest.raises(DataError, match="no MMLU subject 'anatomi'; did you mean anatomy"):
        read_mmlu(tmp_path, ["anatomi"])
    with pytest.raises(DataError, match=r"neither test/SUBJECT_test\.csv nor test\.parquet"):
        read_mmlu(tmp_path, ["anatomy"])
    with pytest.raises(DataError, match=r"virology_dev\.csv cannot be read"):
        read_mmlu(write_archive(tmp_path / "a", ["anatomy"]), ["virology"])
    (subject,) = read_mmlu(tmp_path / "a", ["anatomy"])
    with pytest.raises(DataError, match="has 5 dev examples, expected at least 6"):
        tasks([subject], 6)


def test_what_is_no_number_is_no_answer(tmp_path):
    with pytest.raises(ScoreError, match=r"1 answers are not numbers \(first: a, question 1\)"):
        write_results(
            tmp_path / "r.json", {}, [Answer("a", i, (0.0, math.nan if i else 0.0, 0.0, 0.0), 0, 0) for i in range(2)]
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("p", "said"), [(0.01, "better"), (0.2, "better, but not after correction")])
def test_verdicts_know_how_many_were_tested(p, said):
    assert Difference("a", paired([False] * 9 + [True], [True] * 10), p).verdict == said


def test_more_bad_data(tmp_path):
    folder = write_archive(tmp_path / "a")
    (folder / "test" / "anatomy_test.csv").write_text("")
    with pytest.raises(DataError, match="has no test questions on anatomy"):
        read_mmlu(folder, ["anatomy"])
    assert [subject.name for subject in read_mmlu(folder, ["virology", "virology"])] == ["virology"]
    path = folder / "test" / "virology_test.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_mmlu(folder, ["virology"])[0].test[0].question.startswith("Question")
    with pytest.raises(DataError, match=r"neither val/SUBJECT_val.csv nor validation.parquet"):
        read_mmlu(folder, ["virology"], "validation")


def test_micro_and_macro():
    answers = [Answer("a", i, (0.0,) * 4, 0, int(i > 0)) for i in range(4)]
    answers += [Answer("b", i, (0.0,) * 4, 1, 1) for i in range(2)]
    assert score(answers).acc == pytest.approx(3 / 6)
    assert macro(answers).acc == pytest.approx((1 / 4 + 1) / 2)
    assert macro(answers).stderr == pytest.approx(0.25 / 2)  # only subject a varies: stderr 0.5 / sqrt(4), halved
    assert math.isnan(macro(answers[1:]).stderr)  # none right in a, all in b
    assert all_or_none(summary(answers[1:4])["micro"]) == pytest.approx((0.0, 0.5615), abs=1e-4)
    assert all_or_none(summary(answers)["micro"]) is None


@pytest.fixture
def run(tmp_path, tiny_cache):
    environment = os.environ | {"XDG_CACHE_HOME": str(tiny_cache), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    (tmp_path / "here").mkdir()

    def call(script, *arguments, status=0):
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done

    call.folder, call.environment = tmp_path / "here", environment
    return call


def test_from_a_merge_to_a_comparison(run, tmp_path):
    data = write_archive(tmp_path / "mmlu", count=8)
    (run.folder / "text.txt").write_text("Some plain text to be predicted. " * 20)
    run("merge", "--method", "drop-last", "--layers", 3, "--model", "tiny:llama3-8b", "--out", "dropped")
    common = ("--data-dir", data, "--subjects", "anatomy,virology", "--num-fewshot", 2, "--text", "text.txt")
    original = run("eval_mmlu", "--model", "tiny:llama3-8b", *common).stdout
    assert "a part: 16 of 14,042 questions, 2 of 57 subjects" in original
    assert "perplexity of text.txt" in original
    assert "+- is one standard error" in original
    last = json.loads(original.strip().splitlines()[-1])
    assert last["micro"]["count"] == 16
    run("eval_mmlu", "--model", "dropped", *common)
    record, answers = read_results(run.folder / "results" / "dropped.json")
    assert record["plan"]["method"] == "drop-last"
    assert [answer.target for answer in answers[:8]] == [3, 0, 1, 2, 3, 0, 1, 2]
    assert not list((run.folder / "results").glob("*.progress.jsonl"))
    said = run("compare", "results/tiny-llama3-8b.json", "results/dropped.json", "--flips").stdout
    assert "no difference shown" in said
    assert "missing" not in said
    nats = r" +[+-][\d.]+  95% \[[+-][\d.]+, [+-][\d.]+\]  nats per token  (better|worse|no difference shown)\n"
    assert re.search(r"  the questions' text" + nats, said)
    assert re.search(r"  text\.txt" + nats, said)
    texts = json.loads(run("compare", "results/tiny-llama3-8b.json", "results/dropped.json", "--json").stdout)["texts"]
    assert [one["count"] for one in texts["results/dropped.json"]] == [16, len(record["text"]["window_nll"])]
    alone = run("compare", "results/dropped.json", "results/dropped.json").stdout
    assert "missing: no original model" in alone
    assert "layers simply dropped" not in alone
    run("merge", "--method", "uniform", "--layers", 2, "--model", "tiny:llama3-8b", "--out", "merged")
    run("eval_mmlu", "--model", "merged", *common)
    said = run("compare", "results/merged.json", "results/dropped.json", "results/tiny-llama3-8b.json").stdout
    assert "missing: no model with layers simply dropped to 30, the control of uniform-2" in said

    changed = json.loads((run.folder / "results" / "dropped.json").read_text())
    for key, value in (("question_set", "other"), ("task_version", "0"), ("num_fewshot", 5)):
        (run.folder / "results" / "dropped.json").write_text(json.dumps(changed | {key: value}))
        done = run("compare", "results/tiny-llama3-8b.json", "results/dropped.json", status=1)
        assert f"cannot be compared: {key} is" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    for windows, said in (([1.0], "'text' is not what this release writes"), (1, "'text' is not")):
        text = changed["text"] | {"window_nll": windows, "window_tokens": [1, 2]}
        (run.folder / "results" / "dropped.json").write_text(json.dumps(changed | {"text": text}))
        assert said in run("compare", "results/tiny-llama3-8b.json", "results/dropped.json", status=1).stderr
    (run.folder / "results" / "dropped.json").write_text(json.dumps(changed))
    shutil.copy(run.folder / "results" / "merged.parquet", run.folder / "results" / "dropped.parquet")
    done = run("compare", "results/tiny-llama3-8b.json", "results/dropped.json", status=1)
    assert "does not hold the answers that dropped.json was made from" in done.stderr
    done = run("eval_mmlu", "--model", "dropped", *common, status=2)
    assert "dropped.json exists; give --overwrite" in done.stderr


def test_answers_are_never_replaced_unasked(run, tmp_path):
    """Beside results.json they have another name than beside other files."""
    data = write_archive(tmp_path / "mmlu", count=3)
    for out, answers in (("results.json", "samples.parquet"), ("r.json", "r.parquet")):
        (run.folder / answers).write_text("somebody's")
        done = run("eval_mmlu", "--model", "tiny:llama3-8b", "--data-dir", data, "--out", out, status=2)
        assert f"{answers} exists; give --overwrite" in done.stderr


def test_resume_keeps_finished_subjects(run, tmp_path):
    """A run that was stopped after its first subject: that subject's answers, made recognisable, are in the result."""
    data = write_archive(tmp_path / "mmlu")
    common = ("--model", "tiny:llama3-8b", "--data-dir", data, "--num-fewshot", 1, "--out", "r.json")
    common += ("--subjects", "anatomy,virology")
    run("eval_mmlu", *common)
    whole = json.loads((run.folder / "r.json").read_text())
    progress = run.folder / "r.progress.jsonl"
    for file in ("r.json", "r.parquet"):
        (run.folder / file).unlink()
    # A first line as the script writes it is had from a run that is killed when it has written it.
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "eval_mmlu.py"), *map(str, common)],
        cwd=run.folder, env=run.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (progress.exists() and progress.stat().st_size):  # empty for a moment, in which it is locked
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    header = progress.read_text().splitlines()[0]
    kept = [{"subject": "anatomy", "index": i, "logprobs": [-1, -2, -3, -4], "prediction": 0, "target": 0} for i in range(6)]
    progress.write_text("\n".join([header, json.dumps({"subject": "anatomy", "answers": kept}), '{"subject": "virology"}']))
    assert "give --resume, or --overwrite" in run("eval_mmlu", *common, status=2).stderr
    run("eval_mmlu", *common, "--resume")
    record, answers = read_results(run.folder / "r.json")
    assert record["scores"]["subjects"]["anatomy"]["acc"] == 1.0
    assert record["scores"]["subjects"]["virology"] == whole["scores"]["subjects"]["virology"]
    assert len(answers) == 12
    progress.write_text(header + "\n")
    done = run("eval_mmlu", *common, "--resume", "--overwrite", "--num-fewshot", 2, status=1)
    assert "is of a run with other options" in done.stderr


def test_from_the_hub(tmp_path, monkeypatch):
    """datasets' own loading, from a folder that has the repository's name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (subject,) = read_mmlu(write_archive(tmp_path / "csv"), ["virology"])
    repository = tmp_path / "cais" / "mmlu"
    (repository / "virology").mkdir(parents=True)
    for split in ("dev", "test"):
        rows = [
            {"question": q.question, "subject": "virology", "choices": list(q.choices), "answer": q.answer}
            for q in getattr(subject, split)
        ]
        pq.write_table(pa.Table.from_pylist(rows), repository / "virology" / f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {split}\n    path: virology/{split}-*\n" for split in ("dev", "test"))
    (repository / "README.md").write_text(f"---\nconfigs:\n- config_name: virology\n  data_files:\n{files}---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert read_mmlu(None, ["virology"]) == [subject]
    with pytest.raises(DataError, match=r"cais/mmlu \(anatomy\) cannot be had from the Hub or its cache .*; give --data-dir"):
        read_mmlu(None, ["anatomy"])


def test_the_reference_convention(tmp_path):
    """Two blanks, nothing stripped, and options as a data frame reader returns them."""
    folder = write_archive(tmp_path)
    path = folder / "test" / "anatomy_test.csv"
    path.write_text(' Question with blanks ,None,NA,5,"x, y",B\n' + path.read_text())
    (subject,) = read_mmlu(folder, ["anatomy"])
    assert subject.test[0].choices == ("None", "NA", "5", "x, y")
    (task,) = tasks([subject], 1, "reference")
    with quick_and_quiet():
        task.build_all_requests(limit=1)
    context, letter = task.instances[1].args
    head = "The following are multiple choice questions (with answers) about  anatomy.\n\n"
    assert context.startswith(f"{head}Question 0 of anatomy?\nSecond line.\nA. nan\nB. nan\nC. with")
    assert context.endswith("Answer: D\n\n Question with blanks \nA. nan\nB. nan\nC. 5\nD. x, y\nAnswer:")
    assert letter == " B"  # PrefixLM(letters_apart=True) scores it without the blank


def test_parts_are_named(tmp_path):
    subjects = read_mmlu(write_archive(tmp_path), ["anatomy", "virology"])
    assert partial(subjects) == "12 of 14,042 questions, 2 of 57 subjects, 10 of 285 examples"
    assert partial(subjects, 4).startswith("8 of")
    whole = [Subject(name, subjects[0].dev, subjects[0].test[:1]) for name in SUBJECTS]
    whole[0] = Subject(SUBJECTS[0], subjects[0].dev, subjects[0].test[:1] * (14_042 - 56))
    assert partial(whole) is None


def test_question_text_over_tokens_and_over_subjects():
    answers = [Answer(s, 0, (0.0,) * 4, 0, 0, nll, tokens) for s, nll, tokens in (("a", 8.0, 4), ("a", 4.0, 4), ("b", 2.0, 2))]
    found = question_text(answers)
    assert found["perplexity"] == pytest.approx(math.exp(14 / 10))
    assert found["macro_perplexity"] == pytest.approx((math.exp(12 / 8) + math.exp(1)) / 2)
    assert question_text([Answer("a", 0, (0.0,) * 4, 0, 0)]) is None


def result_of(nll, tokens, **text):
    """(record, answers) with so many nats and tokens of every question."""
    answers = [Answer("a", i, (0.0,) * 4, 0, 0, *one) for i, one in enumerate(zip(nll, tokens, strict=True))]
    return {"text": {"perplexity": 2.0, "sha256": "x"} | text}, answers


def test_texts_are_compared_by_questions_and_windows():
    noise = np.random.default_rng(0)
    one, two = noise.normal(60, 5, 30), noise.normal(66, 5, 30)
    size = [20] * 30
    windows = [{"window_nll": list(nll), "window_tokens": size} for nll in (one, two)]
    found = text_differences(result_of(one, size, **windows[0]), result_of(two, size, **windows[1]))
    expected = scipy_stats.ttest_rel(two, one).confidence_interval(0.95)  # windows of one size: Student's paired t
    assert len(found) == 2
    for text in found:
        assert (text.nats.low, text.nats.high) == pytest.approx((expected.low / 20, expected.high / 20))
        assert text.verdict == "worse"


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        ({}, {"window_nll": [1.0], "window_tokens": [2]}, "no windows kept; evaluate again"),
        ({"sha256": "y"}, {}, "another text or vocabulary"),
        (
            {"window_nll": [1.0], "window_tokens": [2]},
            {"window_nll": [2.0], "window_tokens": [2]},
            "too little text (1 window)",
        ),
    ],
)
def test_a_text_without_an_interval_says_why(one, two, said):
    (found,) = text_differences(result_of([None], [0], **one), result_of([None], [0], **two))
    assert (found.nats, found.missing, found.verdict) == (None, said, "no difference shown")
    (other, _) = text_differences(result_of([1.0], [2]), result_of([1.0], [3]))
    assert other.missing == "another vocabulary"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "give --model"),
        (["--model", "tiny:llama3-8b", "--batch-size", "x"], 2, "expected a positive number of prompts, or auto"),
        (["--model", "tiny:llama3-8b", "--subjects", "anatomie"], 1, "did you mean anatomy"),
        (["--model", "tiny:llama3-8b", "--limit", "0"], 2, "--limit is 0, expected at least 1"),
        (["--model", "nothing/here"], 1, "HF_HUB_OFFLINE is set"),
        (["--model", "tiny:llama3-8b", "--data-dir", "none"], 1, "neither test/"),
        (["--model", "tiny:llama3-8b", "--data-dir", "none", "--text", "none.txt"], 1, "neither test/"),
    ],
)
def test_bad_input(arguments, status, said, run):
    done = run("eval_mmlu", *arguments, status=status)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert status == 2 or len(done.stderr.strip().splitlines()) == 1
