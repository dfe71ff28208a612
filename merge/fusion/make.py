"""A recipe becomes a folder: assemble, train, publish.

    OUT.work/assembled   the fused model before training, whole; equal to its host
    OUT.work/training    the checkpoint that training goes on from
    OUT                  appears at the end, whole; OUT.work is removed then

The same command goes on where a killed one stopped; another recipe, or sources that changed, are refused.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ..errors import OutputError, RecordError
from ..execute import Progress
from ..publish import check_target, new_folder, work_folder
from ..runtime import FLOATS, torch_dtype
from ..source import Source, resolve
from .assemble import FUSERS_FILE, RECORD_FILE, Parts, as_dtype, read_record, read_tokenizer, write_assembled, write_json
from .errors import FusionError
from .modeling_fusion import FusionForCausalLM
from .text import read_documents, split_blocks, token_blocks
from .train import Trained, check_batch, held_out_loss, log_text, rows_at_once, train

log = logging.getLogger(__name__)

LOG_FILE = "training.csv"


@dataclass(frozen=True)
class Fused:
    """What came of a recipe: parameters in all and of the fusers; the last losses in nats per token, where it was trained."""

    parameters: int
    fuser_parameters: int
    loss: float | None = None
    held_out: float | None = None
    held_out_before: float | None = None
    tokens: int = 0
    time_s: float = 0.0


def fuse(
    parts: Parts,
    out: Path,
    *,
    device: str = "cpu",
    accelerator: Accelerator | None = None,
    teacher: Source | None = None,
    overwrite: bool = False,
    command: str = "",
    copying: Callable[[int], Progress] = lambda total: lambda done: None,
    training: Callable[[int, Mapping[str, float]], object] = lambda tokens, row: None,
    draw: Callable[[Path, float | None], object] = lambda folder, held_out_before: None,
) -> Fused:
    """Makes the folder `out`; in each of several processes under `accelerate launch`, of which the first writes.

    Args:
        teacher: what the recipe's `distil` names, by default as `resolve` finds it.
        training: told after every update of its tokens and its row of the log.
        draw: adds a picture of the training to the folder before that appears; told of the held-out loss before.

    Raises:
        FusionError, MergeError: what cannot be read, fused, trained or written; `out` is as it was.
    """
    work = out.with_name(f"{out.name}.work")
    assembled, writes = work / "assembled", accelerator is None or accelerator.is_main_process
    if writes:
        _remove_published(work, assembled, out)
    check_target(out, overwrite=overwrite, marker=RECORD_FILE)
    data = _data(parts)  # what is wrong with the text, the batch or the teacher is found before anything is written
    if parts.recipe.training is not None:
        check_batch(parts.recipe.training, 1 if accelerator is None else accelerator.num_processes)
        teacher = _check_teacher(parts, teacher)
    with work_folder(work) if writes else nullcontext():
        if writes:
            assemble(parts, assembled, command=command, copying=copying)
        if accelerator is not None:
            accelerator.wait_for_everyone()
        trained, before = None, None
        if data is not None:
            trained, before = _train(parts, work, data, accelerator or Accelerator(cpu=device == "cpu"), training, teacher)
        if writes:
            with new_folder(out, overwrite=overwrite, marker=RECORD_FILE) as scratch:
                _fill(scratch, parts, assembled, trained)
                if trained is not None:
                    draw(scratch, before)
            _empty(work, assembled)
    combination = parts.combination
    if trained is None:
        return Fused(combination.parameters, combination.fuser_parameters)
    recipe = parts.recipe.training
    assert recipe is not None
    held_out = trained.log[-1][2]
    return Fused(
        combination.parameters, combination.fuser_parameters, trained.log[-1][1],
        None if before is None else held_out, before, recipe.updates * recipe.batch * recipe.block, round(trained.time_s, 2),
    )  # fmt: skip


def assemble(
    parts: Parts,
    assembled: Path,
    *,
    command: str = "",
    copying: Callable[[int], Progress] = lambda total: lambda done: None,
) -> None:
    """Writes the untrained model, or finds that it is there.

    Raises:
        FusionError: what is there was made of something else.
    """
    if assembled.exists():
        try:
            record = read_record(assembled)
        except RecordError as error:
            raise FusionError(f"{error}; remove {assembled.parent} to begin anew") from error
        found = {key: record.get(key) for key in ("recipe", "sources")}
        if found != parts.identity:
            what = "sources that have changed since" if found["recipe"] == parts.identity["recipe"] else "another recipe"
            raise FusionError(f"{assembled.parent} is of {what}; give another --out, or remove that folder to begin anew")
        log.info("going on with %s", assembled.parent)
        return
    with new_folder(assembled) as scratch:
        write_assembled(parts, scratch, command=command, progress=copying)


def _data(parts: Parts) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(blocks to train on, held-out blocks)."""
    recipe = parts.recipe.training
    if recipe is None:
        return None
    positions = parts.blueprints[0].checkpoint.config.get("max_position_embeddings")
    if positions and recipe.block > positions:
        log.warning("blocks of %d tokens are longer than the %d that the host was made for", recipe.block, positions)
    blocks = token_blocks(read_documents(recipe.text), read_tokenizer(parts.sources[0]), recipe.block)
    return split_blocks(blocks, recipe.held_out, recipe.seed)


