"""The toolkit's own layer fusion on small Hugging Face models trained on the study's data sets.

Every family is built by transformers from its real config with small sizes, trained on questions as text with loss on the
answer alone, and written as an ordinary folder. Then `merge` makes smaller models of it as of any checkpoint, and lm-eval
scores all of them on the same validation pairs. With `features`, the model that lost most layers also reads the trained model
of the next family (`joined`). Folders are the unit of resuming: each is whole or not there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from merge.api import Options, merge_checkpoint
from merge.fusion.configuration_fusion import MODES
from merge.methods import plan_from_method
from merge.plan import Plan
from merge.publish import new_folder, work_folder, write_whole
from merge.records import Fields, read_json, read_yaml
from merge.similarity import fold_top
from merge.source import Source
from merge.tiny import small_config

from ..errors import StudyError, near
from ..load import load_model
from ..run import own_tasks, run_tasks
from ..stats import stderr
from .joined import SETTINGS_FILE, Features, identity, join, step_on_answers
from .study import Cell
from .tasks import generator, make_task, split
from .text import SYMBOLS, question, words

UNKNOWN, END = "<unk>", "<end>"
BATCH = 64  # questions that are scored at once
POSITIONS = 64


@dataclass(frozen=True)
class Size:
    """What replaces a real model's sizes."""

    hidden_size: int = 64
    intermediate_size: int = 256
    num_attention_heads: int = 4
    num_hidden_layers: int = 6


@dataclass(frozen=True)
class Training:
    """AdamW on all training pairs at once."""

    updates: int = 1500
    learning_rate: float = 1e-3
    weight_decay: float = 0.5
    warmup: int = 50


@dataclass(frozen=True)
class Grid:
    """Families x data sets x seeds, and what is made of each."""

    families: tuple[str, ...]
    datasets: tuple[str, ...]
    seeds: int = 1
    modulus: int = 13
    permuted: int = 3
    fraction: float = 0.8
    layers: tuple[int, ...] = (1, 2)
    alphas: tuple[float, ...] = (0.5,)
    size: Size = field(default_factory=Size)
    training: Training = field(default_factory=Training)
    features: Features | None = None

    @property
    def host(self) -> str:
        """The model that reads a donor: the one that lost most layers."""
        return f"dropped-{max(self.layers)}"

    @property
    def joined(self) -> dict[str, tuple[str, bool]]:
        """What is made of host and donor: name -> mode, whether the donor has learned anything."""
        if self.features is None:
            return {}
        found = {f"{self.host}-reads-{mode}": (mode, True) for mode in self.features.modes}
        return found | {f"{self.host}-reads-untrained": (self.features.modes[0], False)}


def read_grid(path: Path, configs: Path) -> Grid:
    """The grid that a file describes; families are names in `configs`/models.

    Raises:
        StudyError, RecordError: what is wrong with it.
    """
    content = read_yaml(path)
    found = Fields(str(path))
    version, families, datasets, layers, alphas, size, training, features, *rest = found.take(
        content, schema_version=int, families=list, datasets=list, layers=(list, None), alphas=(list, None),
        size=(dict, None), training=(dict, None), features=(dict, None), seeds=(int, None), modulus=(int, None),
        permuted=(int, None), fraction=(float, None),
    )  # fmt: skip
    found.check_version(version)
    sizes, settings = _numbers(found, "size", size, Size), _numbers(found, "training", training, Training)
    reading = None if features is None else Features(**_numbers(found, "features", features, Features))
    found.done()
    given = dict(zip(("seeds", "modulus", "permuted", "fraction"), rest, strict=True))
    if layers is not None:
        given["layers"] = tuple(layers)
    if alphas is not None:
        given["alphas"] = tuple(alphas)
    grid = Grid(
        tuple(map(str, families)), tuple(map(str, datasets)), size=Size(**sizes), training=Training(**settings),
        features=reading, **{key: value for key, value in given.items() if value is not None},
    )  # fmt: skip
    known = sorted(one.stem for one in (configs / "models").glob("*.json"))
    for family in grid.families:
        if family not in known:
            raise StudyError(f"there is no model {family!r}{near(family, known)}")
    for dataset in grid.datasets:
        if dataset not in SYMBOLS:
            raise StudyError(f"there is no data set {dataset!r} as text{near(dataset, SYMBOLS)}")
        split(make_task(dataset, grid.modulus, grid.permuted), 0, grid.fraction)
    for number in grid.layers:
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < grid.size.num_hidden_layers:
            raise StudyError(f"{number!r} layers cannot be removed from {grid.size.num_hidden_layers}")
    if (
        not grid.families
        or not grid.datasets
        or grid.seeds < 1
        or grid.training.updates < 1
        or min(asdict(grid.size).values()) < 1
    ):
        raise StudyError("families and data sets must not be empty; seeds, updates and sizes must be at least 1")
    for alpha in grid.alphas:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise StudyError(f"{alpha!r} is not an alpha; expected numbers from 0 to 1")
    if grid.size.hidden_size % grid.size.num_attention_heads:
        raise StudyError(f"{grid.size.num_attention_heads} heads do not divide the width {grid.size.hidden_size}")
    plans(grid)  # alphas that cannot be are refused before anything is trained
    if reading is not None:
        _check_features(grid, reading)
    return grid


