"""Every benchmark of the project in one run: one table, one JSON, and the last committed figures beside today's.

    python benchmarks/all.py --model SMOLLM2.gguf --data-dir DIR --text wiki.test.raw --out figures.json
    python benchmarks/all.py --preset full --dir BIG --out figures.json --add "fusion=--donor STORIES260K"
    python benchmarks/all.py --gpu --model SMOLLM2.gguf --data-dir DIR --out gpu.json     real shapes with random weights
    python benchmarks/all.py --gpu --device cpu --data-dir DIR --out rehearsal.json       the same, tiny: does it run?

small takes about ten minutes on two cores, full (the settings of docs/benchmarks.md) hours and 45 GB in --dir, --gpu less than
ten minutes. One that fails or takes longer than its limit is reported, the others go on, and the exit status is 1. A figure is
compared where the last committed one came from the same command; figures without a unit come first, because ratios within a
run move less than seconds do. Last line of stdout: JSON.
"""

import argparse
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval.errors import near  # noqa: E402 (after the path is set)
from merge.publish import write_whole  # noqa: E402
from merge.records import read_json  # noqa: E402
from merge.report import machine, versions  # noqa: E402

COMMITTED = ROOT / "docs" / "benchmarks.json"
NOISE = 0.1  # a figure that moved by less is neither better nor worse
SHOWN_LINES = 12  # of what a failed benchmark said last
HIGHER, LOWER = "higher", "lower"

