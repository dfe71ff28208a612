"""Which way of fusing helps, and whether it is the donor that helps: every arm trained alike, beside the controls.

    arms       modes of fusion: new fusers on the same backbones, the same blocks in the same order
    controls   of one mode: the donor's states zeroed; another row's; those of a donor with random weights; and low-rank
               adapters of about as many parameters on the host alone. What these gain, training gains, not the donor
    measured   bits per byte of held-out documents by domain, document by document, and MMLU question by question; tokens per
               second of scoring and of generation; peak memory

A gain is claimed only where an arm is better than its host and than every control, each by an interval that excludes zero.
"""

import hashlib
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from merge.fusion import FusionConfig, FusionForCausalLM
from merge.fusion.assemble import Parts, make_parts, new_fusers, read_tokenizer
from merge.fusion.configuration_fusion import with_defaults
from merge.fusion.features import Store, compute, from_entry, run_host
from merge.fusion.fusers import MODES
from merge.fusion.make import assemble, check_finite, load_fused
from merge.fusion.mixers import MODES as MIXERS
from merge.fusion.recipe import Recipe, Training
from merge.fusion.text import read_documents, token_blocks
from merge.fusion.train import Trained, train
from merge.publish import work_folder, write_whole
from merge.records import Fields, read_json, read_yaml
from merge.runtime import training_device
from merge.source import resolve

from .bars import Bars, no_bars
from .bits import Bits, cut, difference, measure, pieces
from .errors import EvalError, short
from .lm import PrefixLM
from .lora import LoraHost
from .memory import PeakMemory, weight_bytes
from .mmlu import Subject, read_mmlu
from .run import ask
from .stats import Mean

log = logging.getLogger(__name__)

CONTROLS = ("zero", "shuffle", "random-donor", "lora")
HOST = "host"
MMLU = "mmlu"
RESULTS_FILE, SCHEMA_VERSION = "results.json", 1
MAX_RESULTS = 1 << 30  # bytes: every document's bits of every row
PROMPT, GENERATED = 32, 24  # tokens read and generated to measure the speed of generation


@dataclass(frozen=True)
class Mmlu:
    """Which questions: a folder of MMLU's files, or none for the Hub's; `limit` of every subject."""

    data_dir: str | None = None
    subjects: tuple[str, ...] = ()
    num_fewshot: int = 5
    limit: int | None = None


@dataclass(frozen=True)
class Bench:
    """What is compared, beside the recipe in the same file.

    domains      name -> texts to measure on
    outputs      modes that mix the donors' outputs
    controlled   the mode that the controls are of
    documents    of every domain at most, of `max_bytes` each
    """

    domains: Mapping[str, tuple[str, ...]]
    arms: tuple[str, ...] = tuple(MODES)
    outputs: tuple[str, ...] = tuple(MIXERS)
    controls: tuple[str, ...] = CONTROLS
    controlled: str = "attention"
    documents: int = 50
    max_bytes: int = 2000
    seeds: int = 1
    mmlu: Mmlu | None = None

    @property
    def measures(self) -> list[str]:
        """What arms are compared by."""
        return [*self.domains, *([MMLU] if self.mmlu else [])]


@dataclass(frozen=True)
class Measured:
    """What an arm does.

    bits              of every domain's documents; under MMLU of every question, as one byte, whether it was answered wrong
    tokens_per_s      of the host's, scored
    generated_per_s     tokens of generate, one text at a time, its reading included
    peak_bytes        weights, and what scoring a batch of training blocks takes beside them
    """

    bits: dict[str, Bits]
    tokens_per_s: float
    generated_per_s: float
    peak_bytes: int


@dataclass
class Row:
    """One arm from one seed: parameters in all and trained, what was measured, the last training loss."""

    arm: str
    seed: int
    parameters: int
    trained: int
    measured: Measured
    loss: float | None = None
    train_s: float = 0.0
    losses: list[float] = field(default_factory=list)


