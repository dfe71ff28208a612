"""MMLU of a model: accuracy with error bars, and what it does not show: perplexity of plain text and a few written words."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import hashlib
import json
import logging
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

from eval.errors import DataError
from eval.mmlu import CONVENTIONS, partial, question_set, read_mmlu

EXAMPLES = """\
  python scripts/eval_mmlu.py --model merged/Meta-Llama-3-8B-base --data-dir DIR --text wiki.test.raw
  python scripts/eval_mmlu.py --model DIR --subjects anatomy,virology --limit 20
  accelerate launch --num_processes 4 scripts/eval_mmlu.py --model DIR
  python scripts/compare.py results/Meta-Llama-3-8B.json results/Meta-Llama-3-8B-base.json"""
PROMPT = "The capital of France is"
CHOICES = 4  # requests for each question
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
    check_out(arguments, out, out.with_name(out.name.removesuffix(".json") + ".parquet"))
    progress = _Progress(out)
    progress.check(arguments)
    subjects = read_mmlu(arguments.data_dir, arguments.subjects.split(",") if arguments.subjects else ())
    if arguments.limit and arguments.limit >= max(len(subject.test) for subject in subjects):
        arguments.limit = None  # it limits nothing, and results are compared by it
    part = partial(subjects, arguments.limit)
    if part and not (arguments.limit or arguments.subjects):
        logging.warning("this is not all of MMLU: %s", part)

    # torch, transformers and lm-eval take seconds to import: only now, when the input is known to be good.
    from eval.results import question_text, summary, write_results
    from eval.run import ask, continuation, first_tokens, plain_text, task_version, text_perplexity, total_work

    text: str | None = None
    text_missing: str | None = None
    try:
        text = plain_text(arguments.text)
    except DataError as error:
        if arguments.text:
            raise
        text_missing = str(error)
        logging.warning("perplexity of plain text will be missing: %s", error)
    reference = arguments.compat == "reference"
    lm, placement = load(arguments, source, letters_apart=reference, add_bos_token=False if reference else None)
    if text is not None:
        first_tokens(lm, text, arguments.text_tokens)  # too short a text is found before, not after, the questions

    settings = {
        "task": "mmlu",
        "task_version": task_version(subjects[0].name),
        "convention": arguments.compat,
        "question_set": question_set(subjects),
        "num_fewshot": arguments.num_fewshot,
        "limit": arguments.limit,
        "dtype": placement.dtype,
    }
    files = sorted((path.name, path.stat().st_mtime_ns) for path in source.folder.iterdir() if path.is_file())
    key = {"model": source.spec, "files": files, **settings, "question_text": not arguments.no_question_text}
    progress.read(key, arguments.resume)
    lm.barrier()  # the others have read what was finished before the first one writes
    if lm.rank == 0:
        progress.start()
    missing = [subject for subject in subjects if subject.name not in progress.finished]
    count = sum(min(len(subject.test), arguments.limit or len(subject.test)) for subject in missing)
    started = time.perf_counter()
    with counter("MMLU", "question", count, arguments.quiet or lm.rank != 0) as bar:
        ask(
            lm,
            missing,
            arguments.num_fewshot,
            arguments.limit,
            convention=arguments.compat,
            question_text=not arguments.no_question_text,
            done=progress.add,
            answered=lambda requests: bar.update(requests * lm.world_size / CHOICES),
        )
    seconds = time.perf_counter() - started
    work = total_work(lm)

    def finish() -> None:
        answers = [answer for subject in subjects for answer in progress.finished[subject.name]]
        measured = asdict(text_perplexity(lm, text, max_tokens=arguments.text_tokens)) if text is not None else None
        record: dict[str, Any] = {
            "model": source.spec,
            "plan": plan_beside(source),
            **settings,
            "part": part,
            "device": placement.device,
            "processes": lm.world_size,
            "scores": summary(answers),
            "question_text": (questions := question_text(answers)),
            "question_text_missing": None if questions else _why_no_question_text(arguments),
            "text": measured
            and measured
            | {
                "file": arguments.text.name if arguments.text else "wikitext-2 (test)",
                "sha256": hashlib.sha256((text or "").encode()).hexdigest(),
                "vocabulary": len(lm.tokenizer),
            },
            "text_missing": text_missing,
            "continuation": {"prompt": PROMPT, "text": continuation(lm, PROMPT)},
            "time_s": round(seconds, 2),
            "questions_per_s": round(count / max(seconds, 1e-9), 2),
            "tokens": asdict(work),
            "prefixes_shared": lm.not_shared_because is None,
            "not_shared_because": lm.not_shared_because,
            **peak_memory(lm),
        }
        write_results(out, record, answers)
        progress.remove()
        print(_table(record))
        print(json.dumps({"results": str(out), "micro": record["scores"]["micro"], "macro": record["scores"]["macro"]}))

    end_together(lm, finish)


class _Progress:
    """Finished subjects of a run that is under way, on disk after each, under the settings that they were asked with."""

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(out.name.removesuffix(".json") + ".progress.jsonl")
        self.header = ""
        self.finished: dict[str, list[Any]] = {}

    def check(self, arguments: argparse.Namespace) -> None:
        """Refuses to lose an interrupted run that nobody asked to lose."""
        if self.path.exists() and not (arguments.resume or arguments.overwrite):
            raise UsageError(f"{self.path} holds finished subjects of an interrupted run; give --resume, or --overwrite")

    def read(self, settings: dict[str, Any], resume: bool) -> None:
        """Takes over what was finished under the same settings."""
        from eval.results import Answer

        self.header = json.dumps(settings, sort_keys=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if resume and self.path.is_file() else []
        if lines and lines[0] != self.header:
            raise DataError(f"{self.path} is of a run with other options or another model; run with --overwrite to begin again")
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                found = [Answer(**answer | {"logprobs": tuple(answer["logprobs"])}) for answer in entry["answers"]]
                self.finished[str(entry["subject"])] = found
            except (ValueError, KeyError, TypeError):
                break  # the line that was being written

    def start(self) -> None:
        """Writes what was finished, without a line that was being written when the earlier run stopped."""
        from merge.publish import write_whole

        write_whole(self.path, "\n".join([self.header, *map(self._line, self.finished)]) + "\n")

    def add(self, subject: str, answers: list[Any]) -> None:
        """Keeps the answers of a finished subject."""
        self.finished[subject] = answers
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(subject) + "\n")

    def remove(self) -> None:
        """The results are written; nothing is under way any more."""
        self.path.unlink(missing_ok=True)

    def _line(self, subject: str) -> str:
        return json.dumps({"subject": subject, "answers": [asdict(answer) for answer in self.finished[subject]]})


def _why_no_question_text(arguments: argparse.Namespace) -> str:
    return "not asked for" if arguments.no_question_text else "the prompts are longer than the model's window"


def _table(record: dict[str, Any]) -> str:
    scores = record["scores"]

    def line(name: str, one: dict[str, Any], unit: str = "questions") -> str:
        error = f"{one['stderr']:.4f}" if one["stderr"] is not None else "   ?  "
        return f"{name:40} {one['acc']:.4f} +- {error}  {one['count']:>6,} {unit}"

    part = f" (a part: {record['part']})" if record["part"] else ""
    convention = ", reference convention" if record["convention"] == "reference" else ""
    lines = [
        f"MMLU, {record['num_fewshot']}-shot{convention}{part}: {record['model']}",
        line("accuracy, micro (over questions)", scores["micro"]),
        line("accuracy, macro (over subjects)", scores["macro"], "subjects"),
        *(line(f"  {group}", one) for group, one in scores["groups"].items()),
        *(line(f"    {subject}", one) for subject, one in scores["subjects"].items()),
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
