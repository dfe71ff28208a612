"""What an evaluation costs, beside lm-eval's own Hugging Face model in the same run: same questions, dtype and threads.

Each figure comes from a process of its own, so that peak memory is that of one path. On a CPU the figure is processor seconds
of one thread, which other work on a shared machine hardly moves; on a GPU it is wall seconds.
  hflm        lm-eval's own model class, at the best of a few batch sizes (found on some questions first)
  layerfuse   the same requests through eval.lm.PrefixLM
  +questions  layerfuse, also measuring the perplexity of the questions' text, which lm-eval does not
  building    the requests of all 57 subjects: lm-eval's templates compiled on every use, and once
After timing, predictions and log-probabilities of the two are compared.

    python benchmarks/eval.py --model SMOLLM2.gguf --data-dir DIR --subjects anatomy,virology
    python benchmarks/eval.py --model SMOLLM2.gguf --data-dir DIR --shapes llama3-8b --layers 19 --device cuda --dtype bfloat16

With --shapes the weights are random, of a model in configs/models (or its twin, tiny:NAME); only the tokenizer is the given
model's.
Last line of stdout: JSON.
"""

import argparse
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval.mmlu import SUBJECTS, quick_and_quiet, read_mmlu, tasks  # noqa: E402 (after the path is set)
from merge.report import versions  # noqa: E402

BATCHES = {"cpu": (1, 4, 8), "cuda": (8, 32, 64, 128)}
PROBE = 24  # questions that the batch size is chosen on


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True)
    options.add_argument("--data-dir", type=Path, required=True)
    options.add_argument("--subjects", default="anatomy,virology", help="comma-separated, or all")
    options.add_argument("--limit", type=int, help="questions per subject (default: all)")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--shapes", help="random weights of this model of configs/models")
    options.add_argument("--layers", type=int, help="so many layers of it")
    options.add_argument("--batch-sizes", help="of lm-eval, to try; one alone is taken (default: a few for the device)")
    options.add_argument("--pack-tokens", help="tokens per call to try, comma-separated (default: the built-in choice)")
    options.add_argument("--skip-building", action="store_true")
    options.add_argument("--worker", choices=["hflm", "layerfuse", "+questions", "building"], help=argparse.SUPPRESS)
    options.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.worker:
        logging.disable(logging.WARNING)
        print(json.dumps(building(arguments) if arguments.worker == "building" else work(arguments)))
        return
    kind = arguments.device.partition(":")[0]
    key = "cpu_s" if kind == "cpu" else "wall_s"
    with tempfile.TemporaryDirectory() as scratch:
        sizes = [int(one) for one in arguments.batch_sizes.split(",")] if arguments.batch_sizes else BATCHES[kind]
        probes = {size: call(arguments, "hflm", size, PROBE, True)[key] for size in sizes} if len(sizes) > 1 else {}
        best = min(sizes, key=lambda size: probes.get(size, 0))
        if probes:
            note(f"lm-eval on {PROBE} questions, {key} by batch size: {probes}")
        found = {"hflm": call(arguments, "hflm", best, answers=Path(scratch) / "hflm")}
        for size in arguments.pack_tokens.split(",") if arguments.pack_tokens else [None]:
            name = "layerfuse" if size is None else f"layerfuse, {size} tokens per call"
            found[name] = call(arguments, "layerfuse", size and int(size), answers=Path(scratch) / name)
        found["+questions"] = call(arguments, "+questions", None)
        answers = {name: json.loads((Path(scratch) / name).read_text()) for name in found if (Path(scratch) / name).exists()}
    fastest = min((name for name in found if name.startswith("layerfuse")), key=lambda name: found[name][key])
    reference, ours = answers["hflm"], answers[fastest]
    pairs = [(a, b) for one, two in zip(reference, ours, strict=True) for a, b in zip(one, two, strict=True)]
    agree = sum(one.index(max(one)) == two.index(max(two)) for one, two in zip(reference, ours, strict=True))
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": versions(),
        "commit": commit(),
        "what": f"{arguments.shapes or Path(arguments.model).name}, {arguments.subjects}, {len(ours)} questions, 5-shot, "
        f"{arguments.dtype}, {arguments.device}, {arguments.threads} thread(s)",
        "best_batch_size": best,
        "probes": probes,
        "runs": found,
        "times_cheaper": round(found["hflm"][key] / found[fastest][key], 2),
        "times_cheaper_with_questions": round(found["hflm"][key] / found["+questions"][key], 2),
        "same_predictions": f"{agree} of {len(ours)}",
        "max_logprob_difference": max(abs(a - b) for a, b in pairs),
        "tokens_over_minimum": round(found[fastest]["tokens_run"] / found[fastest]["tokens_minimum"], 4),
    }
    if not arguments.skip_building:
        result["building"] = {name: call(arguments, "building", size) for name, size in (("layerfuse", 1), ("lm-eval", 0))}
    print_table(result, key)
    print(json.dumps(result))


