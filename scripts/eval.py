"""Any of lm-eval's tasks on a model: the same tasks, metrics and results, each shared prefix computed once."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import contextlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _cli import UsageError, add_model_options, parser, run
from _scoring import (
    add_run_options,
    check_out,
    check_positive,
    counter,
    end_together,
    find_source,
    load,
    peak_memory,
    plan_beside,
)

EXAMPLES = """\
  python scripts/eval.py --model OUT --tasks arc_easy,hellaswag,wikitext
  python scripts/eval.py --model OUT --tasks lambada_openai --limit 200 --samples
  python scripts/eval.py --model OUT --tasks mine --include-path DIR      # tasks of your own, as YAML files of lm-eval"""


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    add_model_options(result, "none")
    data = result.add_argument_group("tasks")
    data.add_argument("--tasks", metavar="A,B,...", help="names of lm-eval's tasks, groups or tags")
    data.add_argument("--include-path", type=Path, metavar="DIR", help="folder with tasks in lm-eval's YAML form")
    data.add_argument("--num-fewshot", type=int, metavar="K", help="examples before each question (default: the task's own)")
    data.add_argument("--limit", type=int, metavar="N", help="documents per task")
    add_run_options(result)
    result.add_argument("--out", type=Path, metavar="FILE", help="results file (default: results/MODEL-TASKS.json)")
    result.add_argument("--overwrite", action="store_true", help="replace results of the same name")
    result.add_argument("--samples", action="store_true", help="also write every document and answer: FILE.samples.jsonl")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Evaluates and prints lm-eval's table."""
    names = [name for name in (arguments.tasks or "").split(",") if name]
    if not names:
        raise UsageError("give --tasks")
    if arguments.include_path and not arguments.include_path.is_dir():
        raise UsageError(f"--include-path is {arguments.include_path}, which is not a folder")
    check_positive(arguments, "limit", "num_fewshot")
    source = find_source(arguments)
    source.checkpoint()
    out = arguments.out or Path("results") / f"{source.name}-{'-'.join(names)[:100]}.json"
    samples_file = out.with_name(out.name.removesuffix(".json") + ".samples.jsonl")
    check_out(arguments, out, *([samples_file] if arguments.samples else []))

    from eval.run import find_tasks, run_tasks, total_work

    manager = find_tasks(names, arguments.include_path)
    lm, placement = load(arguments, source)
    started = time.perf_counter()
    quiet = arguments.quiet or lm.rank != 0
    # Results go to stdout; what lm-eval prints on the way does not.
    with counter("scoring", "request", 0, quiet) as bar, contextlib.redirect_stdout(sys.stderr):
        found = run_tasks(
            lm,
            names,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            manager=manager,
            answered=lambda requests: bar.update(requests * lm.world_size),
        )
    seconds = time.perf_counter() - started
    work = total_work(lm)

    def finish() -> None:
        from lm_eval.utils import make_table

        from merge.publish import write_whole

        assert found is not None  # this is the first process
        keep = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs", "lm_eval_version")
        record: dict[str, Any] = {
            "model": source.spec,
            "plan": plan_beside(source),
            "dtype": placement.dtype,
            "device": placement.device,
            "limit": arguments.limit,
            **{key: found[key] for key in keep if key in found},
            "time_s": round(seconds, 2),
            "tokens": asdict(work),
            "not_shared_because": lm.not_shared_because,
            **peak_memory(lm),
        }
        if arguments.samples:
            rows = ({"task": task} | row for task, samples in found["samples"].items() for row in samples)
            write_whole(samples_file, "".join(json.dumps(row, default=str) + "\n" for row in rows))
        write_whole(out, json.dumps(record, indent=2, default=str) + "\n")
        print(make_table(found).strip())
        if found.get("groups"):
            print(make_table(found, "groups").strip())
        print(
            f"{source.spec}: {seconds:.1f} s, {work.tokens_run:,} tokens run ({work.tokens_unshared:,} without sharing), "
            f"{placement.dtype} on {placement.device}"
        )
        if lm.not_shared_because:
            print(f"prefixes were not shared: {lm.not_shared_because}")
        print(json.dumps({"results": str(out)} | {task: _numbers(values) for task, values in found["results"].items()}))

    end_together(lm, finish)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, float)}


if __name__ == "__main__":
    run(main, options())