def _numbers(found: Fields, what: str, content: Any, kind: type) -> dict[str, Any]:
    names = {key.name: list if key.default.__class__ is tuple else type(key.default) for key in fields(kind)}
    values = found.take(content or {}, what, **{key: (number, None) for key, number in names.items()})
    given = {key: value for key, value in zip(names, values, strict=True) if value is not None}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def _check_features(grid: Grid, features: Features) -> None:
    for mode in features.modes:
        if mode not in MODES:
            raise StudyError(f"there is no mode {mode!r} of reading a donor{near(str(mode), MODES)}")
    if not features.modes or min(features.updates, features.rank) < 1 or features.rank % 4:
        raise StudyError("features: modes must not be empty, updates at least 1, rank a multiple of 4")
    if len(grid.families) < 2 or not grid.layers:
        raise StudyError("features need two families, one of which reads the other, and layers to remove from the host")


def grid_cells(grid: Grid) -> list[Cell]:
    """All of them; a cell's run is the name of its family."""
    return [Cell(family, dataset, seed) for family in grid.families for dataset in grid.datasets for seed in range(grid.seeds)]


def num_updates(grid: Grid) -> int:
    """Of all networks of all cells, those that read another included."""
    reading = 0 if grid.features is None else len(grid.joined) * grid.features.updates
    return len(grid_cells(grid)) * (grid.training.updates + reading)


def plans(grid: Grid) -> dict[str, Plan]:
    """What is made of every trained model: fusions of the top layers, and the same layers dropped."""
    total = grid.size.num_hidden_layers
    found = {}
    for removed in grid.layers:
        for alpha in grid.alphas:
            name = f"fused-{removed}-alpha-{alpha:g}"
            found[name] = fold_top([alpha] * removed, total, name)
        found[f"dropped-{removed}"] = plan_from_method("drop-last", total, removed)
    return found


def run_grid(
    grid: Grid,
    out: Path,
    configs: Path,
    *,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda updates: None,
    begun: Callable[[Cell], object] = lambda cell: None,
    finished: Callable[[Cell, Mapping[str, float]], object] = lambda cell, scores: None,
) -> dict[Cell, dict[str, float]]:
    """Validation accuracy of every cell's models by name; what is not in the folder `out` yet is trained and merged.

    All are trained before the first is merged, as a cell's models read the trained ones of another.

    Args:
        grid: of `read_grid`.
        configs: the folder whose models/ describes the families.
        progress: called with the number of updates just made, of `num_updates`.
        begun, finished: called before a cell is trained or merged, and after its models were scored.

    Raises:
        StudyError: what is in `out` was made with other settings, or a loss is no longer a number.
        OutputError: another process uses `out`, or nothing can be written there.
    """
    scores = {}
    with work_folder(out):
        for cell in grid_cells(grid):
            begun(cell)
            train_cell(grid, cell, out, configs, progress, device=device)
        for cell in grid_cells(grid):
            begun(cell)
            scores[cell] = make_cell(grid, cell, out, configs, progress, device=device)
            finished(cell, scores[cell])
        write_whole(out / "table.md", grid_table(grid, scores))
    return scores


def make_cell(
    grid: Grid, cell: Cell, out: Path, configs: Path, progress: Callable[[int], None], *, device: str = "cpu"
) -> dict[str, float]:
    """Merges what is not there yet of trained cells, and scores all; name of a model -> validation accuracy.

    Args:
        progress: called with the number of updates just made, without those of `train_cell`.
    """
    folder = out / cell.folder
    trained = folder / "trained"
    scores = {"trained": score(grid, cell, trained, device)}
    # Gemma 2's layers attend in windows by turns; questions are shorter than any window.
    options = Options(dtype="float32", allow_mixed_attention=True)
    for name, plan in plans(grid).items():
        target = folder / name
        if not target.exists():
            merge_checkpoint(plan, Source(str(trained), trained), target, options)
        scores[name] = score(grid, cell, target, device)
    for name, (mode, learned) in grid.joined.items():
        target = folder / name
        settings = grid.features or Features()
        if target.exists() and (target / SETTINGS_FILE).read_text() != identity(settings):
            raise StudyError(f"{target} was made with other settings of features; give another --out, or remove it")
        if target.exists():
            progress(settings.updates)
        else:
            donor = find_donor(grid, cell, out, configs, learned=learned, device=device)
            tokens = training_tokens(grid, cell)[1]
            join(settings, mode, folder / grid.host, donor, tokens, target, device, progress)
        scores[name] = score(grid, cell, target, device)
    write_whole(folder / "scores.json", json.dumps(scores, indent=2) + "\n")
    return scores


