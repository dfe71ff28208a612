"""Speed, memory and exactness of a merge, beside the physical limit and the nearest peer, in one run.

What is measured, on a random bf16 checkpoint with the shapes of Llama-3-8B (or a small one) and alphas/base.json:
  copy        copy_file_range of exactly the bytes that the merge keeps, into as many files; no merge can be faster than this
              by much (one thread, as `cp` does; without and with fsync)
  merge       scripts/merge.py as a user runs it, from start to exit, fsync included
  link        the same with --link
  mergekit    the nearest that mergekit can do: `linear` over 14 aliases of the checkpoint (give --mergekit its executable)
Each is repeated, interleaved with the others; ratios are of medians within one run, because shared machines are noisy.
After timing, every tensor is verified and two runs with different hash seeds are compared byte by byte.

    python benchmarks/merge.py --preset 1gb
    python benchmarks/merge.py --preset 8b --cold --mergekit ../mergekit-venv/bin/mergekit-yaml

Last line of stdout: JSON.
"""

import argparse
import filecmp
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 (after the path is set)
from huggingface_hub import split_state_dict_into_shards_factory  # noqa: E402

from merge.alphas import plan_from_alphas, read_alphas  # noqa: E402
from merge.blueprint import make_blueprint  # noqa: E402
from merge.checkpoint import INDEX_FILE, encode_header, read_checkpoint  # noqa: E402
from merge.report import versions  # noqa: E402
from merge.shapes import tensor_shapes  # noqa: E402

ALPHAS = ROOT / "alphas" / "base.json"
SCRIPT = ROOT / "scripts" / "merge.py"
SMALL = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
}
POOL = 1 << 24  # random numbers that tensors are cut from, at an offset of their own each


@dataclass(frozen=True)
class Run:
    """One timed process: seconds to exit, peak memory in bytes (resident; anonymous), processor seconds."""

    time_s: float
    max_rss: int
    max_anon: int
    cpu_s: float


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--preset", choices=["1gb", "8b"], default="1gb")
    options.add_argument("--dir", type=Path, default=Path("bench-merge"), help="where to work; 8b needs 45 GB there")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--cold", action="store_true", help="also with the input evicted from the page cache")
    options.add_argument(
        "--mergekit", type=Path, metavar="EXECUTABLE", help="mergekit-yaml of a virtual environment of its own"
    )
    options.add_argument("--mergekit-repeats", type=int, default=3)
    options.add_argument("--keep", action="store_true", help="leave the checkpoint for another run")
    arguments = options.parse_args()
    work = arguments.dir.resolve() / "layerfuse-benchmark"  # everything in here is removed at the end
    source = work / f"source-{arguments.preset}"
    make_checkpoint(source, arguments.preset)
    result: dict[str, Any] = {"preset": arguments.preset, "machine": machine(), "versions": versions(), "commit": commit()}
    print(json.dumps(result), file=sys.stderr)
    result |= measure(source, work, arguments)
    print_table(result)
    print(json.dumps(result))
    if not arguments.keep:
        shutil.rmtree(work)


