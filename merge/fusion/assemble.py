"""A folder that holds a fused model, put together from its sources' files; nothing is loaded but small tables.

The host's layers may be fused on the way (a plan); donors lose their head and the layers above their last tap, unless it is
their output that is read. Every tensor is copied, or mixed, from the sources' shards straight into the result's. What is new is
one small file: the fusers or the mixer, without effect before training so that the model equals its host, and the tables
between vocabularies. The code that loads it is copied beside it.
"""

import copy
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from ..alphas import plan_from_alphas, read_alphas
from ..blueprint import Blueprint, Output, make_blueprint
from ..checkpoint import INDEX_FILE, Checkpoint, check_unchanged, is_tied
from ..errors import PlanError
from ..execute import Progress, execute
from ..plan import Plan, unit_row
from ..records import SCHEMA_VERSION, read_json
from ..report import header_hashes, versions
from ..runtime import decide, torch_dtype
from ..source import Source, side_files
from . import budget, configuration_fusion, modeling_fusion
from .byte_tables import ByteTable, text_encoder
from .configuration_fusion import MODES, FusionConfig, with_defaults
from .errors import FusionError
from .fusers import Fuser
from .mixers import Mixer
from .modeling_fusion import DONOR_FOLDER, FusionForCausalLM, make_fusers
from .recipe import Recipe, layer_numbers
from .vocabulary import Bridge, bridge, same_tokenizer, same_vocabulary, vocabulary_map

log = logging.getLogger(__name__)

RECORD_FILE = "fusion.json"
FUSERS_FILE = "model-fusers.safetensors"
CODE = (
    *("configuration_fusion.py", "modeling_fusion.py", "fusers.py", "mixers.py", "streams.py", "prefix.py", "byte_tables.py"),
    *("vocabulary.py", "errors.py"),
)


@dataclass(frozen=True)
class Parts:
    """What a recipe comes to, from configs and headers alone.

    blueprints    of the host, then of the donors
    taps          layer numbers of every donor
    fusion        all settings of the mode, sites as layer numbers
    """

    recipe: Recipe
    sources: tuple[Source, ...]
    blueprints: tuple[Blueprint, ...]
    taps: tuple[tuple[int, ...], ...]
    fusion: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What the untrained model depends on, as plain data: the recipe but for its training, and the hashes of the sources'
        headers.
        """
        sources = [
            {"spec": s.spec, "model": s.model, "revision": s.revision, "header_sha256": header_hashes(b.checkpoint)}
            for s, b in zip(self.sources, self.blueprints, strict=True)
        ]
        dtypes = [sorted({out.dtype for out in blueprint.outputs}) for blueprint in self.blueprints]
        recipe = asdict(replace(self.recipe, training=None)) | {"fusion": self.fusion, "dtypes": dtypes, "seed": self.seed}
        found: dict[str, Any] = json.loads(json.dumps({"recipe": recipe, "sources": sources}))
        return found

    @property
    def seed(self) -> int:
        """Of the fusers' values before training."""
        return self.recipe.training.seed if self.recipe.training else 0

    @property
    def combination(self) -> budget.Combination:
        """The parts as the budget sees them."""
        parts = []
        for number, (source, blueprint) in enumerate(zip(self.sources, self.blueprints, strict=True)):
            backbone = budget.read_backbone(blueprint.checkpoint.config, source.name)
            parts.append(budget.Part(backbone, len(blueprint.plan.rows), () if number == 0 else self.taps[number - 1]))
        settings = {name: self.fusion[name] for name in ("rank", "heads", "norm") if name in self.fusion}
        fusers = budget.Fusers(self.fusion["mode"], sites=len(self.fusion.get("sites", [0])), **settings)
        return budget.Combination(parts[0], tuple(parts[1:]), fusers, self.recipe.budget)

    @property
    def fuses_outputs(self) -> bool:
        """Whether the donors' outputs are read, for which they keep their heads."""
        return issubclass(MODES[self.fusion["mode"]], Mixer)

    @property
    def bytes_to_write(self) -> int:
        """Size of the backbones in the result."""
        return sum(out.nbytes for number in range(len(self.blueprints)) for _, out in _placed(self, number))

    def __str__(self) -> str:
        """How things are fused, for a person."""
        fusion = self.fusion
        if "sites" in fusion:
            return f"{fusion['mode']}, rank {fusion['rank']}, after host layers {', '.join(map(str, fusion['sites']))}"
        return f"{fusion['mode']} of outputs" + (f", weight {fusion['weight']:g}" if "weight" in fusion else "")


