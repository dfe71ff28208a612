"""Text perplexity, plain text, and scripts/eval.py with tasks of its own, as a user runs it."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_mmlu import write_archive
from tiny import ROOT, load, tiny_source

from eval.errors import DataError
from eval.lm import PrefixLM
from eval.progress import Progress
from eval.results import Answer
from eval.run import plain_text, text_perplexity
from merge.errors import OutputError

TASKS = {
    "mine_choice": {
        "output_type": "multiple_choice", "doc_to_text": "Q: {{question}}\nA:", "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "mine_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "mine_writing": {
        "output_type": "generate_until", "doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "x",
        "metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    },
}  # fmt: skip


def write_tasks(folder):
    folder.mkdir()
    docs = [{"question": f"What is {i}?", "choices": ["a long one", "b", f"c {i}"], "answer": i % 3} for i in range(7)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, task in TASKS.items():
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))  # JSON is YAML
    return folder


@pytest.fixture
def run(tmp_path, tiny_cache):
    environment = os.environ | {"XDG_CACHE_HOME": str(tiny_cache), "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}

    def call(script, *arguments, status=0):
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done

    call.environment = environment
    return call


def test_text_perplexity_is_the_mean_over_windows(tiny_cache):
    source = tiny_source("llama3-8b", tiny_cache)
    lm = PrefixLM(str(source.folder), dtype="float32", device="cpu")
    text = "Some plain text, to be predicted. " * 9
    found = text_perplexity(lm, text, window=50, max_tokens=230)
    tokens = torch.tensor(lm.tokenizer(text, add_special_tokens=False)["input_ids"][:230])
    model, losses = load(source.folder), []
    with torch.inference_mode():
        for start in range(0, 230, 50):
            window = tokens[start : start + 50]
            logits = model(window[None]).logits[0, :-1]
            losses += torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist()
    assert found.tokens == len(losses) == 225
    assert found.nll_per_token == pytest.approx(math.fsum(losses) / 225, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nll_per_token))
    assert lm.work.tokens_run == 0  # the count is of the questions
    with pytest.raises(DataError, match="the text has 1 tokens, expected at least 2"):
        text_perplexity(lm, "x")


def test_plain_text(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt cannot be read as text"):
        plain_text(tmp_path / "latin.txt")
    with pytest.raises(DataError, match=r"cannot be had from the Hub or its cache .* give --text FILE"):
        plain_text(None)


def test_any_task_by_script(run, tmp_path):
    """Choices, rolling text and generation; the numbers are those of lm-eval's own model class on the same tasks."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = write_tasks(tmp_path / "tasks")
    common = ("--model", "tiny:llama3-8b", "--include-path", folder, "--tasks", ",".join(TASKS))
    done = run("eval", *common, "--dtype", "float32", "--samples", "--out", "out.json")
    last = json.loads(done.stdout.strip().splitlines()[-1])
    record = json.loads((tmp_path / "out.json").read_text())
    assert "without sharing" in done.stdout
    assert record["not_shared_because"] is None
    assert record["n-samples"]["mine_choice"]["effective"] == 7
    assert len((tmp_path / "out.samples.jsonl").read_text().splitlines()) == 21
    source = tiny_source("llama3-8b", tmp_path / "cache")
    lm = HFLM(str(source.folder), dtype="float32", device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    theirs = lm_eval.simple_evaluate(lm, tasks=list(TASKS), task_manager=manager)["results"]
    for task, metric in (("mine_choice", "acc,none"), ("mine_choice", "acc_norm,none"), ("mine_text", "word_perplexity,none")):
        assert last[task][metric] == pytest.approx(theirs[task][metric], rel=1e-4)

    (folder / "docs.jsonl").unlink()
    refused = run("eval", *common, status=1)
    assert "or their data cannot be loaded" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--model", "tiny:llama3-8b"], 2, "give --tasks"),
        (["--model", "tiny:llama3-8b", "--tasks", "a", "--include-path", "none"], 2, "which is not a folder"),
        (["--model", "tiny:llama3-8b", "--tasks", "arc_easi"], 1, "lm-eval has no task 'arc_easi'; did you mean arc_easy"),
    ],
)
def test_bad_input(arguments, status, said, run):
    done = run("eval", *arguments, status=status)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_what_is_finished_is_kept(sent, run, tmp_path):
    """Stopped between subjects: exit status and message as promised; --resume asks the rest only, with the same scores."""
    data = write_archive(tmp_path / "mmlu", count=3)
    (tmp_path / "text.txt").write_text("Plain text. " * 50)
    command = ("--model", "tiny:llama3-8b", "--data-dir", data, "--num-fewshot", "2", "--text", "text.txt", "--out", "r.json")
    command += ("--subjects", "anatomy,virology")
    progress = tmp_path / "r.progress.jsonl"
    started = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "eval_mmlu.py", *map(str, command)],
        cwd=tmp_path, env=run.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background of a shell ignore it
    )  # fmt: skip
    while started.poll() is None and not (progress.is_file() and len(progress.read_text().splitlines()) > 1):
        time.sleep(0.01)
    started.send_signal(sent)
    _, errors = started.communicate(timeout=100)
    assert started.returncode == (130 if sent == signal.SIGINT else 143), errors
    assert errors.strip() == "stopped; subjects that were finished are kept: the same command with --resume goes on"
    assert not (tmp_path / "r.json").exists()
    kept = len(progress.read_text().splitlines())
    assert kept > 1
    done = run("eval_mmlu", *command, "--resume")
    assert not progress.exists()
    assert json.loads(done.stdout.splitlines()[-1])["micro"]["count"] == 6


def test_progress_is_one_process_s_alone(tmp_path):
    answer = Answer("anatomy", 0, (0.0, -1.0, -2.0, -3.0), 0, 0)
    one, two = (Progress(tmp_path / "r.progress.jsonl", {}, resume=True) for _ in range(2))
    one.start()
    with pytest.raises(OutputError, match="in use by another run; wait for it"):
        two.start()
    one.add("anatomy", [answer])
    one.close()
    three = Progress(one.path, {}, resume=True)
    assert three.finished == {"anatomy": [answer]}
    with pytest.raises(OutputError, match="has been changed by another run since it was read; run again"):
        two.start()
    three.start()
    three.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_partial_output_is_refused(run, copy_of, llama, tmp_path):
    folder = copy_of(llama)
    next(folder.glob("model-00002*")).unlink()
    for arguments in (("eval_mmlu", "--data-dir", tmp_path), ("eval", "--tasks", "arc_easy")):
        done = run(*arguments, "--model", folder, status=1)
        assert "model-00002" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