def read_bench(path: Path) -> tuple[Bench, dict[str, Any]]:
    """(what is compared, the rest of the file: a recipe).

    Raises:
        RecordError, EvalError: what is wrong with it.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("bench"), dict):
        raise EvalError(f"{path} has no 'bench'; expected what is compared: domains, arms, controls")
    found = Fields(str(path))
    kinds: dict[str, Any] = dict.fromkeys(("arms", "outputs", "controls"), list) | {"controlled": str}
    kinds |= dict.fromkeys(("documents", "max_bytes", "seeds"), int)
    domains, mmlu, *rest = found.take(
        content["bench"], "bench", domains=dict, mmlu=(dict, None), **{name: (kind, None) for name, kind in kinds.items()}
    )
    given = _given(kinds, rest)
    if mmlu is not None:
        kinds = {"data_dir": str, "subjects": list, "num_fewshot": int, "limit": int}
        given["mmlu"] = Mmlu(**_given(kinds, found.take(mmlu, "mmlu", **{name: (kind, None) for name, kind in kinds.items()})))
    found.done()
    texts = {str(name): tuple(several) if isinstance(several, list) else (str(several),) for name, several in domains.items()}
    bench = Bench(texts, **given)
    for what, chosen, known in (
        ("arm", bench.arms, MODES),
        ("output", bench.outputs, MIXERS),
        ("control", bench.controls, CONTROLS),
    ):
        for one in chosen:
            if one not in known:
                raise EvalError(f"{path}: there is no {what} {one!r}; there are {', '.join(known)}")
    if bench.controlled not in MODES or (bench.controls and bench.controlled not in bench.arms):
        raise EvalError(f"{path}: controls are of {bench.controlled!r}, which is not among the arms {', '.join(bench.arms)}")
    if min(bench.documents, bench.max_bytes, bench.seeds) < 1 or not texts:
        raise EvalError(f"{path}: documents, max_bytes and seeds must be at least 1, and there must be a domain")
    if bench.mmlu and (bench.mmlu.num_fewshot < 0 or (bench.mmlu.limit is not None and bench.mmlu.limit < 1)):
        raise EvalError(f"{path}: mmlu: num_fewshot must be at least 0, limit at least 1")
    if MMLU in bench.domains:
        raise EvalError(f"{path}: a domain is named {MMLU}, as the questions are; give it another name")
    return bench, {key: value for key, value in content.items() if key != "bench"}


def _given(names: Iterable[str], values: Iterable[Any]) -> dict[str, Any]:
    """What is there of a part of the file, as arguments."""
    found = zip(names, values, strict=True)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found if value is not None}


class Arms:
    """All arms on one pair of backbones, which are loaded once."""

    def __init__(self, parts: Parts, assembled: Path, bench: Bench, device: str, dtype: str = "auto") -> None:
        """Loads the models and reads the texts.

        Raises:
            FusionError, EvalError: a text that cannot be read, a donor whose states are not finite.
        """
        assert parts.recipe.training is not None
        self.parts, self.bench, self.device = parts, bench, device
        self.recipe: Training = parts.recipe.training
        self.tokenizer = read_tokenizer(parts.sources[0])
        blocks = token_blocks(read_documents(self.recipe.text), self.tokenizer, self.recipe.block)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
        self.blocks = blocks[order[: self.recipe.updates * self.recipe.batch]]  # what lies beyond would never be used
        self.documents = {}
        for name, texts in bench.domains.items():
            self.documents[name] = cut(pieces(read_documents(texts), bench.max_bytes), bench.max_bytes)[: bench.documents]
        self.subjects: list[Subject] = []
        if bench.mmlu is not None:
            self.subjects = read_mmlu(Path(bench.mmlu.data_dir) if bench.mmlu.data_dir else None, bench.mmlu.subjects)
        self.model = load_fused(assembled, device)
        check_finite(self.model, self.blocks[:1].to(device), [source.name for source in parts.sources[1:]])
        self._kept: Store | None = None  # the donors' states of all blocks, which most arms read
        self.assembled, self.dtype = assembled, dtype
        self._outputs: FusionForCausalLM | None = None

    @property
    def data_hash(self) -> str:
        """SHA-256 of all that is read: blocks to train on, documents, questions."""
        questions = [asdict(subject) for subject in self.subjects]
        return hashlib.sha256(self.blocks.numpy().tobytes() + json.dumps([self.documents, questions]).encode()).hexdigest()

    def rows(self, progress: Callable[[int], object] = lambda n: None, done: Sequence[Row] = ()) -> Iterator[Row]:
        """Every arm and control of the comparison from every seed, one after the other; told of tokens as it trains.

        Args:
            done: rows of the same comparison that there are already: the first of all.
        """
        bench = self.bench
        jobs: list[Callable[[], Row]] = [self.host]
        jobs += [partial(self.donor, number) for number in range(len(self.parts.recipe.donors))]
        for seed in range(bench.seeds):
            jobs += [partial(self.fused, mode, seed, None, progress) for mode in bench.arms]
            jobs += [partial(self.output, mode, seed, progress) for mode in bench.outputs]
            jobs += [
                partial(self.lora, seed, progress)
                if control == "lora"
                else partial(self.fused, bench.controlled, seed, control, progress)
                for control in bench.controls
            ]
        progress(self.recipe.updates * self.recipe.batch * self.recipe.block * sum(row.trained > 0 for row in done))
        yield from done
        for make in jobs[len(done) :]:
            yield make()

    def host(self) -> Row:
        """The host alone."""
        model = self.model.host
        return Row(HOST, 0, sum(x.numel() for x in model.parameters()), 0, self._measure(model))

    def donor(self, number: int) -> Row:
        """A source of a donor by itself, with all of its layers and its own tokenizer."""
        source = self.parts.sources[1 + number]
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=self.model.host.dtype).to(self.device).eval()
        found = self._measure(model, read_tokenizer(source))
        return Row(f"donor {number}: {source.name}", 0, sum(x.numel() for x in model.parameters()), 0, found)

    def fused(
        self, mode: str, seed: int, control: str | None = None, progress: Callable[[int], object] = lambda n: None
    ) -> Row:
        """A mode, or a control of it, trained and measured."""
        with self._model(mode, seed, control == "random-donor") as model:
            store = self._computed(model, "random weights") if control == "random-donor" else self._store(model)
            if control in ("zero", "shuffle"):
                store = store.zeroed() if control == "zero" else store.shuffled()
            with from_entry(model, store) as begin:

                def logits_of(rows: list[int], ids: torch.Tensor) -> torch.Tensor:
                    begin(rows, self.device)
                    return run_host(model, ids, store.features(rows))

                trained = self._train(model, seed, logits_of, progress)
            model.control = control if control in ("zero", "shuffle") else None
            rows = self._measure(model)
            total = sum(value.numel() for value in model.parameters())
            count = sum(value.numel() for value in model.fuser_parameters().values())
        return self._row(mode if control is None else f"{mode}, {control}", seed, total, count, rows, trained)

    def output(self, mode: str, seed: int, progress: Callable[[int], object] = lambda n: None) -> Row:
        """The outputs of host and donors mixed; trained where there is something to train."""
        if self._outputs is None:
            fewer = tuple(replace(donor, taps=()) for donor in self.parts.recipe.donors)  # whole donors, with heads
            recipe = replace(self.parts.recipe, donors=fewer, fusion={"mode": "mixture"})
            parts = make_parts(recipe, self.parts.sources, dtype=self.dtype)
            assemble(parts, self.assembled.with_name(f"{self.assembled.name}-outputs"))
            self._outputs = load_fused(self.assembled.with_name(f"{self.assembled.name}-outputs"), self.device)
        model = self._outputs
        model.config.fusion = with_defaults({"mode": mode})
        model.fusers = torch.nn.ModuleList(new_fusers(model.config, seed)).to(self.device)
        count = sum(value.numel() for value in model.fuser_parameters().values())
        trained = self._train(model, seed, None, progress) if count else None
        found = self._measure(model.eval())
        total = sum(value.numel() for value in model.parameters())
        if trained is None:
            return Row(f"{mode} of outputs", seed, total, 0, found)
        return self._row(f"{mode} of outputs", seed, total, count, found, trained)

    def lora(self, seed: int, progress: Callable[[int], object] = lambda n: None) -> Row:
        """The host with low-rank adapters above its first site, of about as many parameters as the controlled mode trains."""
        with self._model(self.bench.controlled, seed, False) as fused:
            parameters = sum(value.numel() for value in fused.fuser_parameters().values())
        layers = len(self.model.host.model.layers)
        first = min(min(self.model.config.fusion["sites"]), layers // 2)
        torch.manual_seed(seed)
        model: Any = LoraHost(self.model.host, range(first, layers), parameters).to(self.device)
        try:
            trained = self._train(model, seed, None, progress)
            found = self._measure(self.model.host)  # which has the adapters as hooks
            found = replace(found, peak_bytes=found.peak_bytes + weight_bytes(model.fusers))
        finally:
            model.remove()
        count = sum(value.numel() for value in model.fuser_parameters().values())
        total = count + sum(value.numel() for value in self.model.host.parameters())
        return self._row(f"lora, rank {model.rank}", seed, total, count, found, trained)

    def _row(self, name: str, seed: int, total: int, count: int, found: Measured, trained: Trained) -> Row:
        losses = [entry[1] for entry in trained.log if not math.isnan(entry[1])]
        return Row(name, seed, total, count, found, trained.log[-1][1], round(trained.time_s, 2), losses)

    def _train(self, model: Any, seed: int, logits_of: Any, progress: Callable[[int], object]) -> Trained:
        recipe = replace(self.recipe, seed=seed)
        accelerator = Accelerator(cpu=self.device == "cpu")
        return train(
            model, self.blocks, self.blocks[:0], recipe, accelerator=accelerator, logits_of=logits_of,
            progress=lambda tokens, row: progress(tokens),
        )  # fmt: skip

    @contextmanager
    def _model(self, mode: str, seed: int, random_donor: bool) -> Iterator[FusionForCausalLM]:
        """A fused model on the shared backbones; their hooks are gone afterwards."""
        config = FusionConfig(
            text_config=self.model.config.text_config, donors=self.model.config.donors,
            fusion=self.model.config.fusion | {"mode": mode},
        )  # fmt: skip
        parts: Any = self.model
        donors = list(parts.donors)
        if random_donor:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                donors = [type(one)(one.config).to(one.dtype).to(self.device).eval() for one in donors]
        layers = [*parts.host.model.layers, *(layer for donor in donors for layer in donor.layers)]
        before = [dict(layer._forward_hooks) for layer in layers]
        model = FusionForCausalLM(config, parts.host, donors)
        model.take_tables(self.model)
        for own, new in zip(model.fusers, new_fusers(config, seed), strict=True):
            own.load_state_dict(new.state_dict())
        try:
            yield model.to(self.device).eval()
        finally:
            for layer, hooks in zip(layers, before, strict=True):
                layer._forward_hooks.clear()
                layer._forward_hooks.update(hooks)

    def _store(self, model: FusionForCausalLM) -> Store:
        if self._kept is None:
            self._kept = self._computed(model, "trained weights")
        return self._kept

    def _computed(self, model: FusionForCausalLM, weights: str) -> Store:
        log.info("computing the states of donors with %s, %d blocks", weights, len(self.blocks))
        tokens = any(MODES[mode].reads_tokens for mode in self.bench.arms)
        return compute(model, self.blocks, self.recipe.batch, tokens=tokens, device=self.device)

    def _measure(self, model: Any, tokenizer: Any = None) -> Measured:
        tokenizer = tokenizer or self.tokenizer
        tokens = sum(len(self.tokenizer(one)["input_ids"]) for several in self.documents.values() for one in several)
        started = time.perf_counter()
        bits = {
            name: measure(model, tokenizer, several, batch=self.recipe.batch, device=self.device)
            for name, several in self.documents.items()
        }
        per_s = tokens / (time.perf_counter() - started)
        if self.bench.mmlu is not None:
            bits[MMLU] = self._ask(model, tokenizer, self.bench.mmlu)
        return Measured(bits, per_s, self._generated_per_s(model), self._peak(model))

    def _ask(self, model: Any, tokenizer: Any, questions: Mmlu) -> Bits:
        lm = PrefixLM(model.eval(), tokenizer=tokenizer, device=self.device)
        answers = ask(
            lm, self.subjects, questions.num_fewshot, questions.limit, question_text=False, answered=lambda count: None
        )
        return Bits(np.array([float(not one.right) for one in answers]), np.ones(len(answers)))

    @torch.inference_mode()
    def _generated_per_s(self, model: Any) -> float:
        ids = self.blocks[:1, :PROMPT].to(self.device).clamp(max=model.config.get_text_config().vocab_size - 1)
        how = {"do_sample": False, "max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "pad_token_id": 0}
        times = []
        for _ in range(3):
            started = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), **how)
            times.append(time.perf_counter() - started)
        return GENERATED / statistics.median(times)

    @torch.no_grad()  # under inference_mode some operators are not taken apart, and what they hold is not seen
    def _peak(self, model: Any) -> int:
        ids = self.blocks[: self.recipe.batch].to(self.device).clamp(max=model.config.get_text_config().vocab_size - 1)
        with PeakMemory() as memory:
            model(input_ids=ids, use_cache=False)
        found: int = weight_bytes(model) + memory.peak
        return found


def bench_fusion(
    bench: Bench,
    recipe: Recipe,
    out: Path,
    *,
    configs: Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    told: Callable[[Sequence[Row]], object] = lambda rows: None,
    bars: Bars = no_bars,
) -> list[Row]:
    """Every arm and control, trained alike and measured, as rows that `table`, `claims` and `record` read.

    Writes OUT/results.json after each row, OUT/table.md at the end, and models to OUT/assembled. Rows that are there already
    are kept, so that a comparison that was stopped goes on after its last.

    Args:
        bench: what is compared, and `recipe`, of what: both from `read_bench`, the second by way of `recipe_from`.
        configs: the folder of tiny models, as for `merge.resolve`.
        told: called with the rows so far, after each.
        bars: makes progress bars.

    Raises:
        FusionError, MergeError, EvalError: models or texts that cannot be used, a recipe without training, or `out` holds
            another comparison, or is in use.
    """
    if recipe.training is None:
        raise EvalError("the recipe has no training; expected what the arms are trained on")
    sources = [resolve(one.model, revision=one.revision, configs=configs) for one in (recipe.host, *recipe.donors)]
    parts = make_parts(recipe, sources, dtype=dtype)
    each = recipe.training.updates * recipe.training.batch * recipe.training.block
    total = bench.seeds * (len(bench.arms) + ("mixture" in bench.outputs) + len(bench.controls)) * each
    rows: list[Row] = []
    device = training_device(device)
    with work_folder(out):
        settings = _settings(bench, parts, dtype, device)
        _read_rows(out / RESULTS_FILE, settings)  # what is of another comparison is refused before anything is written
        assemble(parts, out / "assembled")
        arms = Arms(parts, out / "assembled", bench, device, dtype)
        settings["data_sha256"] = arms.data_hash
        done = _read_rows(out / RESULTS_FILE, settings)
        with bars("training", "token", total) as bar:
            for row in arms.rows(bar.update, done):
                rows.append(row)
                if len(rows) > len(done):
                    about = {"schema_version": SCHEMA_VERSION, "settings": settings}
                    write_whole(out / RESULTS_FILE, json.dumps(about | record(rows, bench), indent=1) + "\n")
                told(rows)
        write_whole(out / "table.md", bench_report(rows, bench))
    return rows


def _settings(bench: Bench, parts: Parts, dtype: str, device: str) -> dict[str, Any]:
    """What rows depend on beside the data, as JSON gives it back."""
    training = parts.recipe.training
    assert training is not None
    found: dict[str, Any] = json.loads(json.dumps({
        "bench": asdict(bench), **parts.identity, "training": asdict(training), "dtype": dtype,
        "device": device.partition(":")[0],
    }))  # fmt: skip
    return found


def _read_rows(path: Path, settings: Mapping[str, Any]) -> list[Row]:
    """The rows of a comparison that was begun: the first of what `Arms.rows` gives.

    Raises:
        EvalError: one of `settings` is another there, or the file is damaged.
    """
    if not path.exists():
        return []
    content = read_json(path, max_bytes=MAX_RESULTS)
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise EvalError(f"{path} is not of this program, or of an earlier version; give another --out, or remove it")
    try:
        there, rows = dict(content["settings"]), [_row(one) for one in content["rows"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EvalError(f"{path} is damaged ({short(error)}); remove it to begin again") from error
    if differs := sorted(key for key in settings if there.get(key) != settings[key]):
        raise EvalError(
            f"{path} is of a comparison with other settings ({', '.join(differs)}); give another --out, or remove it"
        )
    return rows


def _row(one: Mapping[str, Any]) -> Row:
    """The inverse of what `record` makes of a row."""
    bits = {name: Bits(_numbers(found), _numbers(one["bytes"][name])) for name, found in one["bits"].items()}
    measured = Measured(bits, one["tokens_per_s"], one["generated_per_s"], one["peak_bytes"])
    losses = _numbers(one["losses"]).tolist()
    return Row(one["arm"], one["seed"], one["parameters"], one["trained"], measured, one["loss"], one["train_s"], losses)


def _numbers(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
    return np.array([math.nan if one is None else one for one in values], dtype=float)


def _plain(value: Any) -> Any:
    """JSON values, of which none is NaN or infinite: those are null."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pooled(rows: Sequence[Row], arm: str, domain: str) -> Bits:
    """An arm's bits, the mean over its seeds, document by document."""
    several = [row.measured.bits[domain] for row in rows if row.arm == arm]
    return Bits(sum((one.bits for one in several), 0 * several[0].bits) / len(several), several[0].bytes)