def make_parts(recipe: Recipe, sources: Sequence[Source], *, dtype: str = "auto") -> Parts:
    """The parts of a fused model, checked.

    Args:
        sources: the host and the donors, as `resolve` found them.
        dtype: of the backbones, one of `runtime.DTYPES`.

    Raises:
        FusionError: taps, sites, modes or the budget; PlanError, RecordError, CheckpointError: a source, or its alphas.
    """
    fusion = with_defaults(recipe.fusion)
    outputs = issubclass(MODES[fusion["mode"]], Mixer)
    checkpoints = [source.checkpoint() for source in sources]
    plans = [_host_plan(recipe, checkpoints[0])]
    taps = []
    for checkpoint, donor in zip(checkpoints[1:], recipe.donors, strict=True):
        layers = checkpoint.num_hidden_layers
        if outputs and donor.taps:
            raise FusionError(
                f"{donor.model}: 'taps' do not apply to mode {fusion['mode']!r}, which reads its output; leave them out"
            )
        given = (layers,) if outputs else donor.taps or budget.TAPS
        taps.append(tuple(layer_numbers(f"{donor.model}: tap", given, layers)))
        plans.append(Plan(tuple(unit_row(layer) for layer in range(taps[-1][-1])), layers, name="donor", method="drop"))
    blueprints = tuple(make_blueprint(plan, c, dtype=dtype) for plan, c in zip(plans, checkpoints, strict=True))
    if "sites" in fusion:
        fusion["sites"] = layer_numbers("site", fusion["sites"] or [0.5, 0.75, 1.0], len(plans[0].rows))
    parts = Parts(recipe, tuple(sources), blueprints, tuple(taps), fusion)
    fused_config(parts, [0] * len(taps))  # refuses what cannot be
    budget.check_budget(parts.combination)
    if recipe.training is not None and not parts.combination.fuser_parameters:
        raise FusionError(f"mode {fusion['mode']!r} has nothing to train; leave 'training' out, or use --no-training")
    return parts


def _host_plan(recipe: Recipe, checkpoint: Checkpoint) -> Plan:
    layers = checkpoint.num_hidden_layers
    if recipe.host.alphas is None:
        return Plan(tuple(unit_row(layer) for layer in range(layers)), layers, name="host", method="keep")
    return plan_from_alphas(read_alphas(Path(recipe.host.alphas)), layers)


def fused_config(parts: Parts, map_sizes: Sequence[int]) -> FusionConfig:
    """The config of the result; a map of size 0: the donor reads its own tokens."""
    # Copies: the config classes of transformers add to the mappings inside, and those of the sources are looked at again.
    host, *donors = (copy.deepcopy(one.cut.config) for one in parts.blueprints)
    config = FusionConfig(
        text_config={key: value for key, value in host.items() if key != "auto_map"},
        donors=[
            {"config": config, "taps": list(taps), "alignment": donor.alignment, "map_size": size}
            for config, taps, donor, size in zip(donors, parts.taps, parts.recipe.donors, map_sizes, strict=True)
        ],
        fusion=parts.fusion,
        dtype=host.get("dtype") or host.get("torch_dtype"),
    )
    config.architectures = [FusionForCausalLM.__name__]
    config.auto_map = {
        "AutoConfig": f"{configuration_fusion.__name__.rpartition('.')[2]}.{FusionConfig.__name__}",
        "AutoModelForCausalLM": f"{modeling_fusion.__name__.rpartition('.')[2]}.{FusionForCausalLM.__name__}",
    }
    return config


