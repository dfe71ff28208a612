"""Projected RegMean from two models' files to a folder, where held-out text allows it: what scripts/project.py runs."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from merge.fusion.byte_tables import ByteTable, Encode, text_encoder
from merge.fusion.errors import FusionError
from merge.fusion.positions import Align, mapped_tokens, same_tokens
from merge.fusion.projection import (
    ALPHAS,
    REPORT_FILE,
    HeldOut,
    ProjectionReport,
    choose_alpha,
    moment_bytes,
    passes,
    project,
    save,
)
from merge.fusion.vocabulary import same_tokenizer, vocabulary_map
from merge.publish import check_can_appear
from merge.source import Source

from .bars import Bars, no_bars
from .bits import measure
from .lm import PrefixLM
from .load import load_model

log = logging.getLogger(__name__)

BATCH = 8  # texts at once, unless the caller says how many


@dataclass(frozen=True)
class Projected:
    """What was written: the step's alpha, how well the models' layers match, and held-out bits per byte by alpha."""

    alpha: float
    report: ProjectionReport
    held_out: HeldOut


def project_weights(
    host: Source,
    donor: Source,
    texts: Sequence[str],
    held_out: Sequence[str],
    out: Path,
    *,
    alpha: float | None = None,
    alphas: Sequence[float] = ALPHAS,
    basis: str = "ridge",
    max_tokens: int = 512,
    layers_per_pass: int | None = None,
    force: bool = False,
    overwrite: bool = False,
    command: str = "",
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int | str = "auto",
    matched: Callable[[ProjectionReport], object] = lambda report: None,
    measured: Callable[[HeldOut], object] = lambda held_out: None,
    bars: Bars = no_bars,
) -> Projected:
    """Writes the host, moved towards what the donor writes, to the folder `out`; what was written and how it does.

    Args:
        host, donor: of `merge.resolve`; the host keeps its architecture.
        texts: what both read.
        held_out: documents that decide on alpha.
        alpha: write this one; by default the best of `alphas`.
        max_tokens: of a text.
        layers_per_pass: by default as many as there is memory for.
        force: write it although held-out loss rises.
        command: the command line, for the model card.
        matched, measured: called with what is known on the way, before it may come to nothing.
        bars: makes progress bars.

    Raises:
        FusionError: models that cannot be matched, or no alpha lowers held-out loss; nothing was written.
        MergeError, EvalError: a model cannot be had, or the folder is in use.
    """
    check_can_appear(out, overwrite=overwrite, marker=REPORT_FILE)
    into, out_of = (load_model(one.checkpoint(), device, dtype)[0] for one in (host, donor))
    align = _aligned(into, out_of, max_tokens)
    each, layers = moment_bytes(into.model), len(into.model.base_model.layers)
    step = layers_per_pass or min(layers, _room_for(each, into.device))
    batch = BATCH if batch_size == "auto" else int(batch_size)
    log.info("%d of %d layers at a time, %.1f GB of moments", step, layers, step * each / 1e9)
    positions = sum(len(align([text]).host_positions) for text in texts) * passes(layers, step)
    with bars("positions", "position", positions) as bar:
        projection = project(
            into.model, out_of.model, texts, align, basis=basis, batch_size=batch, layers_per_pass=step, progress=bar.update
        )
    matched(projection.report)
    found = choose_alpha(
        into.model,
        projection,
        lambda model: measure(model, into.tokenizer, held_out, batch=batch, device=str(into.device)).per_byte,
        [*alphas, *([] if alpha is None else [alpha])],
    )
    measured(found)
    if alpha is None and found.alpha == 0.0:
        raise FusionError(
            "no alpha lowers held-out loss, which is what mostly happens without training afterwards; nothing was written "
            f"(--alpha {min(one for one in alphas if one):g} --force would write that one)"
        )
    names = [host.name, donor.name]
    written = save(
        into.model, projection, found, out, alpha=alpha, tokenizer=into.tokenizer, names=names, command=command, force=force,
        overwrite=overwrite,
    )  # fmt: skip
    return Projected(written, projection.report, found)


def _aligned(host: PrefixLM, donor: PrefixLM, max_tokens: int) -> Align:
    """Which positions of both models are compared: all but that of the token that begins a text."""
    begin = [host.tokenizer.bos_token_id] if host.tokenizer.bos_token_id is not None else []

    def encoding(plain: Encode) -> Encode:
        return lambda texts: [begin + ids for ids in plain(texts)]

    if same_tokenizer(host.tokenizer, donor.tokenizer):
        plain = encoding(lambda texts: host.tokenizer(list(texts), add_special_tokens=False)["input_ids"])
        return same_tokens(plain, max_tokens, skip=len(begin))
    own, other = (
        ByteTable.from_tokenizer(one.tokenizer, one.model.config.get_text_config().vocab_size) for one in (host, donor)
    )
    encode = text_encoder(host.tokenizer, own)
    table = vocabulary_map(own, other, text_encoder(donor.tokenizer, other))
    return mapped_tokens(encoding(encode), table, max_tokens, skip=len(begin))


def _room_for(each: int, device: torch.device) -> int:
    """How many layers' moments a third of the device's free memory has room for."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return max(1, int(free / 3 // each))
