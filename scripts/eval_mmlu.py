# PYTHON_ARGCOMPLETE_OK
"""MMLU of a model: accuracy with error bars, and what it does not show: perplexity of plain text and a few written words."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _cli import UsageError, add_model_options, parser, run
from _progress import counter
from _scoring import add_run_options, check_out, check_positive, find_source, quiet_here

from eval.errors import DataError
from eval.mmlu import CONVENTIONS, partial, read_mmlu
from eval.progress import progress_path
from eval.results import all_or_none, answers_path
from merge.publish import lock_file

EXAMPLES = """\
  python scripts/eval_mmlu.py --model merged/Meta-Llama-3-8B-base --data-dir DIR --text wiki.test.raw
  python scripts/eval_mmlu.py --model DIR --subjects anatomy,virology --limit 20
  accelerate launch --num_processes 4 scripts/eval_mmlu.py --model DIR
  python scripts/compare.py results/Meta-Llama-3-8B-base.json results/Meta-Llama-3-8B.json"""
STOPPED = "stopped; subjects that were finished are kept: the same command with --resume goes on"


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    add_model_options(result, "none")
    data = result.add_argument_group("questions")
    data.add_argument("--data-dir", type=Path, metavar="DIR", help="dev/ and test/ CSVs, or parquet (default: the Hub)")
    data.add_argument("--subjects", metavar="A,B,...", help="default: all 57")
    data.add_argument("--limit", type=int, metavar="N", help="questions per subject")
    data.add_argument("--num-fewshot", type=int, default=5, metavar="K", help="examples before each question (default: 5)")
    data.add_argument(
        "--compat",
        choices=CONVENTIONS,
        default="lm-eval",
        help="prompts and letters as in lm-eval (default) or as in the reference tool of layer merging (two blanks before the "
        "subject, no BOS, 'A' instead of ' A'), whose published numbers are macro averages",
    )
    text = result.add_argument_group("perplexity")
    text.add_argument("--text", type=Path, metavar="FILE", help="plain text (default: WikiText-2's test split, from the Hub)")
    text.add_argument("--text-tokens", type=int, default=20_480, metavar="N", help="at most so many of it (default: 20480)")
    text.add_argument("--no-question-text", action="store_true", help="leave out the perplexity of the questions' own text")
    add_run_options(result)
    result.add_argument("--out", type=Path, metavar="FILE", help="results file (default: results/MODEL.json)")
    result.add_argument("--overwrite", action="store_true", help="replace results, or an interrupted run, of the same name")
    result.add_argument("--resume", action="store_true", help="keep the subjects that an interrupted run has finished")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Evaluates and prints."""
    check_positive(arguments, "limit", "num_fewshot", "text_tokens")
    source = find_source(arguments)
    source.checkpoint()
    out = arguments.out or Path("results") / f"{source.name}.json"
    begun = progress_path(out)
    if out.exists() and begun.exists() and out.stat().st_mtime_ns >= begun.stat().st_mtime_ns:
        begun.unlink()  # of a run that was stopped when all but this was done
    between = arguments.resume and begun.exists() and not out.exists()  # stopped between the one file and the other
    check_out(arguments, out, *(() if between else (answers_path(out),)))
    if begun.exists() and not (arguments.resume or arguments.overwrite):
        os.close(lock_file(begun))  # or it is under way, which is what is said
        raise UsageError(f"{begun} holds finished subjects of an interrupted run; give --resume, or --overwrite")
    subjects = read_mmlu(arguments.data_dir, arguments.subjects.split(",") if arguments.subjects else ())
    part = partial(subjects, arguments.limit)
    if part and not (arguments.limit or arguments.subjects):
        logging.warning("this is not all of MMLU: %s", part)

    # torch, transformers and lm-eval take seconds to import: only now, when the input is known to be good.
    from eval.evaluation import evaluate_mmlu
    from eval.run import plain_text

    text: str | None = None
    text_missing: str | None = None
    try:
        text = plain_text(arguments.text)
    except DataError as error:
        if arguments.text:
            raise
        text_missing = str(error)
        logging.warning("perplexity of plain text will be missing: %s", error)
    with counter("MMLU", "question", 0, quiet_here(arguments)) as bar:
        found = evaluate_mmlu(
            source,
            subjects,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            convention=arguments.compat,
            measure_questions=not arguments.no_question_text,
            text=text,
            text_name=arguments.text.name if arguments.text else "wikitext-2 (test)",
            text_tokens=arguments.text_tokens,
            text_missing=text_missing,
            dtype=arguments.dtype,
            device=arguments.device,
            batch_size=arguments.batch_size,
            out=out,
            resume=arguments.resume,
            progress=lambda total: _total(bar, total),
        )
    if found is not None:  # this is the first of several processes
        record, _ = found
        print(_table(record))
        print(json.dumps({"results": str(out), "micro": record["scores"]["micro"], "macro": record["scores"]["macro"]}))


