# PYTHON_ARGCOMPLETE_OK
"""Any of lm-eval's tasks on a model: the same tasks, metrics and results, each shared prefix computed once."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
from pathlib import Path
from typing import Any

from _cli import UsageError, add_model_options, parser, run
from _progress import counter
from _scoring import add_run_options, check_out, check_positive, find_source, quiet_here

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

    from lm_eval.utils import make_table

    from eval.evaluation import evaluate_tasks
    from merge.publish import write_whole

    with counter("scoring", "request", 0, quiet_here(arguments)) as bar:
        evaluated = evaluate_tasks(
            source,
            names,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            include_path=arguments.include_path,
            dtype=arguments.dtype,
            device=arguments.device,
            batch_size=arguments.batch_size,
            progress=bar.update,
        )
    if evaluated is None:  # this is not the first of several processes
        return
    record, found = evaluated
    if arguments.samples:
        rows = ({"task": task} | row for task, samples in found["samples"].items() for row in samples)
        write_whole(samples_file, "".join(json.dumps(row, default=str) + "\n" for row in rows))
    write_whole(out, json.dumps(record, indent=2, default=str) + "\n")
    print(make_table(found).strip())
    if found.get("groups"):
        print(make_table(found, "groups").strip())
    work = record["tokens"]
    print(
        f"{source.spec}: {record['time_s']:.1f} s, {work['tokens_run']:,} tokens run ({work['tokens_unshared']:,} without "
        f"sharing), {record['dtype']} on {record['device']}"
    )
    if record["not_shared_because"]:
        print(f"prefixes were not shared: {record['not_shared_because']}")
    print(json.dumps({"results": str(out)} | {task: _numbers(values) for task, values in found["results"].items()}))


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, float)}


if __name__ == "__main__":
    run(main, options())