def call(
    arguments: argparse.Namespace,
    worker: str,
    size: int | None,
    limit: int | None = None,
    first_only: bool = False,
    answers: Path | None = None,
) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, __file__, "--worker", worker, "--model", arguments.model, "--data-dir", str(arguments.data_dir)]
    command += ["--dtype", arguments.dtype, "--device", arguments.device, "--threads", str(arguments.threads)]
    command += ["--subjects", arguments.subjects.split(",")[0] if first_only else arguments.subjects]
    for name, value in (
        ("--size", size),
        ("--limit", limit or arguments.limit),
        ("--shapes", arguments.shapes),
        ("--layers", arguments.layers),
        ("--answers", answers),
    ):
        command += [name, str(value)] if value is not None else []
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "MKL_NUM_THREADS": str(arguments.threads)}
    environment |= {"TOKENIZERS_PARALLELISM": "false"} if arguments.threads == 1 else {}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{worker} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    note(f"{worker:12} {size or '':>5} {found}")
    return found


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answers the questions with one model class; processor and wall seconds of scoring, tokenisation included."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from eval.lm import PrefixLM
    from eval.run import ask
    from merge.source import resolve

    torch.set_num_threads(arguments.threads)
    folder = resolve(arguments.model, configs=ROOT / "configs").folder
    model, tokenizer = load(arguments, folder)
    if arguments.worker == "hflm":
        lm = HFLM(model, tokenizer=tokenizer, batch_size=arguments.size)
    else:
        lm = PrefixLM(model, tokenizer=tokenizer, pack_tokens=arguments.size)
    lm._device = torch.device(arguments.device)
    names = SUBJECTS if arguments.subjects == "all" else arguments.subjects.split(",")
    subjects = read_mmlu(arguments.data_dir, names)
    ask(lm, subjects[:1], 5, limit=2)  # warm up
    if isinstance(lm, PrefixLM):
        lm.work = type(lm.work)()
    spent = {"cpu_s": 0.0, "wall_s": 0.0}
    original = lm.loglikelihood

    def timed(requests: Sequence[Any], **options: Any) -> Any:
        start = time.process_time(), time.perf_counter()
        try:
            return original(requests, **options)
        finally:
            spent["cpu_s"] += time.process_time() - start[0]
            spent["wall_s"] += time.perf_counter() - start[1]

    lm.loglikelihood = timed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answers = ask(lm, subjects, 5, arguments.limit, question_text=arguments.worker == "+questions")
    if arguments.answers:
        arguments.answers.write_text(json.dumps([answer.logprobs for answer in answers]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {name: round(value, 3) for name, value in spent.items()}
    found |= {"peak_rss_gb": round(peak / 1e9, 3), "rss_before_gb": round(before / 1e9, 3), "questions": len(answers)}
    if arguments.device.startswith("cuda"):
        found["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    if isinstance(lm, PrefixLM):
        shared = {"tokens_run": lm.work.tokens_run, "tokens_minimum": lm.work.tokens_minimum}
        found |= shared | {"tokens_unshared": lm.work.tokens_unshared, "not_shared_because": lm.not_shared_because}
    return found


def load(arguments: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """The model, or one of other shapes with random weights; and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = getattr(torch, arguments.dtype)
    if not arguments.shapes:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=arguments.device).eval(), tokenizer
    from _shapes import random_model

    return random_model(arguments.shapes, arguments.device, dtype, arguments.layers), tokenizer


def building(arguments: argparse.Namespace) -> dict[str, Any]:
    """Builds the requests of all 57 subjects; `--size 1` compiles each template once."""
    from contextlib import nullcontext

    subjects = read_mmlu(arguments.data_dir)
    start = time.process_time(), time.perf_counter()
    count = 0
    with quick_and_quiet() if arguments.size else nullcontext():
        for subject in subjects:
            (task,) = tasks([subject], 5)
            task.build_all_requests()
            count += len(task.instances)
    return {
        "cpu_s": round(time.process_time() - start[0], 2),
        "wall_s": round(time.perf_counter() - start[1], 2),
        "requests": count,
    }


def commit() -> str:
    found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def print_table(result: dict[str, Any], key: str) -> None:
    print(result["what"])
    for name, run in result["runs"].items():
        share = f"  {run['tokens_run']:,} tokens (without sharing {run['tokens_unshared']:,})" if "tokens_run" in run else ""
        memory = f"  rss {run['peak_rss_gb']} GB ({run['rss_before_gb']} before)"
        print(f"{name:32} {run[key]:9.2f} s  {1000 * run[key] / run['questions']:7.1f} ms per question{memory}{share}")
    for name in ("times_cheaper", "times_cheaper_with_questions", "same_predictions", "max_logprob_difference"):
        print(f"{name:32} {result[name]}")
    print(f"{'tokens_over_minimum':32} {result['tokens_over_minimum']}")
    for name, figures in result.get("building", {}).items():
        print(f"building 57 subjects, {name:10} {figures['cpu_s']:8.2f} CPU-s, {figures['wall_s']:.2f} s wall")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
