"""From a model and calibration texts to alphas, or to layers to drop: one pass over the texts, or many where a method tries."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from merge.methods import check_count, plan_dropping
from merge.plan import Plan
from merge.similarity import (
    IMPORTANCE,
    SIMILARITIES,
    Activations,
    Array,
    alphas_from_similarity,
    fold_top,
    plan_from_similarity,
)
from merge.source import Source

from .activations import capture_activations
from .bars import Bars, no_bars
from .errors import DataError, near
from .load import load_model
from .search import LACO_INTERVAL, LACO_THRESHOLD, LACO_WINDOW, Collapse, Removal, laco_collapse, remove_by_text
from .streamed import capture_streamed
from .trial import Tail

log = logging.getLogger(__name__)

METHODS = (*SIMILARITIES, *IMPORTANCE, "sleb", "laco")


@dataclass(frozen=True)
class Similarity:
    """What a method found; beside the plan there is what it measured.

    similarity   [L, L] of the layers' inputs, with the alphas that follow, lowest layer first; `replaced` of them are 0.5
                 because a similarity is not a number
    influence    [L] of every layer: 1 - cosine of what enters and leaves it
    removed      what sleb took away, in order
    """

    plan: Plan
    similarity: Array | None = None
    alphas: tuple[float, ...] = ()
    replaced: int = 0
    influence: tuple[float, ...] = ()
    removed: tuple[Removal, ...] = ()


def measure_similarity(
    source: Source,
    layers: int,
    texts: Sequence[str] = (),
    *,
    method: str = "mka",
    seed: int = 0,
    window: int = LACO_WINDOW,
    threshold: float = LACO_THRESHOLD,
    interval: int = LACO_INTERVAL,
    text_tokens: int = 4096,
    text_window: int = 1024,
    stream: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int | str = "auto",
    tried: Callable[[Collapse], object] = lambda collapse: None,
    bars: Bars = no_bars,
) -> Similarity:
    """The plan that removes `layers` layers by a method of METHODS, with what the method measured.

    Args:
        source: of `merge.resolve`.
        texts: for calibration; sleb reads them as one.
        seed: of the mutual information's tie-breaking.
        window, threshold, interval: of laco.
        text_tokens, text_window: of sleb.
        stream: one layer in memory at a time, for methods of one pass.
        tried: called with every window of layers that laco tries.
        bars: makes progress bars.

    Raises:
        EvalError, MergeError: an unknown method, too few texts, or a model that cannot be had.
    """
    if method not in METHODS:
        raise DataError(f"there is no method {method!r}{near(method, METHODS)}")
    checkpoint = source.checkpoint()
    total = checkpoint.num_hidden_layers
    check_count(layers, total)
    if not texts:
        raise DataError("there are no calibration texts")
    if stream and method in (*SIMILARITIES, *IMPORTANCE):
        with bars("calibrating", "layer", total) as bar:
            activations = capture_streamed(checkpoint, texts, device, dtype, bar.update)
        return _from_activations(activations, layers, method, seed)
    lm, placement = load_model(checkpoint, device, dtype, batch_size=batch_size)
    if method == "sleb":
        removed = remove_by_text(lm, "\n\n".join(texts), layers, text_tokens, text_window, bars)
        return Similarity(plan_dropping([one.layer for one in removed], total), removed=tuple(removed))
    if method == "laco":
        inputs = list(dict.fromkeys(tuple(lm.tok_encode(text)[-lm.max_length :]) for text in texts))
        with bars("collapsing", "window", 0) as bar:

            def done(collapse: Collapse) -> None:
                bar.update(1)
                tried(collapse)

            plan, _ = laco_collapse(
                Tail(lm), checkpoint, inputs, layers, window=window, threshold=threshold, interval=interval, done=done
            )
        return Similarity(plan)
    if placement.device_map == "auto":
        log.warning("the model does not fit into memory; --stream reads every layer only once")
    with bars("calibrating", "text", len(texts)) as bar:
        return _from_activations(capture_activations(lm, texts, bar.update), layers, method, seed)


def _from_activations(activations: Activations, layers: int, method: str, seed: int) -> Similarity:
    """What one pass over the texts tells."""
    if method in IMPORTANCE:
        plan = plan_from_similarity(method, activations, layers)
        return Similarity(plan, influence=tuple((1.0 - activations.cosines).tolist()))
    similarity = SIMILARITIES[method](activations, seed)
    alphas, replaced = alphas_from_similarity(similarity, layers)
    plan = fold_top(alphas, activations.num_hidden_layers, f"{method}-{layers}")
    return Similarity(plan, similarity, tuple(alphas), replaced)