def _train(
    parts: Parts,
    work: Path,
    data: tuple[torch.Tensor, torch.Tensor],
    accelerator: Accelerator,
    told: Callable[[int, Mapping[str, float]], object],
    source: Source | None,
) -> tuple[Trained, float | None]:
    recipe = parts.recipe.training
    assert recipe is not None
    blocks, held_out = data
    model = load_fused(work / "assembled", accelerator.device)
    try:
        check_finite(model, blocks[:1].to(accelerator.device), [source.name for source in parts.sources[1:]])
    except FusionError:
        shutil.rmtree(work / "assembled", ignore_errors=True)  # of no use, and in the way of another dtype
        raise
    teacher = None
    if source is not None:
        teacher = AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto").to(accelerator.device).eval()
    before = (
        held_out_loss(model, held_out, rows_at_once(recipe, accelerator.num_processes), accelerator) if len(held_out) else None
    )
    checkpoint = work / "training" / "state.safetensors"
    found = train(
        model, blocks, held_out, recipe, accelerator=accelerator, teacher=teacher, checkpoint=checkpoint,
        identity=parts.identity, progress=told,
    )  # fmt: skip
    return found, before


def _check_teacher(parts: Parts, given: Source | None) -> Source | None:
    """The teacher that the recipe names.

    Raises:
        FusionError: its vocabulary is not the host's; MergeError: it cannot be found.
    """
    distil = parts.recipe.training.distil if parts.recipe.training else None
    if distil is None:
        return None
    found = given or resolve(distil)
    sizes = [checkpoint.config.get("vocab_size") for checkpoint in (found.checkpoint(), parts.blueprints[0].checkpoint)]
    if sizes[0] != sizes[1]:
        raise FusionError(
            f"distil: {distil} has a vocabulary of {sizes[0]:,}, the host one of {sizes[1]:,}; expected the host before its "
            "layers were fused, or one of its family"
        )
    return found


def load_fused(folder: Path, device: Any) -> FusionForCausalLM:
    """The model of an assembled folder: backbones in the dtype that they are stored in, fusers in float32."""
    stored = json.loads((folder / "config.json").read_text())["text_config"]
    name = stored.get("dtype") or stored.get("torch_dtype") or "float32"
    try:
        model = FusionForCausalLM.from_pretrained(folder, dtype=torch_dtype(name if name in FLOATS.values() else "float32"))
        values = load_file(folder / FUSERS_FILE)
    except SafetensorError as error:
        raise FusionError(f"{folder} is damaged ({error}); remove {folder.parent} to begin anew") from error
    model.fusers.float()
    with torch.no_grad():
        for key, value in model.fuser_parameters().items():
            value.copy_(values[key])
    found: FusionForCausalLM = model.to(device).eval()
    return found


def check_finite(model: FusionForCausalLM, ids: torch.Tensor, names: Sequence[str] = ()) -> None:
    """Raises FusionError where a donor's states are not finite: 0 x inf would not be 0, so the host would not be kept.

    `names` of the donors.
    """
    features = model.features(ids)
    number = 0
    for index, donor in enumerate(model.config.donors):
        for tap in donor["taps"]:
            if not torch.isfinite(features.aligned[number]).all():
                name = names[index] if names else f"donor {index}"
                dtype = str(features.aligned[number].dtype).removeprefix("torch.")
                advice = "run it in float32 (--dtype float32)" if dtype != "float32" else "its weights cannot be used"
                raise FusionError(f"{name}: its states after layer {tap} are not finite in {dtype}; {advice}")
            number += 1


def _fill(scratch: Path, parts: Parts, assembled: Path, trained: Trained | None) -> None:
    """Backbones are linked, so that nothing large is written twice; what training changed is written anew."""
    for path in sorted(assembled.iterdir()):
        changed = trained is not None and path.name in (FUSERS_FILE, RECORD_FILE)
        if not changed:
            _link(path, scratch / path.name)
    if trained is None:
        return
    tensors = load_file(assembled / FUSERS_FILE) | trained.values
    host = parts.blueprints[0]
    stored = next(iter({FLOATS[out.dtype] for out in host.outputs if out.dtype in FLOATS}), "float32")
    save_file(as_dtype(tensors, stored), scratch / FUSERS_FILE, {"format": "pt"})
    (scratch / LOG_FILE).write_text(log_text(trained.log))
    recipe = parts.recipe.training
    assert recipe is not None
    told = {"updates": len(trained.log), "time_s": round(trained.time_s, 2), "settings": asdict(recipe)}
    write_json(scratch / RECORD_FILE, read_record(assembled) | {"training": told, "written": int(time.time())})


def _remove_published(work: Path, assembled: Path, out: Path) -> None:
    """Removes what a run has left that was killed just after `out` had appeared.

    It is known by the files that `out` is linked to; on a file system without links it stays. Training that goes on is kept:
    a finished folder has its log.
    """
    one, two = assembled / "config.json", out / "config.json"
    linked = one.is_file() and two.is_file() and not out.is_symlink() and one.samefile(two)
    if linked and ((out / LOG_FILE).is_file() or not (work / "training").exists()):
        with suppress(OutputError), work_folder(work):  # in use: its owner lives, and will remove it
            _empty(work, assembled)


def _empty(work: Path, assembled: Path) -> None:
    """What says that it has been published goes last: whoever is killed here leaves what the next run knows."""
    last = assembled / "config.json"
    for path in [*work.iterdir(), *assembled.iterdir()]:
        if path.is_dir() and path != assembled:
            shutil.rmtree(path, ignore_errors=True)
        elif path not in (assembled, last):
            path.unlink(missing_ok=True)
    shutil.rmtree(assembled, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir()
        for path in sorted(source.iterdir()):
            _link(path, target / path.name)
        return
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