def train_cell(
    grid: Grid,
    cell: Cell,
    out: Path,
    configs: Path,
    progress: Callable[[int], None],
    *,
    device: str = "cpu",
) -> None:
    """Trains a cell's model, in its folder "trained", if it is not there yet.

    Raises:
        StudyError: it was trained with other settings, or its loss is no longer a number.
    """
    folder = out / cell.folder / "trained"
    settings = json.dumps([asdict(grid.size), asdict(grid.training), grid.modulus, grid.permuted, grid.fraction, asdict(cell)])
    if not folder.exists():
        with new_folder(folder) as scratch:
            train_family(grid, cell, scratch, configs, progress, device)
            (scratch / "grid.json").write_text(settings + "\n")
        return
    progress(grid.training.updates)
    if (folder / "grid.json").read_text().strip() != settings:
        raise StudyError(
            f"{folder.parent} was made with other settings; give another --out, or remove that folder with all in it"
        )


def find_donor(grid: Grid, cell: Cell, out: Path, configs: Path, *, learned: bool, device: str) -> Path:
    """The folder of the next family's model of the same data set and seed; `learned`: trained, or as it was before."""
    family = grid.families[(grid.families.index(cell.run) + 1) % len(grid.families)]
    other = replace(cell, run=family)
    folder = out / other.folder / ("trained" if learned else "untrained")
    if not learned and not folder.exists():
        with new_folder(folder) as scratch:
            untrained = replace(grid, training=replace(grid.training, updates=0))
            train_family(untrained, other, scratch, configs, lambda updates: None, device)
    return folder


def training_tokens(grid: Grid, cell: Cell) -> tuple[Any, torch.Tensor]:
    """(the tokenizer, token ids [N, T] of the training pairs with their answers, which come last)."""
    task = make_task(cell.dataset, grid.modulus, grid.permuted)
    tokenizer = word_tokenizer(words(task, grid.permuted), SYMBOLS[cell.dataset])
    parts, written = split(task, cell.seed, grid.fraction), words(task, grid.permuted)
    texts = []
    for a, b, answer in zip(*(x[parts.train].tolist() for x in (task.a, task.b, task.answer)), strict=True):
        texts.append(f"{question(task, written[a], written[b])} {written[answer]}")
    return tokenizer, torch.tensor(tokenizer(texts)["input_ids"])


def train_family(
    grid: Grid, cell: Cell, folder: Path, configs: Path, progress: Callable[[int], None], device: str = "cpu"
) -> None:
    """Writes a trained model and its tokenizer into `folder`."""
    tokenizer, tokens = training_tokens(grid, cell)
    record = read_json(configs / "models" / f"{cell.run}.json")["config"]
    config = transformers.AutoConfig.for_model(**trained_config(record, grid.size, tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator(cell.seed, "init", cell.run))))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").to(
            device
        )
    tokens = tokens.to(device)
    recipe = grid.training
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    model.train()
    for update in range(recipe.updates):
        optimiser.param_groups[0]["lr"] = recipe.learning_rate * min(1.0, (update + 1) / max(1, recipe.warmup))
        step_on_answers(model, tokens, optimiser, cell.folder, update)
        progress(1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def trained_config(config: Mapping[str, Any], size: Size, tokenizer: Any) -> dict[str, Any]:
    """A real model's config with the grid's sizes."""
    heads = size.num_attention_heads
    small = small_config(config, size.hidden_size, size.intermediate_size, heads, size.hidden_size // heads)
    for name in ("rope_scaling", "torch_dtype"):  # positions are few
        small.pop(name, None)
    if "original_max_position_embeddings" in config:
        small["original_max_position_embeddings"] = POSITIONS
    return small | {
        "num_hidden_layers": size.num_hidden_layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": POSITIONS,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id),
    }


def word_tokenizer(symbols: Sequence[str], operator: str) -> Any:
    """One token for every word of the questions."""
    vocabulary = dict.fromkeys([UNKNOWN, END, operator, "mod", "=", *symbols])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, eos_token=END, bos_token=END, pad_token=END
    )


def score(grid: Grid, cell: Cell, folder: Path, device: str) -> float:
    """A folder's accuracy on all validation pairs, by lm-eval's task arithmetic_DATASET with this grid's numbers."""
    name = f"arithmetic_{cell.dataset}"
    manager = own_tasks(seed=cell.seed, modulus=grid.modulus, permuted=grid.permuted, fraction=grid.fraction)
    lm, _ = load_model(Source(str(folder), folder).checkpoint(), device, "float32", batch_size=BATCH)
    found = run_tasks(lm, [name], manager=manager, answered=lambda requests: None)
    assert found is not None  # there is one process
    return float(found["results"][name]["acc,none"])


def grid_table(grid: Grid, scores: Mapping[Cell, Mapping[str, float]]) -> str:
    """Markdown: a row per family and data set, a column per model; means over seeds."""
    names = ["trained", *plans(grid), *grid.joined]
    lines = ["| family | data set | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for family in grid.families:
        for dataset in grid.datasets:
            several = [one for cell, one in scores.items() if (cell.run, cell.dataset) == (family, dataset)]
            if several:
                columns = [[one[name] for one in several] for name in names]
                means = [f"{sum(x) / len(x):.3f}" + (f" +- {stderr(x):.2g}" if len(x) > 1 else "") for x in columns]
                lines.append(f"| {family} | {dataset} | " + " | ".join(means) + " |")
    return "\n".join(lines) + "\n"
