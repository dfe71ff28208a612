"""One call for the whole merge: check everything, build the folder beside its target, publish it whole."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .blueprint import DEFAULT_SHARD_SIZE, Blueprint, make_blueprint
from .card import model_card
from .checkpoint import INDEX_FILE, Checkpoint, check_unchanged
from .errors import OutputError
from .execute import Progress, execute
from .loadable import check_loadable
from .plan import Plan, plan_to_dict
from .publish import check_target, new_folder
from .report import PLAN_FILE, REPORT_FILE, Report, SourceRecord, header_hashes, machine, peak_rss_bytes, report_text, versions
from .runtime import decide
from .source import Source, side_files
from .verify import verify_folder

log = logging.getLogger(__name__)

SPARE_BYTES = 100_000_000  # left free on the disk besides the output: file system overhead, tokenizer files


@dataclass(frozen=True)
class Options:
    """How a result is written; `blueprint.make_blueprint` explains the first four."""

    dtype: str = "auto"
    max_shard_size: int | str = DEFAULT_SHARD_SIZE
    link: bool = False
    allow_mixed_attention: bool = False
    device: str = "auto"
    overwrite: bool = False
    verify: bool = False  # recompute everything before the folder gets its name
    check_loading: bool = True  # build the model class on the meta device and compare names and shapes


def blueprint_for(plan: Plan, source: Source, options: Options = Options()) -> Blueprint:
    """What merging would write, from headers alone."""
    return make_blueprint(
        plan,
        source.checkpoint(),
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        link=options.link,
        allow_mixed_attention=options.allow_mixed_attention,
    )


def merge_checkpoint(
    plan: Plan,
    source: Source,
    out: Path,
    options: Options = Options(),
    *,
    base_model: str | None = None,
    command: str = "",
    progress: Callable[[int], Progress] = lambda total: lambda done: None,
) -> Report:
    """Applies `plan` to `source` and writes a Hugging Face model folder named `out`.

    Args:
        base_model: the Hub id for the model card where `source` is a folder.
        command: the command line, for the card and the report.
        progress: called once with the number of bytes to write; what it returns is called with bytes written, from any
            thread.

    Raises:
        PlanError, CheckpointError: the plan does not fit, or the source is damaged; nothing was written.
        OutputError: the folder is in use, or writing failed; nothing is left.
    """
    started = time.perf_counter()
    check_target(out, overwrite=options.overwrite, marker=PLAN_FILE)
    out = out.resolve()
    blueprint = blueprint_for(plan, source, options)
    checkpoint = blueprint.checkpoint
    _check_apart(out, checkpoint)
    _check_space(out, blueprint)
    runtime = decide(options.device)
    log.info("device %s, %d threads: %s", runtime.device, runtime.workers, runtime.reason)
    plan = replace(plan, model=source.model or base_model, revision=source.revision)
    notes = [*blueprint.warnings, *blueprint.cut.notes]

    with new_folder(out, overwrite=options.overwrite, marker=PLAN_FILE) as scratch:

        def meanwhile() -> None:
            for path in side_files(checkpoint.folder, checkpoint.config):
                shutil.copyfile(path, scratch / path.name)
            if options.check_loading:
                before = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
                after = {output.name: output.shape for output in blueprint.outputs}
                unknown = check_loadable(checkpoint.config, before, blueprint.cut.config, after)
                if unknown:
                    notes.append(f"loading was not checked: {unknown}")

        _write_json(scratch / "config.json", blueprint.cut.config)
        if blueprint.index:
            _write_json(scratch / INDEX_FILE, blueprint.index)
        _write_json(scratch / PLAN_FILE, plan_to_dict(plan))
        card = model_card(blueprint, source.model or base_model, source.revision, command, source.name)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        traffic = execute(blueprint, scratch, runtime, progress(blueprint.bytes_to_compute), meanwhile)
        check_unchanged(checkpoint, source.checkpoint())
        report = Report(
            source=SourceRecord(source.spec, source.model, source.revision, header_hashes(checkpoint)),
            command=command,
            dtype=options.dtype,
            device=runtime.device,
            num_hidden_layers=len(plan.rows),
            num_parameters=blueprint.num_parameters,
            bytes_total=blueprint.bytes_total,
            bytes_copied=traffic.copied,
            bytes_mixed=traffic.mixed,
            bytes_linked=traffic.linked,
            linked_by=traffic.linked_by,
            notes=notes,
            time_s=round(time.perf_counter() - started, 3),
            peak_rss_bytes=peak_rss_bytes(),
            versions=versions(),
            **machine(),
        )
        (scratch / REPORT_FILE).write_text(report_text(report), encoding="utf-8")
        if options.verify:
            verify_folder(scratch, source)
    return report


def _check_apart(out: Path, checkpoint: Checkpoint) -> None:
    """The source is never written to: the output is not in it, and no file of it, links followed, is in the output."""
    real = checkpoint.folder.resolve()
    if out == real or real in out.parents or out in real.parents:
        raise OutputError(f"{out} is, holds or lies in the source folder {real}; choose a folder elsewhere")
    for path in checkpoint.folder.iterdir():
        if out in path.resolve().parents:
            raise OutputError(
                f"{out} holds {path.resolve()}, which the source's {path.name} leads to; choose a folder elsewhere"
            )


def _check_space(out: Path, blueprint: Blueprint) -> None:
    existing = out.parent  # where the scratch folder is made
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    needed = blueprint.bytes_to_write + SPARE_BYTES
    if free < needed:
        raise OutputError(
            f"{out}: {needed:,} bytes are needed but only {free:,} are free; free some, choose another disk, or share "
            "unchanged shards with --link"
        )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
