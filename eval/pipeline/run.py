"""Carries a study out: every model made, verified and measured, part by part, each kept on disk as soon as it is done.

    OUT/study.json                what the study is, on what machine, with which versions
    OUT/greedy.json               which layers greedy removal takes, and what the model loses without each
    OUT/ARM/plan.json             the merge
    OUT/ARM/checkpoint/           the merged model, unless checkpoints are not kept
    OUT/ARM/results.json          everything measured; scripts/compare.py reads it
    OUT/ARM/samples.parquet       every answer
    OUT/ARM/log.txt               what was done when
    OUT/ARM/parts/                finished parts, each with the inputs that it is true for
    OUT/report.html               `report.write_report`

A part is done again only if one of its inputs has changed: the model's files, the plan, the settings of the part, the data,
dtype and device, or the version of a library.
"""

import functools
import gc
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256 as sha256_of
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from merge.api import Options, blueprint_for, merge_checkpoint
from merge.blueprint import count_parameters
from merge.errors import MergeError, OutputError
from merge.plan import Plan, plan_to_dict
from merge.publish import check_target, work_folder, write_whole
from merge.records import read_json
from merge.report import machine, versions
from merge.runtime import Placement, place_model
from merge.source import Source, resolve
from merge.verify import verify_folder

from ..bars import Bar, Bars, no_bars
from ..errors import DataError, EvalError
from ..evaluation import CHOICES
from ..lm import PrefixLM
from ..load import load_model, stored_dtype
from ..mmlu import Subject, num_questions, partial, question_set, read_mmlu
from ..progress import Progress
from ..results import Answer, question_text, summary, write_results
from ..run import TEXT_WINDOW, ask, first_tokens, plain_text, task_version
from ..search import Removal, greedy_removal
from ..trial import Tail
from . import parts
from .arms import ORIGINAL, Arm, make_arms, read_merges
from .settings import PARTS, Settings

log = logging.getLogger(__name__)

STUDY, GREEDY, RESULTS, LOG, CHECKPOINT = "study.json", "greedy.json", "results.json", "log.txt", "checkpoint"
SCHEMA_VERSION = 1
FEW_WINDOWS = 5  # fewer windows of text hardly tell two models apart
HASHED_BYTES = 50_000_000  # files up to this size are known by their content, larger ones by header, size and time of change


@dataclass
class Data:
    """What is asked and read; `missing` says of a measurement why it cannot be made."""

    subjects: list[Subject] = field(default_factory=list)
    text: str | None = None
    passages: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