EVAL_SHAPES = {
    "times_cheaper": ("time of lm-eval's model class over ours", "", HIGHER),
    "tokens_over_minimum": ("tokens run over the fewest possible", "", LOWER),
    "max_logprob_difference": ("largest difference of a log-probability", "", LOWER),
    "runs/layerfuse/wall_s": ("scoring", "s", LOWER),
    "runs/hflm/wall_s": ("scoring by lm-eval's model class", "s", LOWER),
    "runs/layerfuse/peak_gpu_gb": ("memory", "GB", LOWER),
    "runs/hflm/peak_gpu_gb": ("memory of lm-eval's model class", "GB", LOWER),
}
FUSED_SHAPES = {
    "of_host_and_donor_in_turn": ("throughput over host and donor in turn", "", HIGHER),
    "of_peak/prefill": ("prefill, share of the peak", "", HIGHER),
    "of_peak/train": ("training, share of the peak", "", HIGHER),
    "decode_of_bandwidth": ("decoding, share of the bandwidth", "", HIGHER),
    "prefill_tokens_per_s/fused": ("prefill", "tokens/s", HIGHER),
    "decode_tokens_per_s/fused, batch 1": ("decoding, batch 1", "tokens/s", HIGHER),
    "decode_tokens_per_s/fused, batch 16": ("decoding, batch 16", "tokens/s", HIGHER),
    "train_tokens_per_s": ("training", "tokens/s", HIGHER),
    "prefill_peak_gb": ("memory of prefill", "GB", LOWER),
    "train_peak_gb": ("memory of training", "GB", LOWER),
}
# Benchmark -> where in its JSON -> (name, unit, which direction is better). Of several values the median counts. Smaller
# settings leave some out.
FIGURES: dict[str, dict[str, tuple[str, str, str]]] = {
    "merge": {
        "ratio_to_copy": ("time over that of copying the kept bytes", "", LOWER),
        "ratio_to_copy_fsync": ("the same with fsync on both sides", "", LOWER),
        "cold_ratio_to_copy_plus_read": ("input cold, time over copying and reading", "", LOWER),
        "times_faster_than_mergekit": ("time of mergekit over ours", "", HIGHER),
        "exactness/same_bytes_twice": ("same bytes with other hash seeds (1: yes)", "", HIGHER),
        "exactness/correctly_rounded_percent": ("correctly rounded", "%", HIGHER),
        "warm/merge/median_s": ("merge.py, start to exit", "s", LOWER),
        "warm/merge/max_anon_gb": ("anonymous memory", "GB", LOWER),
        "start/--dry-run": ("--dry-run", "s", LOWER),
    },
    "eval": {
        "times_cheaper": ("time of lm-eval's model class over ours", "", HIGHER),
        "times_cheaper_with_questions": ("the same, ours with the questions' perplexity", "", HIGHER),
        "tokens_over_minimum": ("tokens run over the fewest possible", "", LOWER),
        "max_logprob_difference": ("largest difference of a log-probability", "", LOWER),
        "runs/layerfuse/cpu_s": ("scoring", "CPU-s", LOWER),
        "runs/layerfuse/peak_rss_gb": ("memory", "GB", LOWER),
        "building/layerfuse/cpu_s": ("building all requests", "CPU-s", LOWER),
    },
    "search": {
        "trial_times_cheaper_than_lm_eval": ("time of lm-eval over a trial", "", HIGHER),
        "trial_times_cheaper_than_layerfuse": ("time of our evaluator over a trial", "", HIGHER),
        "gradient_over_trial": ("gradient step over trial", "", LOWER),
        "capture_over_evaluation": ("building the cache over an evaluation", "", LOWER),
        "max_difference": ("largest difference of a log-probability", "", LOWER),
        "cpu_s/trial": ("trial", "CPU-s", LOWER),
        "cpu_s/gradient": ("gradient step", "CPU-s", LOWER),
    },
    "similarity": {
        "times_cheaper": ("time of one pass per layer over ours", "", HIGHER),
        "layerfuse_cpu_s": ("all layers compared", "CPU-s", LOWER),
    },
    "arithmetic": {
        "times_faster/eager": ("time of the plain implementation over ours", "", HIGHER),
        "times_faster/compiled": ("the same, compiled", "", HIGHER),
        "cpu_ms_per_update/eager": ("update", "CPU-ms", LOWER),
        "cpu_ms_per_update/compiled": ("update, compiled", "CPU-ms", LOWER),
    },
    "fusion": {
        "scoring_ratio": ("scoring, throughput over host and donors in turn", "", HIGHER),
        "decoding_ratio": ("decoding, throughput over host and donors in turn", "", HIGHER),
        "bits_per_byte/attention/prose": ("prose, fused by attention", "bits per byte", LOWER),
        "bits_per_byte/attention/code": ("code, fused by attention", "bits per byte", LOWER),
    },
    "fusion-shapes": {  # tiny: shares of a GPU's peak and memory would be zero
        "of_host_and_donor_in_turn": ("throughput over host and donor in turn", "", HIGHER),
        "prefill_tokens_per_s/fused": ("prefill", "tokens/s", HIGHER),
        "decode_tokens_per_s/fused, batch 1": ("decoding, batch 1", "tokens/s", HIGHER),
        "decode_tokens_per_s/fused, batch 16": ("decoding, batch 16", "tokens/s", HIGHER),
        "train_tokens_per_s": ("training", "tokens/s", HIGHER),
    },
    "projection": {
        "merged/rotated ridge/mean_gap": ("gap to the host rotated, ridge", "", LOWER),
        "merged/rotated procrustes/mean_gap": ("gap to the host rotated, Procrustes", "", LOWER),
        "merged/trained ridge/mean_gap": ("gap to a trained donor, ridge", "", LOWER),
        "merged/trained ridge/project_s": ("projecting", "s", LOWER),
    },
    "pairs": {
        "pairs": ("pairs measured", "", HIGHER),
        "group better": ("pairs where coefficients beat the better drop", "", HIGHER),
        "best alpha better": ("pairs where an alpha does", "", HIGHER),
    },
    "eval-32-layers": EVAL_SHAPES,
    "eval-19-layers": EVAL_SHAPES,
    "search-8b": {
        "trial_s": ("trial", "s", LOWER),
        "gradient_s": ("gradient step", "s", LOWER),
        "capture_s": ("building the cache", "s", LOWER),
        "tokens_cached": ("tokens in the cache", "tokens", LOWER),
        "peak_gpu_gb": ("memory", "GB", LOWER),
    },
    "fused-8b-2b": FUSED_SHAPES,
    "arithmetic-grid": {"updates_per_s": ("updates of networks trained together", "1/s", HIGHER)},
}