def measure(source: Path, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    checkpoint = read_checkpoint(source)
    blueprint = make_blueprint(plan_from_alphas(read_alphas(ALPHAS), checkpoint.num_hidden_layers), checkpoint)
    runs = ranges(blueprint)
    kept = sum(size for *_, size in runs)
    out = work / "out"
    ours = [sys.executable, str(SCRIPT), "--alphas", str(ALPHAS), "--model", str(source), "--out", str(out), "-q"]
    command = {
        "merge": ours,
        "link": [*ours, "--link"],
    }
    times: dict[str, list[Any]] = {"copy": [], "copy_fsync": [], "merge": [], "link": []}
    for repeat in range(arguments.repeats):
        note(f"repetition {repeat + 1}")
        warm(source)
        plain, synced = copy_limit(source, runs, out)
        times["copy"].append(plain)
        times["copy_fsync"].append(synced)
        for name in ("merge", "link"):
            warm(source)
            times[name].append(timed(command[name]))
            shutil.rmtree(out)
            settle()
    result: dict[str, Any] = {
        "source_bytes": sum(file.size_bytes for file in checkpoint.files),
        "kept_bytes": kept,
        "output_bytes": blueprint.bytes_total,
        "num_parameters": blueprint.num_parameters,
        "warm": summary(times),
    }
    linked = make_blueprint(blueprint.plan, checkpoint, link=True)
    result["link_bytes_written"] = linked.bytes_to_write
    if arguments.cold:
        cold: dict[str, list[Any]] = {"copy": [], "copy_fsync": [], "read_mixed": [], "merge": []}
        for repeat in range(arguments.repeats):
            note(f"cold repetition {repeat + 1}")
            evict(source)
            plain, synced = copy_limit(source, runs, out)
            cold["copy"].append(plain)
            cold["copy_fsync"].append(synced)
            evict(source)
            cold["read_mixed"].append(read_limit(source, blueprint))
            evict(source)
            cold["merge"].append(timed(ours))
            shutil.rmtree(out)
            settle()
        result["cold"] = summary(cold)
        both = [c + r for c, r in zip(cold["copy"], cold["read_mixed"], strict=True)]
        result["cold_ratio_to_copy_plus_read"] = ratio([run.time_s for run in cold["merge"]], both)
    if arguments.mergekit:
        config = mergekit_config(source, work, blueprint)
        peer = []
        for repeat in range(arguments.mergekit_repeats):
            note(f"mergekit repetition {repeat + 1}")
            warm(source)
            peer.append(timed([str(arguments.mergekit), str(config), str(out), "--quiet"]))
            shutil.rmtree(out)
            settle()
        result["warm"] |= summary({"mergekit": peer})
        result["times_faster_than_mergekit"] = ratio([r.time_s for r in peer], [r.time_s for r in times["merge"]])
    result["ratio_to_copy"] = ratio([r.time_s for r in times["merge"]], times["copy"])
    result["ratio_to_copy_fsync"] = ratio([r.time_s for r in times["merge"]], times["copy_fsync"])
    result["start"] = {
        "--help": seconds_of([sys.executable, str(SCRIPT), "--help"]),
        "--dry-run": seconds_of([*ours, "--dry-run"]),
    }
    result["exactness"] = exactness(ours, out, work)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint


def make_checkpoint(folder: Path, preset: str) -> None:
    """A random checkpoint in 5 GB shards, tensors in the order of the forward pass, as the Hub's tools write them."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((ROOT / "configs" / "models" / "llama3-8b.json").read_text())["config"]
    config |= SMALL if preset == "1gb" else {}
    shapes = {name: (shape, 2 * int(np.prod(shape))) for name, shape in tensor_shapes(config).items()}
    split = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda entry: entry[1],
        filename_pattern="model{suffix}.safetensors",
        max_shard_size="5GB" if preset == "8b" else "320MB",
    )
    normal = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32) * np.float32(0.02)
    pool = (normal.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    for position, (file, names) in enumerate(split.filename_to_tensors.items()):
        note(f"writing {file} ({position + 1} of {len(split.filename_to_tensors)})")
        with (folder / file).open("wb") as target:
            target.write(encode_header((name, "BF16", *shapes[name]) for name in names))
            for name in names:
                offset = 2 * int(np.random.default_rng([len(name), *name.encode()]).integers(POOL))
                left = shapes[name][1]
                while left:
                    piece = pool[offset : offset + left]
                    target.write(piece)
                    left, offset = left - len(piece), 0
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    os.sync()


def mergekit_config(source: Path, work: Path, blueprint: Any) -> Path:
    """The 14-way blend as mergekit can express it: one alias folder per layer, weights worked out by hand."""
    mixed = next(row for row in blueprint.plan.rows if not row.is_unit)
    sources = []
    for layer, coefficient in mixed.mix.items():
        alias = work / f"alias-{layer}"
        if not alias.is_symlink():
            alias.symlink_to(source, target_is_directory=True)
        sources.append({"model": str(alias), "layer_range": [layer, layer + 1], "parameters": {"weight": coefficient}})
    kept = [{"model": str(source), "layer_range": [0, mixed.base], "parameters": {"weight": 1.0}}]
    config = {
        "slices": [{"sources": kept}, {"sources": sources}],
        "merge_method": "linear",
        "parameters": {"normalize": True},
        "dtype": "bfloat16",
    }
    path = work / "mergekit.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Limits


def ranges(blueprint: Any) -> list[tuple[str, int, str, int, int]]:
    """(source file, offset, output file, offset, size) of every kept tensor; neighbours joined."""
    runs: list[tuple[str, int, str, int, int]] = []
    for shard in blueprint.shards:
        for output, start in shard.placed:
            if not output.kept:
                continue
            tensor = output.base
            if runs:
                file, begin, target, where, size = runs[-1]
                if (file, target) == (tensor.file, shard.file) and (begin + size, where + size) == (tensor.start, start):
                    runs[-1] = (file, begin, target, where, size + tensor.nbytes)
                    continue
            runs.append((tensor.file, tensor.start, shard.file, start, tensor.nbytes))
    return runs


def copy_limit(source: Path, runs: list[tuple[str, int, str, int, int]], out: Path) -> tuple[float, float]:
    """Seconds for copying the runs in the kernel, one thread: until the last copy, and until all is on disk."""
    out.mkdir()
    started = time.perf_counter()
    files: dict[Path, int] = {}

    def opened(path: Path, flags: int) -> int:
        if path not in files:
            files[path] = os.open(path, flags, 0o644)
        return files[path]

    for file, begin, target, where, size in runs:
        one, two = opened(source / file, os.O_RDONLY), opened(out / target, os.O_WRONLY | os.O_CREAT)
        done = 0
        while done < size:
            done += os.copy_file_range(one, two, min(1 << 30, size - done), begin + done, where + done)
    copied = time.perf_counter() - started
    for path, descriptor in files.items():
        if path.parent == out:
            os.fsync(descriptor)
    synced = time.perf_counter() - started
    for descriptor in files.values():
        os.close(descriptor)
    shutil.rmtree(out)
    settle()
    return copied, synced


def read_limit(source: Path, blueprint: Any) -> float:
    """Seconds for reading what is mixed, once."""
    buffer = bytearray(16 << 20)
    started = time.perf_counter()
    for output in blueprint.outputs:
        for term in output.terms if output.mixed else ():
            with (source / term.tensor.file).open("rb", buffering=0) as file:
                file.seek(term.tensor.start)
                left = term.tensor.nbytes
                while left:
                    left -= file.readinto(memoryview(buffer)[: min(left, len(buffer))])
    return time.perf_counter() - started


def warm(source: Path) -> None:
    """Reads the input through, so that it is in the page cache as far as it fits."""
    buffer = bytearray(16 << 20)
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def evict(source: Path) -> None:
    """Drops the input from the page cache."""
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def settle() -> None:
    """Waits until what was written or deleted is done with, so that it does not slow the next run."""
    os.sync()
    time.sleep(1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def timed(command: list[str]) -> Run:
    """Runs a command to its end and watches its memory (its own process; peaks from the kernel, anonymous by sampling)."""
    started = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    errors = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {errors.decode()[-2000:]}")
    return Run(seconds, usage.ru_maxrss * 1024, peak[0], usage.ru_utime + usage.ru_stime)


def _watch(pid: int, peak: list[int]) -> None:
    status = Path(f"/proc/{pid}/status")
    while True:
        try:
            found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        except OSError:
            return
        if found:
            peak[0] = max(peak[0], int(found[1]) * 1024)
        time.sleep(0.01)


def seconds_of(command: list[str], repeats: int = 5) -> float:
    """Median seconds of a command."""
    return statistics.median(timed(command).time_s for _ in range(repeats))


def exactness(ours: list[str], out: Path, work: Path) -> dict[str, Any]:
    """Verifies one output and compares two made with different hash seeds."""
    note("verifying")
    other = work / "out2"
    for folder, seed in ((out, "1"), (other, "2")):
        command = [part if part != str(out) else str(folder) for part in ours]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONHASHSEED": seed})
    names = sorted(path.name for path in out.glob("*.safetensors"))
    _, differing, missing = filecmp.cmpfiles(out, other, [*names, "config.json", "plan.json"], shallow=False)
    shutil.rmtree(other)
    check = [sys.executable, str(ROOT / "scripts" / "verify.py"), str(out), "-q"]
    said = subprocess.run(check, check=True, capture_output=True, text=True).stdout
    shutil.rmtree(out)
    rounded = re.search(r"([\d.]+)% are", said)
    return {
        "same_bytes_twice": not differing and not missing,
        "correctly_rounded_percent": float(rounded[1]) if rounded else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reporting


def summary(times: dict[str, list[Any]]) -> dict[str, Any]:
    """Medians, all values, and for processes the memory."""
    result: dict[str, Any] = {}
    for name, runs in times.items():
        if runs and isinstance(runs[0], Run):
            seconds = [run.time_s for run in runs]
            extra = {
                "max_rss_gb": round(max(run.max_rss for run in runs) / 1e9, 3),
                "max_anon_gb": round(max(run.max_anon for run in runs) / 1e9, 3),
                "cpu_s": round(statistics.median(run.cpu_s for run in runs), 2),
            }
        else:
            seconds, extra = runs, {}
        result[name] = {"median_s": round(statistics.median(seconds), 2), "all_s": [round(s, 2) for s in seconds]} | extra
    return result


def ratio(one: list[float], two: list[float]) -> float:
    """The ratio of medians."""
    return round(statistics.median(one) / statistics.median(two), 2)


def machine() -> str:
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    load = os.getloadavg()[0]
    processor = model[1] if model else platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {memory:.0f} GB, load {load:.1f}, Python {platform.python_version()}"


def commit() -> str:
    found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def print_table(result: dict[str, Any]) -> None:
    for state in ("warm", "cold"):
        for name, figures in result.get(state, {}).items():
            memory = (
                f"  rss {figures['max_rss_gb']} GB, anonymous {figures['max_anon_gb']} GB" if "max_rss_gb" in figures else ""
            )
            print(f"{state:5} {name:12} {figures['median_s']:8.2f} s  {figures['all_s']}{memory}")
    for key in ("ratio_to_copy", "ratio_to_copy_fsync", "cold_ratio_to_copy_plus_read", "times_faster_than_mergekit"):
        if key in result:
            print(f"{key:32} {result[key]}")
    print(f"{'start-up (s)':32} {result['start']}")
    print(f"{'exactness':32} {result['exactness']}")


def note(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