class Kept:
    """Finished parts of an arm on disk, each with its inputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the part gave, if it was done with these very inputs; says why it was not, where it was done at all."""
        if (entry := self._read(name)) is None:
            return None
        known, wanted = entry["inputs"], json.loads(json.dumps(inputs))
        if known != wanted:
            changed = sorted(key for key in {*known, *wanted} if known.get(key) != wanted.get(key))
            log.warning("%s is done again: %s changed", self.folder / name, ", ".join(changed))
            return None
        return dict(entry["value"])

    def has(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether the part was done with these very inputs."""
        entry = self._read(name)
        return entry is not None and bool(entry["inputs"] == json.loads(json.dumps(inputs)))

    def put(self, name: str, inputs: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        """Keeps what a part gave."""
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = {"schema_version": SCHEMA_VERSION, "inputs": inputs, "value": value}
        write_whole(self.folder / f"{name}.json", json.dumps(entry) + "\n")

    def _read(self, name: str) -> dict[str, Any] | None:
        """A part with its inputs, where there is one that can be read."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        try:
            entry = read_json(path)
        except MergeError:
            entry = None
        if not (isinstance(entry, dict) and isinstance(entry.get("inputs"), dict) and isinstance(entry.get("value"), dict)):
            log.warning("%s cannot be read; %s is done again", path, name)
            return None
        return entry


def run_study(
    settings: Settings,
    out: Path,
    *,
    configs: Path | None = None,
    resume: bool = False,
    command: str = "",
    bars: Bars = no_bars,
) -> dict[str, str]:
    """Carries out a study in the folder `out`; arm -> why it failed, for those that did.

    Args:
        configs: the folder of tiny models, as for `merge.resolve`.
        resume: go on with the study that is in `out`.
        command: the command line, for the report.
        bars: makes progress bars.

    Raises:
        MergeError, EvalError: the model, a merge, the data or the folder cannot be used; nothing was measured.
    """
    source = resolve(settings.model, revision=settings.revision, configs=configs)
    checkpoint = source.checkpoint()
    merges, left_out = read_merges(settings.merges, checkpoint.num_hidden_layers)
    for file, why in left_out.items():
        log.warning("%s is left out: %s", file, why)
    for arm in merges:
        assert arm.plan is not None
        blueprint_for(arm.plan, source)
    data = read_data(settings)
    _check_out(out, resume)
    with work_folder(out):
        return _Run(settings, out, source, data, command, bars, left_out).run(merges)


def read_data(settings: Settings) -> Data:
    """The questions and texts of a study; what is not named is looked for on the Hub, and may be missing.

    Raises:
        DataError: a file that is named cannot be read.
    """
    found = Data(missing=dict.fromkeys(settings.skip, "skipped"))

    def have(part: str, named: bool, read: Callable[[], None]) -> None:
        if part in settings.skip:
            return
        try:
            read()
        except DataError as error:
            if named:
                raise
            log.warning("%s will be missing: %s", part, error)
            found.missing[part] = str(error)

    def mmlu() -> None:
        folder = settings.mmlu.data_dir
        found.subjects = read_mmlu(Path(folder) if folder else None, settings.mmlu.subjects)

    def text() -> None:
        found.text = plain_text(Path(settings.text.file) if settings.text.file else None)

    def cloze() -> None:
        found.passages = parts.read_cloze(settings.cloze)

    have("mmlu", settings.mmlu.data_dir is not None, mmlu)
    have("text", settings.text.file is not None, text)
    have("cloze", settings.cloze.file is not None, cloze)
    if set(found.missing) >= set(PARTS) - {"generation", "speed"} and not set(PARTS) - set(found.missing):
        raise DataError("nothing can be measured; give --data-dir, --text or --cloze")
    return found


def _check_out(out: Path, resume: bool) -> None:
    """Raises OutputError unless a study may be begun, or gone on with, in this folder."""
    check_target(out, overwrite=True)
    begun = (out / STUDY).is_file()
    if begun and not resume:
        raise OutputError(f"{out} holds a study; go on with it by --resume, or choose another --out")
    before_it = {GREEDY, f"{GREEDY}.partial", f"{STUDY}.partial"}  # of a run that was stopped before its study was written
    if not begun and out.exists() and {path.name for path in out.iterdir()} - before_it:
        what = "so there is no study to go on with" if resume else "but other files"
        raise OutputError(f"{out} holds no {STUDY}, {what}; choose another --out")


class _Run:
    """One pass over a study."""

    def __init__(
        self,
        settings: Settings,
        out: Path,
        source: Source,
        data: Data,
        command: str,
        bars: Bars,
        left_out: Mapping[str, str],
    ) -> None:
        self.settings, self.out, self.source, self.data, self.command, self.bars = settings, out, source, data, command, bars
        self.left_out = dict(left_out)
        checkpoint = source.checkpoint()
        self.parameters = count_parameters(checkpoint.tensors, checkpoint.config)
        self.placement = place_model(
            settings.device, settings.dtype, num_parameters=self.parameters, stored=stored_dtype(checkpoint.tensors.values())
        )
        self.base = {
            "model": identity(source),
            "versions": versions() | {name: version(name) for name in ("lm_eval", "datasets")},
        }
        self.run_in = {"dtype": self.placement.dtype, "device": _device_name(self.placement)}
        self.greedy: list[Removal] = []
        self.text_looked_at = False

    def run(self, merges: Sequence[Arm]) -> dict[str, str]:
        """Every arm in turn; the original first, since greedy removal needs it."""
        failed: dict[str, str] = {}
        layers = self.source.checkpoint().num_hidden_layers
        model = _Model(self, Arm(ORIGINAL, ORIGINAL, None))
        self._choose(merges, model)
        removed = [one.layer for one in self.greedy]
        arms = make_arms(merges, self.settings.controls, lambda count: removed[:count] if removed else None, layers)
        for arm in arms:
            kept = Kept(self.out / arm.name / "parts")
            if not all(kept.has(part, self._inputs(part, arm)) for part in self._parts(arm)):
                (self.out / arm.name / RESULTS).unlink(missing_ok=True)  # of other inputs: nothing to compare the others with
        self._write_study(arms)
        for arm in arms:
            if arm.kind != ORIGINAL:
                model = _Model(self, arm)
            try:
                with _log_to(self.out / arm.name / LOG):
                    self._arm(arm, model)
            except (MergeError, EvalError, MemoryError, RuntimeError) as error:
                if isinstance(error, OutputError):
                    raise
                failed[arm.name] = " ".join(str(error).split())[:500] or type(error).__name__
                log.error("%s failed: %s", arm.name, failed[arm.name])
            finally:
                model.free()
        self._write_study(arms, failed, finished=True)
        return failed

    def _choose(self, merges: Sequence[Arm], model: "_Model") -> None:
        """Greedy removal as deep as the deepest merge; every step is kept."""
        layers = self.source.checkpoint().num_hidden_layers
        deepest = max((layers - len(arm.plan.rows) for arm in merges if arm.plan), default=0)
        if "drop-greedy" not in self.settings.controls or self.data.text is None or deepest < 1:
            return
        inputs = {**self.base, **self.run_in, "text": self._text_inputs(), "layers": deepest}
        kept = Kept(self.out)

        def keep(removed: list[Removal]) -> None:
            kept.put("greedy", inputs, {"removed": [[one.layer, one.nll, sorted(one.tried.items())] for one in removed]})

        found = kept.get("greedy", inputs) or {"removed": []}
        self.greedy = [Removal(layer, nll, {int(k): v for k, v in tried}) for layer, nll, tried in found["removed"]]
        if len(self.greedy) < deepest:
            lm = model.load()
            _, text = parts.split_text(lm, self.data.text, self.settings.text)
            windows = [text[i : i + TEXT_WINDOW] for i in range(0, len(text), TEXT_WINDOW)]
            trials = sum(layers - step for step in range(len(self.greedy), deepest))
            with self.bars("choosing layers to drop", "trial", trials) as bar:
                windows = [one for one in windows if len(one) > 1]
                self.greedy = greedy_removal(Tail(lm), windows, deepest, bar.update, begun=self.greedy, chosen=keep)

    def warn_of_short_text(self, lm: PrefixLM) -> None:
        """Said once, before anything is measured: the first model that is loaded brings the tokenizer that counts."""
        how, window = self.settings.text, min(TEXT_WINDOW, lm.max_length)
        if self.text_looked_at or self.data.text is None:
            return
        self.text_looked_at = True
        there = len(first_tokens(lm, self.data.text, FEW_WINDOWS * window + how.choose_tokens)) - how.choose_tokens
        windows = -(-(min(there, how.tokens or there) - 1) // window)  # one token alone predicts nothing
        if 0 < windows < FEW_WINDOWS:
            log.warning(
                "the text to measure is %d window%s of %d tokens: too little to compare models by; give a longer --text",
                windows, "s" * (windows != 1), window,
            )  # fmt: skip

    def _arm(self, arm: Arm, model: "_Model") -> None:
        """Makes, verifies and measures one model, and writes its results."""
        folder = self.out / arm.name
        kept = Kept(folder / "parts")
        values: dict[str, Any] = {}
        if arm.plan is not None:
            write_whole(folder / "plan.json", json.dumps(plan_to_dict(arm.plan), indent=2) + "\n")
        answers: list[Answer] = []
        for part in self._parts(arm):
            inputs = self._inputs(part, arm)
            if part == "mmlu":
                values[part], answers = self._mmlu(kept, inputs, arm, model)
                continue
            found = kept.get(part, inputs)
            if part == "merge" and found is not None and self.settings.keep_checkpoints and not model.made():
                found = None
            if found is None:
                found = self._timed(part, arm, functools.partial(self._measure, part, arm, model))
                kept.put(part, inputs, found)
            else:
                log.info("%s: %s is done already", arm.name, part)
            values[part] = found
        self._write_results(arm, values, answers)
        if arm.plan is not None and not self.settings.keep_checkpoints:
            model.free()
            shutil.rmtree(model.folder, ignore_errors=True)

    def _measure(self, part: str, arm: Arm, model: "_Model") -> dict[str, Any]:
        """One part, done now."""
        if part == "merge":
            return model.make()
        if part == "verify":
            model.make_if_missing()
            with self.bars(f"{arm.name}: verifying", "B", 0) as bar:
                return asdict(verify_folder(model.folder, self.source, _counting(bar)))
        lm = model.load()
        if part == "text":
            assert self.data.text is not None
            measured, _ = parts.split_text(lm, self.data.text, self.settings.text)
            return parts.measure_text(lm, measured)
        if part == "cloze":
            with self.bars(f"{arm.name}: cloze", "passage", len(self.data.passages)) as bar:
                return parts.measure_cloze(lm, self.data.passages, bar.update)
        if part == "generation":
            return parts.measure_generation(lm, self.settings.generation)
        with self.bars(f"{arm.name}: speed", "batch size", len(self.settings.speed.batches)) as bar:
            return parts.measure_speeds(lm, self.settings.speed, bar.update)

    def _mmlu(self, kept: Kept, inputs: dict[str, Any], arm: Arm, model: "_Model") -> tuple[dict[str, Any], list[Answer]]:
        """Answers, subject by subject; those of a run that was stopped are gone on with."""
        subjects, how = self.data.subjects, self.settings.mmlu
        path = kept.folder / "mmlu.jsonl"
        done = kept.get("mmlu", inputs)
        try:
            progress = Progress(path, inputs, resume=True)
        except DataError:
            progress = Progress(path, inputs, resume=False)
        missing = [subject for subject in subjects if subject.name not in progress.finished]
        if missing or done is None:
            lm = model.load()
            kept.folder.mkdir(parents=True, exist_ok=True)
            count = num_questions(missing, how.limit)
            with closing(progress), self.bars(f"{arm.name}: MMLU", "question", count) as bar:
                progress.start()

                def answer() -> dict[str, Any]:
                    ask(
                        lm, missing, how.num_fewshot, how.limit, done=progress.add,
                        answered=lambda requests: bar.update(requests / CHOICES),
                    )  # fmt: skip
                    return {"questions": count}

                done = self._timed("mmlu", arm, answer)
            kept.put("mmlu", inputs, done)
        else:
            log.info("%s: mmlu is done already", arm.name)
        return done, [one for subject in subjects for one in progress.finished[subject.name]]

    def _timed(self, part: str, arm: Arm, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        log.info("%s: %s", arm.name, part)
        started = time.perf_counter()
        found = make()
        seconds = round(time.perf_counter() - started, 2)
        log.info("%s: %s took %.1f s", arm.name, part, seconds)
        return {**found, "time_s": seconds}

    def _parts(self, arm: Arm) -> list[str]:
        """What is done for an arm, in order."""
        measured = [part for part in PARTS if part not in self.data.missing]
        return [*(("merge", "verify") if arm.plan else ()), *measured]

    def _inputs(self, part: str, arm: Arm) -> dict[str, Any]:
        """What a part depends on."""
        found: dict[str, Any] = {**self.base, "plan": _plan_inputs(arm.plan)}
        if part in ("merge", "verify"):
            return found
        found |= self.run_in
        settings = self.settings
        if part == "mmlu":
            questions = {"question_set": question_set(self.data.subjects), "limit": settings.mmlu.limit}
            return found | questions | {"num_fewshot": settings.mmlu.num_fewshot}
        if part == "text":
            return found | {"text": self._text_inputs()}
        if part == "cloze":
            return found | {"passages": parts.sha256(self.data.passages)}
        return found | {part: asdict(getattr(settings, part))}

    def _text_inputs(self) -> dict[str, Any]:
        how = self.settings.text
        return {"sha256": parts.sha256(self.data.text), "tokens": how.tokens, "choose_tokens": how.choose_tokens}

    def _write_results(self, arm: Arm, values: dict[str, Any], answers: list[Answer]) -> None:
        """results.json with everything measured, and the answers beside it."""
        record: dict[str, Any] = {
            "model": self.source.spec,
            "arm": arm.name,
            "plan": plan_to_dict(arm.plan) if arm.plan else None,
            "dtype": self.placement.dtype,
            "device": self.placement.device,
            "num_parameters": values["merge"]["num_parameters"] if arm.plan else self.parameters,
            "num_hidden_layers": arm.depth or self.source.checkpoint().num_hidden_layers,
            "bytes_total": values["merge"]["bytes_total"] if arm.plan else self._source_bytes(),
            "parts": values,
        }
        path = self.out / arm.name / RESULTS
        if not answers:
            write_whole(path, json.dumps({"schema_version": SCHEMA_VERSION, **record}) + "\n")
            return
        mmlu = self.settings.mmlu
        text = values.get("text")
        about = {
            "task": "mmlu",
            "task_version": task_version(self.data.subjects[0].name),
            "convention": "lm-eval",
            "question_set": question_set(self.data.subjects),
            "num_fewshot": mmlu.num_fewshot,
            "limit": mmlu.limit,
            "part": partial(self.data.subjects, mmlu.limit),
            "scores": summary(answers),
            "question_text": question_text(answers),
            "text": text and {
                "perplexity": text["perplexity"], "sha256": self._text_inputs()["sha256"],
                "window_nll": text["nll"], "window_tokens": text["tokens"],
            },
        }  # fmt: skip
        write_results(path, record | about, answers)

    def _source_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.source.folder.glob("*.safetensors"))

    def _write_study(self, arms: Sequence[Arm], failed: Mapping[str, str] | None = None, *, finished: bool = False) -> None:
        """study.json: what there is to report, also while it is under way."""
        record = {
            "schema_version": SCHEMA_VERSION,
            "settings": self.settings.to_dict(),
            "command": self.command,
            "model": self.base["model"],
            "arms": [
                {"name": arm.name, "kind": arm.kind, "depth": arm.depth, "command": arm.command, "file": arm.file}
                for arm in arms
            ],
            "num_hidden_layers": self.source.checkpoint().num_hidden_layers,
            "layers": [[layer, nll] for layer, nll in sorted(self.greedy[0].tried.items())] if self.greedy else [],
            "greedy": [[one.layer, one.nll] for one in self.greedy],
            "missing": self.data.missing,
            "left_out": self.left_out,
            "failed": dict(failed or {}),
            "finished": finished,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "run_in": self.run_in,
            "versions": self.base["versions"],
            **machine(),
        }
        write_whole(self.out / STUDY, json.dumps(record, indent=2) + "\n")


class _Model:
    """The model of an arm: made when it is needed, loaded when it is measured."""

    def __init__(self, run: _Run, arm: Arm) -> None:
        self.run, self.arm = run, arm
        self.folder = run.source.folder if arm.plan is None else run.out / arm.name / CHECKPOINT
        self.lm: PrefixLM | None = None

    def made(self) -> bool:
        """Whether the checkpoint is there."""
        return self.folder.is_dir()

    def make(self) -> dict[str, Any]:
        """Writes the checkpoint."""
        assert self.arm.plan is not None
        with self.run.bars(f"{self.arm.name}: merging", "B", 0) as bar:
            report = merge_checkpoint(
                self.arm.plan, self.run.source, self.folder, Options(overwrite=True), command=self.arm.command,
                progress=_counting(bar),
            )  # fmt: skip
        return asdict(report)

    def make_if_missing(self) -> None:
        """Writes the checkpoint again where it was not kept."""
        if not self.made():
            self.make()

    def load(self) -> PrefixLM:
        """The model, ready to be measured."""
        if self.lm is None:
            self.make_if_missing()
            source = self.run.source if self.arm.plan is None else resolve(str(self.folder))
            settings = self.run.settings
            self.lm, _ = load_model(
                source.checkpoint(), settings.device, self.run.placement.dtype, batch_size=settings.batch_size
            )
            self.run.warn_of_short_text(self.lm)
        return self.lm

    def free(self) -> None:
        """Gives the memory back."""
        if self.lm is not None:
            self.lm = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _counting(bar: Bar) -> Callable[[int], Callable[[int], None]]:
    """Shows bytes, whose number is said when the work begins."""

    def start(total: int) -> Callable[[int], None]:
        bar.reset(total)

        def advance(done: int) -> None:
            bar.update(done)

        return advance

    return start


def identity(source: Source) -> dict[str, Any]:
    """What a model is known by: name, revision, and of every file its content, or its header, size and time of change."""
    headers = {file.name: file.header_sha256 for file in source.checkpoint().files}
    files = {}
    for path in sorted(source.folder.iterdir()):
        if not path.is_file():
            continue
        state = path.stat()
        if state.st_size <= HASHED_BYTES:
            files[path.name] = sha256_of(path.read_bytes()).hexdigest()[:16]
        else:
            files[path.name] = f"{headers.get(path.name, '')[:16]} {state.st_size} {state.st_mtime_ns}"
    return {"spec": source.spec, "model": source.model, "revision": source.revision, "files": files}


def _plan_inputs(plan: Plan | None) -> dict[str, Any] | None:
    """A plan without its name, which changes nothing."""
    if plan is None:
        return None
    return {key: value for key, value in plan_to_dict(plan).items() if key not in ("name", "model", "revision")}


def _device_name(placement: Placement) -> str:
    """The kind of device; for a GPU its model, since speeds are of one."""
    device = torch.device(placement.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def _log_to(path: Path) -> Any:
    """Inside, what is done is also written to a file, with times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("eval", "merge")]
    levels = [one.level for one in loggers]
    quiet = [handler.level for handler in logging.getLogger().handlers]
    shown = logging.getLogger().level
    for other in logging.getLogger().handlers:  # the screen shows what it showed before
        other.setLevel(max(other.level, shown))
    for one in loggers:
        one.setLevel(logging.INFO)
        one.addHandler(handler)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
            one.removeHandler(handler)
        for other, level in zip(logging.getLogger().handlers, quiet, strict=True):
            other.setLevel(level)
        with suppress(OSError):  # every line was flushed; what could not be was an error
            handler.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Ends the study; logging would print a traceback for every line and go on."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        raise OutputError(f"{self.baseFilename} cannot be written: {error.strerror or error}") from error
