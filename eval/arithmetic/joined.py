"""Small trained models joined by their features: a host that lost its top layers reads a donor of another family.

The donor learned the same pairs of the same seed, so it knows nothing of the validation pairs either. Fusers are trained on the
training pairs, with loss on the answer alone as everything in the grid; what they can do by themselves is what the same host
gains from a donor that has learned nothing.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from merge.fusion.assemble import FUSERS_FILE, make_parts, write_assembled
from merge.fusion.make import load_fused
from merge.fusion.mixers import MODES as MIXERS
from merge.fusion.recipe import Backbone, Recipe
from merge.publish import new_folder
from merge.source import Source

from ..errors import StudyError

SETTINGS_FILE = "features.json"


@dataclass(frozen=True)
class Features:
    """How a host is made to read a donor; `modes` of merge.fusion."""

    modes: tuple[str, ...] = ("attention",)
    updates: int = 300
    learning_rate: float = 3e-3
    rank: int = 32


def identity(settings: Features) -> str:
    """What a folder was made with."""
    return json.dumps(asdict(settings)) + "\n"


def step_on_answers(model: Any, tokens: torch.Tensor, optimiser: torch.optim.Optimizer, what: str, update: int) -> None:
    """One update on questions with answers [N, T], with loss on the answer, which comes last.

    Raises:
        StudyError: the loss of `what` is no longer a number.
    """
    logits = model(tokens[:, :-1], use_cache=False, logits_to_keep=1).logits[:, -1]
    loss = functional.cross_entropy(logits, tokens[:, -1])
    if not math.isfinite(loss.item()):
        raise StudyError(f"{what}: the loss is no longer a number at update {update + 1}")
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def join(
    settings: Features,
    mode: str,
    host: Path,
    donor: Path,
    tokens: torch.Tensor,
    out: Path,
    device: str,
    progress: Callable[[int], None] = lambda updates: None,
) -> None:
    """Writes a fused model of two folders, trained on questions with answers: token ids [N, T], the answer last.

    Args:
        progress: called with the number of updates just made; of a mode that learns nothing, with all of them at once.

    Raises:
        StudyError: the loss is no longer a number. FusionError: the two cannot be joined.
    """
    taps: tuple[float, ...] = () if mode in MIXERS else (0.5, 1.0)
    fusion: dict[str, Any] = {"mode": mode}
    if mode not in MIXERS:
        fusion |= {"sites": [0.5, 1.0], "rank": settings.rank, "heads": 4}
    recipe = Recipe(Backbone(str(host)), (Backbone(str(donor), taps=taps),), fusion)
    parts = make_parts(recipe, [Source(str(folder), folder) for folder in (host, donor)], dtype="float32")
    with new_folder(out) as scratch:
        write_assembled(parts, scratch, progress=lambda total: lambda done: None)
        (scratch / SETTINGS_FILE).write_text(identity(settings))
        model = load_fused(scratch, device)
        if not model.fuser_parameters():
            progress(settings.updates)
            return
        optimiser = torch.optim.AdamW(model.fusers.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        tokens = tokens.to(device)
        for update in range(settings.updates):
            step_on_answers(model, tokens, optimiser, f"{out}", update)
            progress(1)
        values = {name: value.detach().cpu() for name, value in model.fuser_parameters().items()}
        save_file(load_file(scratch / FUSERS_FILE) | values, scratch / FUSERS_FILE, {"format": "pt"})