def vocabulary_tables(parts: Parts) -> dict[str, torch.Tensor]:
    """The maps from the host's vocabulary to those of the donors that read through one, and the bridges back that outputs need,
    by names in the model.

    Raises:
        FusionError: a tokenizer is missing, or differs from the host's and has no byte semantics.
    """
    tokenizers = [read_tokenizer(source) for source in parts.sources]
    sizes = [blueprint.checkpoint.config["vocab_size"] for blueprint in parts.blueprints]
    found: dict[str, torch.Tensor] = {}
    back: Bridge | None
    host: ByteTable | None = None  # made once, if any donor needs it
    for number, (tokenizer, size) in enumerate(zip(tokenizers[1:], sizes[1:], strict=True)):
        alignment = parts.recipe.donors[number].alignment
        if alignment == "map" and same_tokenizer(tokenizers[0], tokenizer):
            one, back = same_vocabulary(sizes[0], size)
        else:
            host, own = host or ByteTable.from_tokenizer(tokenizers[0], sizes[0]), ByteTable.from_tokenizer(tokenizer, size)
            encode = text_encoder(tokenizer, own)
            one, back = vocabulary_map(host, own, encode), None
            if parts.fuses_outputs:
                back = bridge(host, own, host_encode=text_encoder(tokenizers[0], host), donor_encode=encode)
        if one.inexact:
            donor = parts.sources[1 + number].name
            log.warning("%s has no token for some bytes of %d host tokens and does not see them", donor, len(one.inexact))
        if alignment == "map":
            found |= {f"tables.{number}.offsets": one.offsets, f"tables.{number}.tokens": one.tokens}
        if back is not None and parts.fuses_outputs:
            found |= {f"tables.{number}.begins": back.begins, f"tables.{number}.lands": back.lands}
    return found


def read_tokenizer(source: Source) -> Any:
    """The tokenizer in a source's folder.

    Raises:
        FusionError: there is none that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(source.folder)
    except Exception as error:  # transformers raises many kinds here, none of them documented
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise FusionError(
            f"{source.name}: its tokenizer cannot be read ({why}); a fused model needs one of every source"
        ) from error


def new_fusers(config: FusionConfig, seed: int) -> list[Fuser | Mixer]:
    """The fusers of a config, or its mixer, as they are before training, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_fusers(config)


def write_assembled(parts: Parts, folder: Path, *, command: str = "", progress: Callable[[int], Progress]) -> None:
    """Writes the untrained fused model into an empty folder.

    Raises:
        FusionError, CheckpointError, OSError: a tokenizer, a source that changed, a failing write.
    """
    tables = vocabulary_tables(parts)
    config = fused_config(parts, [len(tables.get(f"tables.{number}.tokens", ())) for number in range(len(parts.taps))])
    advance = progress(parts.bytes_to_write)
    weight_map: dict[str, str] = {}
    for number, blueprint in enumerate(parts.blueprints):
        renamed = _renamed(parts, number)
        execute(renamed, folder, decide("cpu"), advance)
        weight_map |= {out.name: shard.file for shard in renamed.shards for out in shard.outputs}
        check_unchanged(blueprint.checkpoint, parts.sources[number].checkpoint())
    new = fuser_tensors(new_fusers(config, parts.seed))
    new |= tables
    save_file(new, folder / FUSERS_FILE, {"format": "pt"})
    weight_map |= dict.fromkeys(new, FUSERS_FILE)
    _check_complete(config, weight_map)
    config.to_json_file(folder / "config.json")
    sizes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": sizes}, "weight_map": dict(sorted(weight_map.items()))})
    for name in CODE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    host = parts.blueprints[0].checkpoint
    for path in side_files(host.folder, {}):
        shutil.copyfile(path, folder / path.name)
    for number, donor in enumerate(parts.recipe.donors):
        if donor.alignment == "prefix":
            read_tokenizer(parts.sources[1 + number]).save_pretrained(folder / DONOR_FOLDER.format(number))
    record = {"schema_version": SCHEMA_VERSION, **parts.identity, "parameters": parts.combination.parameters}
    write_json(folder / RECORD_FILE, record | {"command": command, "versions": versions()})
    (folder / "README.md").write_text(card(parts, command), encoding="utf-8")


