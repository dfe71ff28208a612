"""Where models are run, in what dtype, and that scores do not depend on it: offloaded layers, several processes."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from test_lm import assert_same, requests
from test_mmlu import write_archive
from tiny import ROOT, tiny_source

from eval.errors import LoadError
from eval.load import load_model
from merge.errors import MergeError
from merge.runtime import place_model


def gpu(monkeypatch, free):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))


def test_bfloat16_on_a_gpu_that_has_room(monkeypatch):
    gpu(monkeypatch, 24 * 10**9)
    found = place_model("auto", "auto", num_parameters=8 * 10**9, stored="float32")
    assert (found.device, found.dtype, found.device_map) == ("cuda:0", "bfloat16", {"": "cuda:0"})
    assert "24.0 GB free, 19.2 GB needed" in found.reason


def test_what_has_no_room_is_spread(monkeypatch):
    gpu(monkeypatch, 16 * 10**9)
    found = place_model("auto", "auto", num_parameters=8 * 10**9, stored="bfloat16")
    assert (found.device, found.device_map) == ("cuda:0", "auto")
    assert "layers without room go to the other GPUs, memory and disk" in found.reason
    assert place_model("auto", "float16", num_parameters=5 * 10**9, stored="bfloat16").device_map == {"": "cuda:0"}


@pytest.mark.parametrize(
    ("stored", "dtype", "chosen"),
    [
        ("bfloat16", "auto", "bfloat16"),
        ("float32", "auto", "float32"),
        ("float16", "auto", "float32"),
        ("float16", "float16", "float16"),
        ("float64", "auto", "float32"),
    ],
)
def test_on_a_cpu_as_stored(stored, dtype, chosen):
    assert place_model("cpu", dtype, num_parameters=1, stored=stored).dtype == chosen


def test_each_process_has_its_own_device():
    found = place_model("auto", "auto", num_parameters=10**15, stored="bfloat16", process_device="cpu", processes=4)
    assert found.device_map == {"": "cpu"}
    assert "one of 4 processes" in found.reason


def test_a_device_that_is_not_there():
    with pytest.raises(MergeError, match=r"'cuda:7' cannot be used here"):
        place_model("cuda:7", "auto", num_parameters=1, stored="bfloat16")


@pytest.mark.parametrize("name", ["llama3-8b", "gemma2-2b"])
def test_offloaded_layers_score_the_same(name, tiny_cache, monkeypatch):
    checkpoint = tiny_source(name, tiny_cache).checkpoint()
    whole, placement = load_model(checkpoint, "cpu", "float32")
    assert placement.device_map == {"": "cpu"}
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=60_000, total=memory.total))
    lm, placement = load_model(checkpoint, "auto", "float32")
    assert placement.device_map == "auto"
    assert "disk" in placement.reason
    assert "disk" in lm.model.hf_device_map.values()
    assert_same(lm.loglikelihood(requests(), disable_tqdm=True), whole.loglikelihood(requests(), disable_tqdm=True))
    assert lm.not_shared_because is None


def test_a_folder_that_transformers_refuses(copy_of, llama):
    folder = copy_of(llama)
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = SimpleNamespace(folder=folder, config=llama.checkpoint().config, tensors=llama.checkpoint().tensors)
    with pytest.raises(LoadError, match="cannot be loaded by transformers") as caught:
        load_model(checkpoint, "cpu")
    assert "\n" not in str(caught.value)


def test_two_processes_give_the_answers_of_one(tmp_path, tiny_cache):
    """Questions are dealt out, answers gathered, and only the first process prints and writes."""
    data = write_archive(tmp_path / "mmlu", count=5)  # odd: one process has a question more
    environment = os.environ | {"XDG_CACHE_HOME": str(tiny_cache), "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    outputs = []
    # Without GPUs `accelerate launch` starts one process only; torchrun sets the same variables for as many as wanted.
    for name, launcher in ("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        arguments = ["--model", "tiny:llama3-8b", "--data-dir", data, "--subjects", "anatomy,virology", "--num-fewshot", "1"]
        command = [sys.executable, *launcher, ROOT / "scripts" / "eval_mmlu.py", *arguments, "--out", f"{name}.json"]
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.strip().splitlines())
    assert len(outputs[0]) == len(outputs[1])  # one table
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2
    assert two["scores"] == one["scores"]
    assert two["question_text"]["tokens"] == one["question_text"]["tokens"]
    assert two["question_text"]["perplexity"] == pytest.approx(one["question_text"]["perplexity"], rel=0.02)  # bf16
