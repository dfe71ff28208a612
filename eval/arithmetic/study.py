"""What the study consists of, as records read from a YAML file: settings, and runs by name. A new run needs no code.

    run     one network (or a merge of trained ones) with a name; trained on several data sets from several seeds
    cell    one run on one data set from one seed

Split, batches and initial values depend on data set and seed, not on the run: all runs of a cell's data set and seed can be
compared in pairs, and sources that are fused have never seen a pair that the fused network is validated on.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from merge.records import Fields, read_yaml

from ..errors import StudyError, near
from .average import ALIGNMENTS, target
from .batches import Recipe
from .models import FUSION_HEADS, Model, Source
from .tasks import MODULUS, PERMUTED, STUDIED, TASKS, make_task

MODES = ("cotrain", "frozen", "finetune", "average")
OPERATIONS = ("x_plus_y", "x_minus_y", "x_div_y")  # of three_operations, by operator
UNTRAINED = "untrained"
NOTHING = "none"
BASELINE = "baseline"
SEEDS = 3
OF_RUNS = ("updates", "learning_rate", "matmul_precision")  # what a run may train otherwise than the study


@dataclass(frozen=True)
class Run:
    """One row of the study.

    mode        cotrain: everything from scratch; frozen: trained sources stay as they are; finetune: everything from trained
                sources; average: trained sources averaged into one plain network. Only the last three merge trained models.
    trained     the runs whose networks are the sources; UNTRAINED: sources as they are initialised
    init        another number, another initialisation
    operation   of three_operations: the only one that is trained and validated on
    published   the row of the published study, as DOCUMENT-RUN
    """

    name: str
    title: str
    model: Model
    mode: str = "cotrain"
    trained: tuple[str, ...] = ()
    updates: int | None = None
    learning_rate: float | None = None
    matmul_precision: str | None = None
    init: int = 0
    operation: str | None = None
    align: str = "weights"
    published: str | None = None
    datasets: tuple[str, ...] = ()  # empty: those of the study
    compare: str = BASELINE  # the run that it is compared with in pairs; NOTHING: with none


@dataclass(frozen=True)
class Study:
    """Settings that all runs share, and the runs, every one after those that it needs."""

    runs: tuple[Run, ...]
    datasets: tuple[str, ...] = STUDIED
    seeds: int = SEEDS
    modulus: int = MODULUS
    permuted: int = PERMUTED
    fraction: float = 0.5
    recipe: Recipe = field(default_factory=Recipe)

    def run(self, name: str) -> Run:
        """The run of that name."""
        return next(run for run in self.runs if run.name == name)

    def recipe_of(self, run: Run) -> Recipe:
        """How a run is trained."""
        changes = {key: value for key in OF_RUNS if (value := getattr(run, key)) is not None}
        return replace(self.recipe, **changes)

    def datasets_of(self, run: Run) -> tuple[str, ...]:
        """What a run is trained on."""
        return run.datasets or self.datasets


@dataclass(frozen=True, order=True)
class Cell:
    """One run on one data set from one seed."""

    run: str
    dataset: str
    seed: int

    @property
    def folder(self) -> str:
        """Of its results, within the study's."""
        return f"{self.run}/{self.dataset}_{self.seed}"


def cells(study: Study) -> list[Cell]:
    """All of them, those that others need first."""
    return [
        Cell(run.name, dataset, seed) for run in study.runs for dataset in study.datasets_of(run) for seed in range(study.seeds)
    ]


def needs(study: Study, cell: Cell) -> list[Cell]:
    """The cells whose networks are the sources of a cell."""
    return [replace(cell, run=name) for name in study.run(cell.run).trained if name != UNTRAINED]


def is_grid(path: Path) -> bool:
    """Whether a configuration is of Hugging Face models (hugging_face.py) rather than of the study's own networks."""
    content = read_yaml(path)
    return isinstance(content, dict) and "families" in content