MINUTES, HOURS = 60, 3600
SMOLLM2 = "--model {model} --data-dir {data}"
LLAMA3 = f"{SMOLLM2} --shapes llama3-8b --device cuda"
TWIN = "--model tiny:llama3-8b --data-dir {data} --subjects anatomy --limit 3 --shapes tiny:llama3-8b --device cpu"
EVAL_LLAMA3 = f"benchmarks/eval.py {LLAMA3} --dtype bfloat16 --batch-sizes 32 --skip-building"
EVAL_TWIN = f"benchmarks/eval.py {TWIN} --batch-sizes 1 --skip-building"
FUSION = "benchmarks/fusion.py --host {model} --prose {text} --threads 1 --out {work}"
PAIRS = "benchmarks/pairs.py --model {model} --text {half} --eval-text {text} --out {work}/pairs.json"
# What is run: name -> (seconds it may take, command). {model}, {data} and {text} are the options of those names, {half} is the
# second half of the text, {work} a folder that is removed afterwards.
SETS: dict[str, dict[str, tuple[int, str]]] = {
    "small": {
        "merge": (10 * MINUTES, "benchmarks/merge.py --preset 1gb --dir {work}"),
        "eval": (10 * MINUTES, f"benchmarks/eval.py {SMOLLM2} --subjects anatomy --limit 12 --batch-sizes 1 --skip-building"),
        "search": (10 * MINUTES, f"benchmarks/search.py {SMOLLM2} --limit 16 --repeats 5"),
        "similarity": (10 * MINUTES, f"benchmarks/similarity.py {SMOLLM2} --measured 1 --repeats 1"),
        "arithmetic": (10 * MINUTES, "benchmarks/arithmetic.py --turns 1 --no-compile"),
        "fusion": (10 * MINUTES, f"{FUSION} --byte-updates 5 --updates 0 --repeats 3"),
        "fusion-shapes": (10 * MINUTES, "benchmarks/fusion_shapes.py --tiny --tokens 64 --written 4 --repeats 3"),
        "projection": (
            10 * MINUTES,
            "benchmarks/projection.py --steps 50 --positions 4096 --alphas 0,0.1 --heal 5 --heal-seeds 1 --eval-windows 32",
        ),
        "pairs": (10 * MINUTES, f"{PAIRS} --pairs 27,28 --steps 8 --text-tokens 1024 --eval-tokens 1024"),
    },
    "full": {
        "merge": (8 * HOURS, "benchmarks/merge.py --preset 8b --cold --dir {work}"),
        "eval": (8 * HOURS, f"benchmarks/eval.py {SMOLLM2} --subjects anatomy,virology"),
        "search": (8 * HOURS, f"benchmarks/search.py {SMOLLM2}"),
        "similarity": (8 * HOURS, f"benchmarks/similarity.py {SMOLLM2}"),
        "arithmetic": (8 * HOURS, "benchmarks/arithmetic.py"),
        "fusion": (
            8 * HOURS,
            f"{FUSION} --byte-updates 500 --updates 60 --documents 24 --alignment prefix --mmlu {{data}} --questions 1",
        ),
        "fusion-shapes": (8 * HOURS, "benchmarks/fusion_shapes.py --tiny --tokens 64 --written 4"),
        "projection": (8 * HOURS, "benchmarks/projection.py --steps 500"),
        "pairs": (8 * HOURS, f"{PAIRS} --steps 48"),
    },
    "gpu": {  # what they may take adds up to less than ten minutes
        "eval-32-layers": (130, f"{EVAL_LLAMA3} --layers 32"),
        "eval-19-layers": (110, f"{EVAL_LLAMA3} --layers 19"),
        "search-8b": (100, f"benchmarks/search.py {LLAMA3} --alphas alphas/base.json --limit 5 --repeats 5"),
        "fused-8b-2b": (140, "benchmarks/fusion_shapes.py --device cuda --repeats 3"),
        "arithmetic-grid": (90, "benchmarks/arithmetic.py --grid --device cuda --updates 2000"),
    },
    "rehearsal": {  # of "gpu": the same programs on a CPU, tiny
        "eval-32-layers": (5 * MINUTES, f"{EVAL_TWIN} --layers 32"),
        "eval-19-layers": (5 * MINUTES, f"{EVAL_TWIN} --layers 19"),
        "search-8b": (5 * MINUTES, f"benchmarks/search.py {TWIN} --alphas alphas/base.json --repeats 2"),
        "fused-8b-2b": (5 * MINUTES, "benchmarks/fusion_shapes.py --tiny --rows 1 --tokens 32 --written 2 --repeats 1"),
        "arithmetic-grid": (5 * MINUTES, "benchmarks/arithmetic.py --grid --device cpu --updates 10 --seeds 2"),
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--preset", choices=["small", "full"], default="small")
    options.add_argument("--gpu", action="store_true", help="models of real shapes on a GPU, in place of a preset")
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="with --gpu; cpu: a rehearsal, tiny")
    options.add_argument("--only", metavar="NAME,NAME", help="of the benchmarks (default: all)")
    options.add_argument("--add", action="append", default=[], metavar="NAME=OPTIONS", help="more options for one of them")
    options.add_argument(
        "--model", help="SmolLM2-135M's .gguf in the documented figures; with --gpu its tokenizer alone is used"
    )
    options.add_argument("--data-dir", type=Path, help="MMLU")
    options.add_argument("--text", type=Path, help="WikiText-2's test split in the documented figures")
    options.add_argument("--dir", type=Path, help="where to work (default: the system's folder for temporary files)")
    options.add_argument("--against", type=Path, default=COMMITTED, help="what to compare with (default: docs/benchmarks.json)")
    options.add_argument(
        "--note", default="", help="what a reader of the figures should know, such as other work on the machine"
    )
    options.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    arguments = options.parse_args(argv)
    name = ("gpu" if arguments.device == "cuda" else "rehearsal") if arguments.gpu else arguments.preset
    given = {
        "model": _absolute(arguments.model) if arguments.model else None,
        "data": arguments.data_dir and str(arguments.data_dir.resolve()),
        "text": arguments.text and str(arguments.text.resolve()),
    }
    try:
        members = chosen(name, arguments.only, arguments.add)
        check(members, given, arguments)
        before = read_before(arguments.against)
        device = gpu_name() if name == "gpu" else None
    except ValueError as error:
        options.error(str(error))
    result: dict[str, Any] = {
        "schema_version": 1,
        "set": name,
        "note": arguments.note,
        "commit": commit(),
        "machine": hardware() | ({"gpu": device} if device else {}),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions(),
        "benchmarks": {},
    }
    for number, (member, (limit_s, line)) in enumerate(members.items(), 1):
        note(f"{number} of {len(members)}: {member}")
        found = result["benchmarks"][member] = measure(member, line, limit_s, given, arguments.dir)
        note(f"   {found['error']}" if "error" in found else f"   {found['seconds']} s")
    write_whole(arguments.out, json.dumps(result, indent=1) + "\n")
    if before and before.get("note"):
        note(f"{arguments.against} says: {before['note']}")
    if before and before["machine"] != result["machine"]:
        note(f"warning: {arguments.against} is of another machine ({before['machine']}); compare ratios, not seconds")
    print(table(result, before))
    failed = [member for member, found in result["benchmarks"].items() if "error" in found]
    print(json.dumps({"out": str(arguments.out), "benchmarks": len(members), "failed": failed}))
    return 1 if failed else 0


# ---------------------------------------------------------------------------------------------------------------------
# Before anything runs


def chosen(name: str, only: str | None, added: Sequence[str]) -> dict[str, tuple[int, str]]:
    """The named benchmarks of a set, in its order, with the added options.

    Raises:
        ValueError: a name that the set does not have.
    """
    known = SETS[name]
    more = [one.partition("=")[::2] for one in added]
    wanted = only.split(",") if only else list(known)
    for one in [*wanted, *(member for member, _ in more)]:
        if one not in known:
            raise ValueError(f"there is no benchmark {one!r} in {name}{near(one, known)}")
    result = {member: known[member] for member in known if member in wanted}
    for member, extra in more:
        if member in result:
            result[member] = (result[member][0], f"{result[member][1]} {extra}")
    return result


def check(members: Mapping[str, tuple[int, str]], given: Mapping[str, str | None], arguments: argparse.Namespace) -> None:
    """Raises ValueError where an option that a benchmark needs is missing, or a file or folder is not there."""
    for option, key, places in (
        ("--model", "model", ["{model}"]),
        ("--data-dir", "data", ["{data}"]),
        ("--text", "text", ["{text}", "{half}"]),
    ):
        needing = [member for member, (_, line) in members.items() if any(place in line for place in places)]
        if needing and not given[key]:
            raise ValueError(f"{option} is needed for {', '.join(needing)}")
    if arguments.text and not arguments.text.is_file():
        raise ValueError(f"there is no file {arguments.text}")
    for folder in (arguments.data_dir, arguments.dir, arguments.out.parent):
        if folder and not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")


def read_before(path: Path) -> dict[str, Any] | None:
    """The record to compare with, None where there is none.

    Raises:
        ValueError: the file is no such record.
    """
    if not path.exists():
        note(f"there is no {path} to compare with")
        return None
    found = read_json(path)
    if (
        not isinstance(found, dict)
        or found.get("schema_version") != 1
        or not {"machine", "commit", "benchmarks"} <= found.keys()
    ):
        raise ValueError(f"{path} is no record of benchmarks/all.py")
    return found


def gpu_name() -> str:
    """What the GPU is called, asked in a process of its own, which leaves no memory in use.

    Raises:
        ValueError: there is no GPU that torch can use.
    """
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        raise ValueError("torch finds no GPU here; --gpu --device cpu runs the same on tiny shapes")
    return done.stdout.strip()


# ---------------------------------------------------------------------------------------------------------------------
# One benchmark


def measure(
    member: str, line: str, limit_s: float, given: Mapping[str, str | None], folder: Path | None = None
) -> dict[str, Any]:
    """A benchmark's command (without paths of this machine), seconds, and figures or why there are none."""
    with tempfile.TemporaryDirectory(prefix="layerfuse-benchmark-", dir=folder) as work:
        values = {**given, "work": work, "half": f"{work}/half.txt"}
        if "{half}" in line and given["text"]:
            text = Path(given["text"]).read_text(encoding="utf-8", errors="ignore")
            Path(values["half"]).write_text(text[len(text) // 2 :], encoding="utf-8")
        started = time.perf_counter()
        found, error = run([sys.executable, *(part.format_map(values) for part in shlex.split(line))], limit_s)
    said = {"model": Path(given["model"] or "").name, "text": Path(given["text"] or "").name}
    result: dict[str, Any] = {
        "command": "python " + line.format_map(said | {"data": "MMLU", "work": "WORK", "half": f"half of {said['text']}"}),
        "seconds": round(time.perf_counter() - started, 1),
    }
    figures = figures_of(member, found)
    if not error and not figures:
        error = f"its JSON has none of {', '.join(FIGURES[member])}"
    return result | ({"error": error} if error else {"figures": figures})


def run(command: Sequence[str], limit_s: float) -> tuple[dict[str, Any], str]:
    """(the JSON in the last line of its stdout, what went wrong); the process and all that it started end with it."""
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    stopped = False
    try:
        out, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        stopped = True
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if stopped:
        out, errors = process.communicate()
        return {}, f"stopped after {limit_s:g} s" + _end(errors)
    if process.returncode:
        return {}, f"exit status {process.returncode}" + _end(errors)
    try:
        found = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        return {}, "the last line of its stdout is no JSON" + _end(out)
    return found, ""


def figures_of(member: str, found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> value, unit and which direction is better, of the figures that are there."""
    result = {}
    for path, (name, unit, better) in FIGURES[member].items():
        value: Any = found
        for key in path.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float | list):
            number = statistics.median(value) if isinstance(value, list) else float(value)
            if math.isfinite(number):
                result[name] = {"value": number, "unit": unit, "better": better}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table(now: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """Every figure of now beside the last committed one of the same command: those without a unit, then the others."""
    rows = []
    for member, found in now["benchmarks"].items():
        old = before["benchmarks"].get(member, {}) if before else {}
        same = old.get("figures", {}) if old.get("command") == found["command"] else {}
        new = found.get("figures", {})
        for name in dict.fromkeys([*new, *same]):  # one that is gone is shown as well
            about = new.get(name) or same[name]
            values = [one[name]["value"] if name in one else None for one in (new, same)]
            label = f"{name}, {about['unit']}" if about["unit"] else name
            rows.append((int(about["unit"] != ""), [member, label, *map(_shown, values), _compared(*values, about["better"])]))
        if not new:
            rows.append((2, [member, "failed", "", "", ""]))
    head = ["benchmark", "figure", "now", f"committed ({before['commit']})" if before else "committed", "ratio"]
    cells = [head, *(row for _, row in sorted(rows, key=lambda row: row[0]))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _compared(new: float | None, old: float | None, better: str) -> str:
    """New over old, and the word for a change beyond noise."""
    if new is None or not old:
        return ""
    ratio = new / old
    if abs(ratio - 1) <= NOISE:
        return f"{ratio:.2f}"
    return f"{ratio:.2f} {'better' if (ratio > 1) == (better == HIGHER) else 'worse'}"


# ---------------------------------------------------------------------------------------------------------------------


def hardware() -> dict[str, Any]:
    """What the figures depend on, as far as it can be asked."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": model[1] if model else platform.machine(), "memory_gb": round(memory / 1e9), **machine()}


def commit() -> str:
    """The checkout's commit, marked where files were changed since."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _absolute(spec: str) -> str:
    path = Path(spec).expanduser()
    return str(path.resolve()) if path.exists() else spec


def _end(text: str) -> str:
    return "".join(f"\n      {line}" for line in text.strip().splitlines()[-SHOWN_LINES:])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the benchmark that runs ends too
    sys.exit(main())
