"""What a trial of a search costs, beside evaluations of the really fused checkpoint, in one run.

One thread, processor seconds; all questions of one MMLU subject, 5-shot; the top layers folded into one.
  lm-eval     its own model class on the fused checkpoint, batch size 1
  layerfuse   eval.lm.PrefixLM on the fused checkpoint
  trial       one trial on cached hidden states: mixing the weights, running the changed layer, four logits
  gradient    one step: the same with gradients down to one coefficient per tensor group and norm
  capture     running the original model once and keeping its hidden states, over an evaluation of the original by PrefixLM
After timing, the trial's log-probabilities of the four options are compared with those of the fused checkpoint.

    python benchmarks/search.py --model SMOLLM2.gguf --data-dir DIR
    python benchmarks/search.py --model SMOLLM2.gguf --data-dir DIR --shapes llama3-8b --alphas alphas/base.json --device cuda

With --shapes the weights are random, of a model in configs/models (or its twin, tiny:NAME); only the tokenizer is the given
model's. Then all subjects are asked, in bfloat16 on a GPU; seconds are of the wall clock; what is measured is capture, trial,
gradient step and memory.
Last line of stdout: JSON.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True)
    options.add_argument("--data-dir", type=Path, required=True)
    options.add_argument("--subject", default="anatomy")
    options.add_argument("--layers", type=int, default=8, help="layers folded away")
    options.add_argument("--limit", type=int)
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--skip-lm-eval", action="store_true")
    options.add_argument("--shapes", help="random weights of this model of configs/models")
    options.add_argument("--alphas", type=Path, help="with --shapes: the steps")
    options.add_argument("--device", default="cuda", help="with --shapes")
    options.add_argument("--subjects", default="", help="with --shapes: comma-separated (default: all)")
    arguments = options.parse_args()
    if arguments.shapes:
        shapes(arguments)
        return
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eval.lm import PrefixLM
    from eval.mmlu import quick_and_quiet, read_mmlu, tasks
    from eval.objective import Encoded, capture_questions, question_terms
    from eval.objective import options as option_logprobs
    from eval.trial import Mixture, Tail
    from merge.api import Options, merge_checkpoint
    from merge.plan import chain
    from merge.report import versions
    from merge.source import resolve
    from merge.space import Alphas, Coefficients, groups_of

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    source = resolve(arguments.model)
    checkpoint = source.checkpoint()
    total, names = checkpoint.num_hidden_layers, list(checkpoint.layers[0])
    cut = total - 1 - arguments.layers
    tokenizer = AutoTokenizer.from_pretrained(source.folder)

    def model(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    (subject,) = read_mmlu(arguments.data_dir, [arguments.subject])
    (task,) = tasks([subject], 5)
    with quick_and_quiet():
        task.build_all_requests(limit=arguments.limit)
    requests = task.instances
    found: dict[str, Any] = {}

    lm = PrefixLM(model(source.folder), tokenizer=tokenizer, self_check=False)
    found["layerfuse on the original"] = cpu_seconds(lambda: lm.loglikelihood(requests, disable_tqdm=True))[0]
    pairs = lm.encode(requests)
    encoded = Encoded(
        tuple((subject.name, instance.doc_id) for instance in requests[::4]),
        tuple(lm._input(*pair) for pair in pairs[::4]),
        tuple(int(instance.doc["answer"]) for instance in requests[::4]),
        tuple(continuation[-1] for _, continuation in pairs[:4]),  # type: ignore[arg-type]
    )
    tail = Tail(lm)
    found["capture"], questions = cpu_seconds(lambda: capture_questions(tail, encoded, cut))
    space = Alphas(chain([0.62] * arguments.layers, total), total, groups_of(names, norms=False))
    mixture, x = Mixture(tail, space, cut), torch.full((arguments.layers,), 0.62)

    @torch.inference_mode()
    def trial() -> torch.Tensor:
        return option_logprobs(tail, mixture.layers(space.mixes(x)), questions)

    free = Coefficients(space.rows, total, groups_of(names, norms=True), checkpoint.model_type)
    free_mixture = Mixture(tail, free, cut)
    start = next(iter(free.starts().values())).requires_grad_(True)

    def gradient() -> None:
        value = question_terms(option_logprobs(tail, free_mixture.layers(free.mixes(start)), questions), questions)["kl"]
        start.grad = None
        torch.autograd.backward(value)

    for name, work in (("trial", trial), ("gradient", gradient)):
        cpu_seconds(work)
        found[name] = statistics.median(cpu_seconds(work)[0] for _ in range(arguments.repeats))
    ours = trial()

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "fused"
        merge_checkpoint(space.plan(x.tolist(), "benchmark"), source, folder, Options(dtype="float32"))
        fused = model(folder)
    shared = PrefixLM(fused, tokenizer=tokenizer, self_check=False)
    found["layerfuse"], answers = cpu_seconds(lambda: shared.loglikelihood(requests, disable_tqdm=True))
    if not arguments.skip_lm_eval:
        theirs = HFLM(fused, tokenizer=tokenizer, batch_size=1)
        found["lm-eval"], answers = cpu_seconds(lambda: theirs.loglikelihood(requests, disable_tqdm=True))
    expected = torch.log_softmax(torch.tensor([logprob for logprob, _ in answers]).view(-1, 4), -1)
    order = {one: i for i, one in enumerate(dict.fromkeys(encoded.inputs))}
    difference = (ours[[order[one] for one in encoded.inputs]] - expected).abs().max().item()

    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": versions(),
        "commit": commit(),
        "what": f"{Path(arguments.model).name}, {total} -> {total - arguments.layers} layers, {arguments.subject}, "
        f"{len(encoded.ids)} questions, 5-shot, float32, 1 thread",
        "cpu_s": {name: round(value, 4) for name, value in found.items()},
        "cached_mb": round(questions.states.nbytes / 1e6, 1),
        "trial_times_cheaper_than_layerfuse": round(found["layerfuse"] / found["trial"], 1),
        "gradient_over_trial": round(found["gradient"] / found["trial"], 2),
        "capture_over_evaluation": round(found["capture"] / found["layerfuse on the original"], 2),
        "max_difference": difference,
    }
    if "lm-eval" in found:
        result["trial_times_cheaper_than_lm_eval"] = round(found["lm-eval"] / found["trial"], 1)
    for key, value in result.items():
        print(f"{key:36} {value}")
    print(json.dumps(result))


def shapes(arguments: argparse.Namespace) -> None:
    """A large model on one device: how long its states take, and trials on them."""
    import torch
    from _shapes import random_model
    from transformers import AutoTokenizer

    from eval.lm import PrefixLM
    from eval.mmlu import read_mmlu
    from eval.objective import capture_questions, encode_questions, options, question_terms
    from eval.trial import Mixture, Tail, first_mixed
    from merge.alphas import plan_from_alphas, read_alphas
    from merge.report import peak_rss_bytes, versions
    from merge.source import resolve
    from merge.space import Alphas, Coefficients, groups_of

    logging.disable(logging.WARNING)
    tokenizer = AutoTokenizer.from_pretrained(resolve(arguments.model, configs=ROOT / "configs").folder)
    gpu = arguments.device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    model = random_model(arguments.shapes, arguments.device, dtype)
    config = model.config
    lm = PrefixLM(model, tokenizer=tokenizer, device=arguments.device, self_check=False)
    total = config.num_hidden_layers
    if arguments.alphas:
        steps = plan_from_alphas(read_alphas(arguments.alphas), total).steps
    else:
        from merge.plan import chain

        steps = chain([0.62] * arguments.layers, total)
    names = [name for name, _ in model.get_decoder().layers[0].named_parameters()]
    space = Alphas(steps, total, groups_of(names, norms=False))
    free = Coefficients(space.rows, total, groups_of(names, norms=True), config.model_type)
    tail, cut = Tail(lm), first_mixed(space)

    def synchronise() -> None:
        if gpu:
            torch.cuda.synchronize()

    def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
        synchronise()
        start = time.perf_counter()
        value = work()
        synchronise()
        return time.perf_counter() - start, value

    chosen = [one for one in arguments.subjects.split(",") if one]
    subjects = read_mmlu(arguments.data_dir, chosen)
    encoding, parts = seconds(lambda: encode_questions(lm, subjects, 5, arguments.limit, 0))
    captured, questions = seconds(lambda: [capture_questions(tail, one, cut) for one in parts.values() if one.ids])
    after_capture = torch.cuda.memory_allocated() if gpu else 0
    mixture, loose = Mixture(tail, space, cut), Mixture(tail, free, cut)
    x = torch.tensor([step.alpha for step in steps], device=arguments.device)
    start = next(iter(free.starts().values())).to(arguments.device).requires_grad_(True)

    @torch.inference_mode()
    def trial() -> None:
        layers = mixture.layers(space.mixes(x))
        for one in questions:
            options(tail, layers, one)

    def gradient() -> None:
        start.grad = None
        layers = loose.layers(free.mixes(start))
        losses = [question_terms(options(tail, layers, one), one)["kl"] for one in questions]
        torch.autograd.backward(torch.stack(losses).sum())

    result: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if gpu else platform.machine(),
        "versions": versions(),
        "commit": commit(),
        "what": f"{arguments.shapes}, {total} -> {total - len(steps)} layers, {sum(len(one.ids) for one in parts.values())} "
        f"questions, 5-shot, {dtype}, {arguments.device}",
        "tokens_cached": sum(one.states.num_tokens for one in questions),
        "cache_gb": round(sum(one.states.nbytes for one in questions) / 1e9, 2),
        "encoding_s": round(encoding, 2),
        "capture_s": round(captured, 2),
        "gpu_gb_after_capture": round(after_capture / 1e9, 2),
    }
    for name, work in (("trial", trial), ("gradient", gradient)):
        first, _ = seconds(work)
        result[f"first_{name}_s"] = round(first, 4)
        result[f"{name}_s"] = [round(seconds(work)[0], 4) for _ in range(arguments.repeats)]
    result["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2) if gpu else 0
    result["peak_rss_gb"] = round(peak_rss_bytes() / 1e9, 2)
    for key, value in result.items():
        print(f"{key:24} {value}")
    print(json.dumps(result))


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """(processor seconds, what the work returns)."""
    start = time.process_time()
    value = work()
    return time.process_time() - start, value


def commit() -> str:
    found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