def claims(rows: Sequence[Row], bench: Bench) -> list[str]:
    """For every domain, and for MMLU, what may be said of the controlled mode."""
    names = list(dict.fromkeys(row.arm for row in rows))
    controls = [name for name in names if name.startswith((f"{bench.controlled}, ", "lora"))]
    found: list[str] = []
    for domain in bench.measures if bench.controlled in names else ():
        against = {
            name: difference(pooled(rows, bench.controlled, domain), pooled(rows, name, domain)) for name in [HOST, *controls]
        }
        better = {name: one for name, one in against.items() if one.high < 0}
        if len(controls) >= len(bench.controls) > 0 and len(better) == len(against):
            smallest = max(against, key=lambda name: against[name].value)
            found.append(
                f"{domain}: {bench.controlled} reads something of use in its donors: {_interval(against[smallest])} "
                f"{unit(domain)} beside the nearest control ({smallest}), {_interval(against[HOST])} beside its host"
            )
        else:
            short = ", ".join(f"{name} {_interval(one)}" for name, one in against.items() if name not in better)
            found.append(
                f"{domain}: no gain from the donors is shown for {bench.controlled}; "
                f"not better than {short or 'enough controls'}"
            )
    return found


def unit(domain: str) -> str:
    """What `Bits.per_byte` says of a domain; less is better."""
    return "share of wrong answers" if domain == MMLU else "bits per byte"