def _total(bar: Any, total: int) -> Callable[[float], object]:
    """Gives a bar its length, and what advances it."""
    bar.reset(total)
    return bar.update


def _table(record: dict[str, Any]) -> str:
    scores = record["scores"]

    def line(name: str, one: dict[str, Any], unit: str = "questions") -> str:
        error = f"+- {one['stderr']:.4f}" if one["stderr"] is not None else "+-    ?"
        if (interval := all_or_none(one)) is not None:
            error = "[{:.2f}, {:.2f}]".format(*interval)
        return f"{name:40} {one['acc']:.4f} {error:12}  {one['count']:>6,} {unit}"

    part = f" (a part: {record['part']})" if record["part"] else ""
    convention = ", reference convention" if record["convention"] == "reference" else ""
    lines = [
        f"MMLU, {record['num_fewshot']}-shot{convention}{part}: {record['model']}",
        line("accuracy, micro (over questions)", scores["micro"]),
        line("accuracy, macro (over subjects)", scores["macro"], "subjects"),
        *(line(f"  {group}", one) for group, one in scores["groups"].items()),
        *(line(f"    {subject}", one) for subject, one in scores["subjects"].items()),
        "+- is one standard error; where all or none are right, brackets are a 95 % interval",
    ]
    if question := record["question_text"]:
        lines.append(
            f"{'perplexity of the questions':40} {question['perplexity']:.2f}  ({question['tokens']:,} tokens; "
            f"mean over subjects {question['macro_perplexity']:.2f})"
        )
        if question["questions"] < scores["micro"]["count"]:
            lines.append(f"  of {question['questions']:,} questions; the other prompts are longer than the model's window")
    elif record["question_text_missing"]:
        lines.append(f"perplexity of the questions: not measured ({record['question_text_missing']})")
    if text := record["text"]:
        lines.append(f"{'perplexity of ' + text['file']:40} {text['perplexity']:.2f}  ({text['tokens']:,} tokens)")
    else:
        lines.append(f"perplexity of plain text: not measured ({record['text_missing']})")
    said = record["continuation"]
    lines.append(f"{said['prompt']!r} goes on {said['text']!r}")
    tokens = record["tokens"]
    gpu = f", {record['peak_gpu_bytes'] / 1e9:.2f} GB on the GPU" if "peak_gpu_bytes" in record else ""
    lines.append(
        f"{record['time_s']:.1f} s, {record['questions_per_s']:.1f} questions/s, {tokens['tokens_run']:,} tokens run "
        f"({tokens['tokens_unshared']:,} without sharing), peak memory {record['peak_rss_bytes'] / 1e9:.2f} GB{gpu}; "
        f"{record['dtype']} on {record['device']}"
    )
    if record["not_shared_because"]:
        lines.append(f"prefixes were not shared: {record['not_shared_because']}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, options(), STOPPED)
