"""MMLU of a model: accuracy with error bars, and what it does not show: perplexity of plain text and a few written words."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _cli import UsageError, add_model_options, find_model, parser, run

from eval.errors import DataError
from eval.mmlu import NUM_TEST, SUBJECTS, question_set, read_mmlu
from merge.report import PLAN_FILE, peak_rss_bytes
from merge.runtime import DTYPES

EXAMPLES = """\
  python scripts/eval_mmlu.py --model merged/Meta-Llama-3-8B-base --data-dir DIR --text wiki.test.raw
  python scripts/eval_mmlu.py --model DIR --subjects anatomy,virology --limit 20
  python scripts/compare.py results/Meta-Llama-3-8B.json results/Meta-Llama-3-8B-base.json"""
PROMPT = "The capital of France is"


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    add_model_options(result, "none")
    data = result.add_argument_group("questions")
    data.add_argument("--data-dir", type=Path, metavar="DIR", help="dev/ and test/ CSVs, or parquet (default: the Hub)")
    data.add_argument("--subjects", metavar="A,B,...", help="default: all 57")
    data.add_argument("--limit", type=int, metavar="N", help="questions per subject")
    data.add_argument("--num-fewshot", type=int, default=5, metavar="K", help="examples before each question (default: 5)")
    data.add_argument("--text", type=Path, metavar="FILE", help="plain text to measure perplexity on")
    data.add_argument("--text-tokens", type=int, default=20_480, metavar="N", help="at most so many of it (default: 20480)")
    how = result.add_argument_group("model run")
    how.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, else as stored (default)")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    how.add_argument("--batch-size", default="auto", metavar="N", help="tokens per call; auto: by device (default)")
    result.add_argument("--out", type=Path, metavar="FILE", help="results file (default: results/MODEL.json)")
    result.add_argument("--resume", action="store_true", help="keep the subjects that an interrupted run has finished")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Evaluates and prints."""
    if not arguments.model:
        raise UsageError("give --model")
    if arguments.batch_size != "auto" and not arguments.batch_size.isdecimal():
        raise UsageError(f"--batch-size is {arguments.batch_size!r}, expected a number of tokens or auto")
    source = find_model(arguments.model, arguments)
    source.checkpoint()  # a partial or damaged folder is refused before anything is loaded
    subjects = read_mmlu(arguments.data_dir, arguments.subjects.split(",") if arguments.subjects else ())
    text = _text(arguments.text)

    # torch, transformers and lm-eval take seconds to import: only now, when the input is known to be good.
    from eval.results import summary, write_results
    from eval.run import ask, choose_device, continuation, load_model, task_version, text_perplexity

    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR if not arguments.verbose else logging.INFO)
    device, reason = choose_device(arguments.device)
    lm = load_model(
        source.folder, device, arguments.dtype, None if arguments.batch_size == "auto" else int(arguments.batch_size)
    )
    logging.info("device %s (%s), %s, %d tokens per call", device, reason, lm.model.dtype, lm.pack_tokens)

    out = arguments.out or Path("results") / f"{source.name}.json"
    settings = {
        "task": "mmlu",
        "task_version": task_version(subjects[0].name),
        "question_set": question_set(subjects),
        "num_fewshot": arguments.num_fewshot,
        "limit": arguments.limit,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
    }
    progress = _Progress(out, {"model": source.spec, **settings}, arguments.resume)
    started = time.perf_counter()
    missing = [subject for subject in subjects if subject.name not in progress.finished]
    ask(lm, missing, arguments.num_fewshot, arguments.limit, progress.add, disable_bar=True if arguments.quiet else None)
    seconds = time.perf_counter() - started
    answers = [answer for subject in subjects for answer in progress.finished[subject.name]]
    plan = source.folder / PLAN_FILE
    record: dict[str, Any] = {
        "model": source.spec,
        "plan": json.loads(plan.read_text()) if plan.is_file() else None,
        **settings,
        "device": device,
        "scores": summary(answers),
        "text": asdict(text_perplexity(lm, text, max_tokens=arguments.text_tokens)) | {"file": arguments.text.name}
        if text
        else None,
        "continuation": {"prompt": PROMPT, "text": continuation(lm, PROMPT)},
        "time_s": round(seconds, 2),
        "questions_per_s": round(sum(len(progress.finished[s.name]) for s in missing) / max(seconds, 1e-9), 2),
        "tokens": asdict(lm.work),
        "prefixes_shared": lm.not_shared_because is None,
        "not_shared_because": lm.not_shared_because,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    write_results(out, record, answers)
    progress.remove()
    print(_table(record, len(answers)))
    print(json.dumps({"results": str(out), "micro": record["scores"]["micro"], "macro": record["scores"]["macro"]}))


class _Progress:
    """Finished subjects of a run that is under way, on disk after each, under the settings that they were asked with."""

    def __init__(self, out: Path, settings: dict[str, Any], resume: bool) -> None:
        from eval.results import Answer

        self.path = out.with_suffix(".progress.jsonl")
        self.finished: dict[str, list[Any]] = {}
        header = json.dumps(settings, sort_keys=True)
        lines = self.path.read_text().splitlines() if resume and self.path.is_file() else []
        if lines and lines[0] == header:
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                except ValueError:
                    break  # the line that was being written
                found = [Answer(**answer | {"logprobs": tuple(answer["logprobs"])}) for answer in entry["answers"]]
                self.finished[entry["subject"]] = found
        elif lines:
            raise DataError(f"{self.path} is of a run with other options; run without --resume, or with the same options")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(header + "\n")
        for subject, answers in self.finished.items():
            self._append(subject, answers)

    def add(self, subject: str, answers: list[Any]) -> None:
        self.finished[subject] = answers
        self._append(subject, answers)

    def _append(self, subject: str, answers: list[Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"subject": subject, "answers": [asdict(answer) for answer in answers]}) + "\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error


def _table(record: dict[str, Any], count: int) -> str:
    scores = record["scores"]

    def line(name: str, one: dict[str, Any], unit: str = "questions") -> str:
        error = f"{one['stderr']:.4f}" if one["stderr"] is not None else "   ?  "
        return f"{name:40} {one['acc']:.4f} +- {error}  {one['count']:>6,} {unit}"

    whole = (
        ""
        if count == NUM_TEST
        else f" (a part: {count:,} of {NUM_TEST:,} questions, {len(scores['subjects'])} of {len(SUBJECTS)} subjects)"
    )
    lines = [
        f"MMLU, {record['num_fewshot']}-shot{whole}: {record['model']}",
        line("accuracy, micro (over questions)", scores["micro"]),
        line("accuracy, macro (over subjects)", scores["macro"], "subjects"),
        *(line(f"  {group}", one) for group, one in scores["groups"].items()),
        *(line(f"    {subject}", one) for subject, one in scores["subjects"].items()),
    ]
    if record["text"]:
        text = record["text"]
        lines.append(f"{'perplexity of ' + text['file']:40} {text['perplexity']:.2f}  ({text['tokens']:,} tokens)")
    said = record["continuation"]
    lines.append(f"{said['prompt']!r} goes on {said['text']!r}")
    tokens = record["tokens"]
    lines.append(
        f"{record['time_s']:.1f} s, {record['questions_per_s']:.1f} questions/s, {tokens['tokens_run']:,} tokens run "
        f"({tokens['tokens_unshared']:,} without sharing), peak memory {record['peak_rss_bytes'] / 1e9:.2f} GB"
    )
    if record["not_shared_because"]:
        lines.append(f"prefixes were not shared: {record['not_shared_because']}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, options())