def fuser_tensors(fusers: Sequence[Fuser | Mixer]) -> dict[str, torch.Tensor]:
    """The tensors of fusers by their names in the model."""
    return {
        f"fusers.{number}.{name}": value.detach().contiguous()
        for number, fuser in enumerate(fusers)
        for name, value in fuser.state_dict().items()
    }


def _placed(parts: Parts, number: int) -> list[tuple[str, Output]]:
    """(file, output) of a source's tensors that the fused model has, under their names in it."""
    blueprint = parts.blueprints[number]
    has_head = parts.fuses_outputs and not is_tied(blueprint.checkpoint.config, True)
    who = "host" if number == 0 else f"donor-{number - 1}"
    total = len(blueprint.shards)
    found = []
    for count, shard in enumerate(blueprint.shards, start=1):
        for out in shard.outputs:
            name = f"host.{out.name}"
            if number and out.name.startswith("model."):
                name = f"donors.{number - 1}.{out.name.removeprefix('model.')}"
            elif number:
                if not has_head:
                    continue
                name = f"donor_heads.{number - 1}.{out.name.removeprefix('lm_head.')}"
            found.append((f"model-{who}-{count:05d}-of-{total:05d}.safetensors", replace(out, name=name)))
    return found


def _renamed(parts: Parts, number: int) -> Blueprint:
    files: dict[str, list[Output]] = {}
    for file, out in _placed(parts, number):
        files.setdefault(file, []).append(out)
    blueprint = parts.blueprints[number]
    shard = blueprint.shards[0]
    return replace(blueprint, shards=tuple(replace(shard, file=file, outputs=tuple(outs)) for file, outs in files.items()))


def _check_complete(config: FusionConfig, weight_map: dict[str, str]) -> None:
    """Raises PlanError unless the model class wants exactly these tensors; heads that are tied may be left out."""
    with torch.device("meta"):
        model = FusionForCausalLM(config)
    wanted, tied = set(model.state_dict()), set(model.all_tied_weights_keys)
    missing, unknown = sorted(wanted - set(weight_map) - tied), sorted(set(weight_map) - wanted)
    if missing or unknown:
        raise PlanError(
            f"the result would not load completely: {len(missing)} tensors are missing ({', '.join(missing[:2])}), "
            f"{len(unknown)} have no place ({', '.join(unknown[:2])})"
        )


def card(parts: Parts, command: str) -> str:
    """The text of README.md."""
    host, *donors = parts.sources
    lines = [
        f"- host: {host.name}, {len(parts.blueprints[0].plan.rows)} layers, answers",
        *(
            f"- donor: {donor.name}, {len(one.plan.rows)} layers, read after layers {', '.join(map(str, taps))}; it sees the "
            + ("text through a map of vocabularies" if asked.alignment == "map" else "tokens of its own tokenizer")
            for donor, one, taps, asked in zip(donors, parts.blueprints[1:], parts.taps, parts.recipe.donors, strict=True)
        ),
        f"- fusion: {parts}",
    ]
    ids = [source.model for source in parts.sources if source.model]
    base = "base_model:\n" + "".join(f"- {name}\n" for name in ids) if ids else ""
    return (
        f"---\nlibrary_name: transformers\ntags:\n- merge\n- layerfuse\n{base}---\n\n"
        f"# {host.name} reading {' and '.join(donor.name for donor in donors)}\n\n"
        f"Made by layerfuse: {parts.combination.parameters:,} parameters.\n\n## What was done\n\n" + "\n".join(lines) + "\n\n"
        "Load it with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`, and its tokenizer with "
        "`AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)`; the code is in the folder. "
        f"`{RECORD_FILE}` holds the recipe, hashes and versions.\n\n## Command\n\n```\n{command}\n```\n"
    )


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a fused folder."""
    found = read_json(folder / RECORD_FILE)
    return dict(found)


def write_json(path: Path, value: Any) -> None:
    """JSON as everywhere here: indented, with a line end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def as_dtype(tensors: dict[str, torch.Tensor], stored: str) -> dict[str, torch.Tensor]:
    """Fusers in the dtype that the backbones are stored in."""
    return {name: value.to(torch_dtype(stored)) if value.is_floating_point() else value for name, value in tensors.items()}