def read_study(path: Path) -> Study:
    """The study that a file describes.

    Raises:
        StudyError: the file cannot be read, or what it says is not possible; all problems that can be seen at once.
    """
    content = read_yaml(path)
    found = Fields(str(path))
    version, datasets, seeds, modulus, permuted, fraction, recipe, runs = found.take(
        content, schema_version=int, datasets=(list, None), seeds=(int, None), modulus=(int, None), permuted=(int, None),
        fraction=(float, None), training=(dict, None), runs=dict,
    )  # fmt: skip
    found.check_version(version)
    names = {key.name: type(key.default) for key in fields(Recipe)}
    settings = dict(
        zip(names, found.take(recipe or {}, "training", **{key: (kind, None) for key, kind in names.items()}), strict=True)
    )
    read: dict[str, Run] = {}
    for name, description in (runs or {}).items():
        try:
            if (run := _read_run(found, str(name), description or {}, read)) is not None:
                read[run.name] = run
        except StudyError as error:
            found.problem(f"run {name}: {error}")
    known = list(read)
    for run in read.values():
        if run.compare not in (BASELINE, NOTHING) and run.compare not in read:
            found.problem(f"run {run.name}: there is no run {run.compare!r} to compare with{near(run.compare, known)}")
    found.done()
    given = {"seeds": seeds, "modulus": modulus, "permuted": permuted, "fraction": fraction}
    return checked(
        Study(
            tuple(read.values()),
            tuple(str(one) for one in datasets or STUDIED),
            recipe=Recipe(**{key: value for key, value in settings.items() if value is not None}),
            **{key: value for key, value in given.items() if value is not None},
        )
    )


def checked(study: Study) -> Study:
    """The study, if its data sets exist and its runs have what they need.

    Raises:
        StudyError: otherwise.
    """
    if study.seeds < 1:
        raise StudyError(f"seeds is {study.seeds}, expected at least 1")
    if not study.runs:
        raise StudyError("there are no runs")
    if not 0 < study.fraction < 1:
        raise StudyError(f"fraction is {study.fraction}, expected more than 0 and less than 1")
    if len(set(study.datasets)) < len(study.datasets):
        raise StudyError(f"a data set is named twice: {', '.join(study.datasets)}")
    for run in study.runs:
        try:
            study.recipe_of(run)
        except StudyError as error:
            raise StudyError(f"run {run.name}: {error}") from None
        for dataset in study.datasets_of(run):
            make_task(dataset, study.modulus, study.permuted)
            if run.operation and dataset != "three_operations":
                raise StudyError(f"run {run.name}: operation {run.operation} is of data set three_operations, found {dataset}")
        for source in run.trained:
            if source != UNTRAINED and not set(study.datasets_of(run)) <= set(study.datasets_of(study.run(source))):
                raise StudyError(f"run {run.name} needs {source} on all of its data sets: {', '.join(study.datasets_of(run))}")
    return study


def chosen(study: Study, names: Sequence[str]) -> Study:
    """The study reduced to some of its runs and those that they need.

    Raises:
        StudyError: there is no run of that name.
    """
    known = [run.name for run in study.runs]
    wanted: set[str] = set()
    for name in names:
        if name not in known:
            raise StudyError(f"there is no run {name!r}{near(name, known)}")
        todo = [name]
        while todo:
            one = todo.pop()
            wanted.add(one)
            todo += [source for source in study.run(one).trained if source != UNTRAINED]
    return replace(study, runs=tuple(run for run in study.runs if run.name in wanted))


def definition(study: Study, run: Run) -> dict[str, Any]:
    """Everything that decides what a run's networks are: what must be the same for results to be gone on with."""
    left_out = ("title", "published", "datasets", "compare", "matmul_precision")  # the last one stands in the recipe
    shown = {key: value for key, value in asdict(run).items() if key not in left_out}
    everything = shown | {
        "recipe": study.recipe_of(run).settings(),
        "modulus": study.modulus,
        "permuted": study.permuted,
        "fraction": study.fraction,
        "sources": [digest(study, study.run(name)) for name in run.trained if name != UNTRAINED],
    }
    found: dict[str, Any] = json.loads(json.dumps(everything))  # as it comes back from a file: lists, not tuples
    return found