def _interval(one: Mean) -> str:
    return f"{one.value:+.3f} [{one.low:.3f}, {one.high:.3f}]"


def table(rows: Sequence[Row], bench: Bench) -> str:
    """Markdown: an arm in a row; what it scores in every domain and in MMLU, less its host, speeds, memory."""
    head = ["arm", "parameters", "trained", *(f"{name}, {unit(name)}" for name in bench.measures)]
    head += [*(f"{name}, less host" for name in bench.measures), "tokens/s scored", "generated", "peak memory, MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm in dict.fromkeys(row.arm for row in rows):
        several = [row for row in rows if row.arm == arm]
        cells = [arm, f"{several[0].parameters:,}", f"{several[0].trained:,}"]
        cells += [f"{pooled(rows, arm, name).per_byte:.4f}" for name in bench.measures]
        cells += [
            "" if arm == HOST else _interval(difference(pooled(rows, arm, name), pooled(rows, HOST, name)))
            for name in bench.measures
        ]
        speeds = (
            statistics.mean(getattr(row.measured, name) for row in several) for name in ("tokens_per_s", "generated_per_s")
        )
        cells += [*(f"{speed:,.0f}" for speed in speeds), f"{several[0].measured.peak_bytes / 1e6:,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def bench_report(rows: Sequence[Row], bench: Bench) -> str:
    """The table, and below it what may be said."""
    return table(rows, bench) + "\n" + "".join(f"- {line}\n" for line in claims(rows, bench))


def record(rows: Sequence[Row], bench: Bench) -> dict[str, Any]:
    """Everything as plain data; numbers that are not finite are None."""
    found: dict[str, Any] = _plain({
        "bench": asdict(bench),
        "rows": [
            {
                "arm": row.arm, "seed": row.seed, "parameters": row.parameters, "trained": row.trained,
                "tokens_per_s": row.measured.tokens_per_s, "generated_per_s": row.measured.generated_per_s,
                "peak_bytes": row.measured.peak_bytes, "loss": row.loss, "train_s": row.train_s,
                "bits_per_byte": {name: one.per_byte for name, one in row.measured.bits.items()},
                "bits": {name: one.bits.tolist() for name, one in row.measured.bits.items()},
                "bytes": {name: one.bytes.tolist() for name, one in row.measured.bits.items()},
                "losses": row.losses,
            }
            for row in rows
        ],
        "claims": claims(rows, bench),
    })  # fmt: skip
    return found
