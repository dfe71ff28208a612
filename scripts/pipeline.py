# PYTHON_ARGCOMPLETE_OK
"""A whole study: merges and their controls made, verified, measured and compared, with a report that says what came out.

Beside every merge stand the same number of layers dropped from the top, dropped greedily, and averaged. A study that was
stopped goes on with --resume: what is done and whose inputs are unchanged is not done again.
"""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from _cli import CONFIGS, UsageError, add_model_options, parser, relative, run
from _progress import bars
from _scoring import check_run

from eval.pipeline.settings import CONTROLS, PARTS, absolute, make_settings, merged, read_settings
from merge.runtime import DTYPES

EXAMPLES = """\
  python scripts/pipeline.py --model M --alphas alphas/*.json --data-dir DIR --text wiki.test.raw --out runs/study
  python scripts/pipeline.py --config configs/study.yaml --resume
  python scripts/pipeline.py --model M --alphas a.json found/plan.json --data-dir DIR --limit 20 --skip speed,cloze"""
STOPPED = "stopped; finished parts are kept: the same command with --resume goes on"


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    result.add_argument("--config", type=Path, metavar="FILE", help="a study as YAML; options given beside it come first")
    add_model_options(result, "what the config names")
    what = result.add_argument_group("what is compared")
    what.add_argument(
        "--alphas", "--plan", nargs="+", metavar="FILE", dest="merges", help="alphas files and plans, one merge each"
    )
    what.add_argument("--controls", metavar="A,B,...", help=f"at each merge's depth (default: all of {','.join(CONTROLS)})")
    data = result.add_argument_group("what is measured")
    data.add_argument("--skip", metavar="A,B,...", help=f"measurements to leave out, of {','.join(PARTS)}")
    data.add_argument("--data-dir", metavar="DIR", help="MMLU: dev/ and test/ CSVs, or parquet (default: the Hub)")
    data.add_argument("--subjects", metavar="A,B,...", help="default: all 57")
    data.add_argument("--limit", type=int, metavar="N", help="questions per subject")
    data.add_argument("--num-fewshot", type=int, metavar="K", help="examples before each question (default: 5)")
    data.add_argument(
        "--text", metavar="FILE", help="plain text for perplexity (default: WikiText-2's test split from the Hub)"
    )
    data.add_argument("--text-tokens", type=int, metavar="N", help="measure only its first N tokens")
    data.add_argument(
        "--choose-tokens", type=int, metavar="N",
        help="its last N tokens choose what drop-greedy removes, and are not measured (default: 4096)",
    )  # fmt: skip
    data.add_argument("--cloze", metavar="FILE", help="LAMBADA, as parquet or JSON lines with a column text (default: the Hub)")
    data.add_argument("--cloze-limit", type=int, metavar="N", help="passages")
    how = result.add_argument_group("model run")
    how.add_argument("--dtype", choices=DTYPES, help="auto: bfloat16 on a GPU, else as stored (default)")
    how.add_argument("--device", help="auto, cpu, cuda, cuda:1 (default: auto)")
    how.add_argument("--batch-size", metavar="N", help="prompts per call; auto: as many as fit (default)")
    out = result.add_argument_group("output")
    out.add_argument("--out", type=Path, metavar="DIR", help="the study's folder (default: runs/MODEL-NAME)")
    out.add_argument("--resume", action="store_true", help="go on with the study in --out")
    out.add_argument("--keep-checkpoints", choices=("yes", "no"), help="no: only plans and results stay (default: yes)")
    out.add_argument("--no-report", action="store_true", help="write no report.html")
    return result


def main(arguments: argparse.Namespace) -> int:
    """Runs a study and prints its table."""
    content = read_settings(arguments.config) if arguments.config else {}
    out = arguments.out or (Path(content.pop("out")) if isinstance(content.get("out"), str) else None)
    content.pop("out", None)
    content = merged(content, _given(arguments))
    if not content.get("model"):
        raise UsageError(
            f"{arguments.config} names no model; give --model" if arguments.config else "give --model, or --config"
        )
    if not content.get("merges"):
        named = f"{arguments.config} names no merges; give --alphas FILE [FILE ...]"
        raise UsageError(named if arguments.config else "give --alphas FILE [FILE ...], or --config")
    name = str(arguments.config) if arguments.config else "the command line"
    settings = absolute(make_settings(content, name), name)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a study runs in one process; start it without accelerate launch or torchrun")
    arguments.batch_size = settings.batch_size
    check_run(arguments)
    out = out or Path("runs") / Path(settings.model.rstrip("/")).name.replace(":", "-")

    # torch, transformers and lm-eval take seconds to import: only now, when the input is known to be good.
    from eval.pipeline.report import text_table, write_report
    from eval.pipeline.run import run_study
    from eval.pipeline.summary import answer, read_study, verdicts
    from merge.errors import ModelNotFoundError
    from merge.publish import write_whole

    command = f"python scripts/pipeline.py {shlex.join(sys.argv[1:])}"
    try:
        failed = run_study(settings, out, configs=CONFIGS, resume=arguments.resume, command=command, bars=bars(arguments.quiet))
    except ModelNotFoundError as error:
        if arguments.model:
            raise
        raise ModelNotFoundError(f"{arguments.config}: {error}") from error
    study = read_study(out)
    write_whole(out / "table.txt", text_table(study) + "\n")
    print(text_table(study))
    print("\n".join(answer(study, verdicts(study))))
    if not arguments.no_report:
        write_report(study)
        logging.info("%s", relative(out / "report.html"))
    report = None if arguments.no_report else str(out / "report.html")
    print(json.dumps({"out": str(out), "models": len(study.models), "failed": len(failed), "report": report}))
    return 1 if failed else 0


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as a study's file has them; None for what was not given."""

    def several(text: str | None) -> list[str] | None:
        return None if text is None else [one for one in text.split(",") if one]

    return {
        "model": arguments.model, "revision": arguments.revision, "merges": arguments.merges,
        "controls": several(arguments.controls), "skip": several(arguments.skip),
        "dtype": arguments.dtype, "device": arguments.device, "batch_size": arguments.batch_size,
        "keep_checkpoints": None if arguments.keep_checkpoints is None else arguments.keep_checkpoints == "yes",
        "mmlu": {
            "data_dir": arguments.data_dir, "subjects": several(arguments.subjects), "limit": arguments.limit,
            "num_fewshot": arguments.num_fewshot,
        },
        "text": {"file": arguments.text, "tokens": arguments.text_tokens, "choose_tokens": arguments.choose_tokens},
        "cloze": {"file": arguments.cloze, "limit": arguments.cloze_limit},
    }  # fmt: skip


if __name__ == "__main__":
    run(main, options(), STOPPED)