def digest(study: Study, run: Run) -> str:
    """Sixteen digits for a run's definition."""
    text = json.dumps(definition(study, run), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------


def _read_run(found: Fields, name: str, content: Any, known: Mapping[str, Run]) -> Run | None:
    """The run, or None where problems were collected."""
    before = len(found.problems)
    at = f"run {name}"
    title, fusion, sources, wiring, taps, dropout, heads, routing, mode, trained, *rest = found.take(
        content, at,
        title=(str, None), fusion=(str, None), sources=(list, None), wiring=(str, None), taps=(str, None),
        dropout=(float, None), heads=(int, None), routing=(str, None), mode=(str, None), trained=(list, None),
        updates=(int, None), learning_rate=(float, None), matmul_precision=(str, None), init=(int, None),
        operation=(str, None), align=(str, None), published=(str, None), datasets=(list, None), compare=(str, None),
    )  # fmt: skip
    keys = [key.name for key in fields(Source)]
    optional = {key: (int, None) for key in keys}
    shapes = [found.take(one, f"{at}, source {i}", **optional) for i, one in enumerate(sources or [])]
    if len(found.problems) > before:
        return None
    if name == NOTHING:
        raise StudyError(f"{name!r} is not a name for a run: `compare: {NOTHING}` says that there is none to compare with")
    if not name or any(not (c.isalnum() or c in "-_.") for c in name) or name.startswith("."):
        raise StudyError(f"{name!r} is not a name for a folder; use letters, digits, - and _")
    own = tuple(Source(**{key: value for key, value in zip(keys, one, strict=True) if value is not None}) for one in shapes)
    mode = mode or "cotrain"
    if mode not in MODES:
        raise StudyError(f"there is no mode {mode!r}{near(mode, MODES)}")
    names = tuple(str(one) for one in trained or ())
    if (mode == "cotrain") == bool(names):
        raise StudyError(f"mode {mode} goes {'without' if names else 'with'} `trained`, the runs whose networks are fused")
    if names and UNTRAINED not in names:
        if own:
            raise StudyError("give `sources` or `trained`, not both: trained sources have their shapes already")
        own = tuple(_plain(one, known) for one in names)
    elif names and len(names) > 1:
        raise StudyError(f"{UNTRAINED} sources cannot be mixed with trained ones")
    updates, learning_rate, precision, init, operation, align, published, datasets, compare = rest
    align = align or "weights"
    for what, value, options in (("alignment", align, ALIGNMENTS), ("operation", operation or OPERATIONS[0], OPERATIONS)):
        if value not in options:
            raise StudyError(f"there is no {what} {value!r}{near(value, options)}")
    for dataset in datasets or ():
        if dataset not in TASKS:
            raise StudyError(f"there is no data set {str(dataset)!r}{near(str(dataset), TASKS)}")
    if mode == "average" and (fusion is not None or UNTRAINED in names):
        raise StudyError("mode average makes one plain network of trained ones; leave `fusion` out and name runs in `trained`")
    given = {"wiring": wiring, "taps": taps, "dropout": dropout, "routing": routing}
    own = own or (Source(),)
    model = Model(
        (target(own),) if mode == "average" else own,
        fusion or "none",
        heads=FUSION_HEADS if heads is None else heads,
        **{key: value for key, value in given.items() if value is not None},
    )
    return Run(
        name, title or name, model, mode, names, updates, learning_rate, precision, init or 0, operation, align, published,
        tuple(datasets or ()), compare or BASELINE,
    )  # fmt: skip


def _plain(name: str, known: Mapping[str, Run]) -> Source:
    """The shape of a run's network, which must be one source."""
    if name not in known:
        raise StudyError(f"trained run {name!r} does not stand above it{near(name, list(known))}")
    if known[name].model.fusion != "none":
        raise StudyError(f"{name} is a fusion; only plain networks can be sources")
    return known[name].model.sources[0]
