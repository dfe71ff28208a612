"""A search's problem: a model, a space, and questions and text in three parts, with the hidden states of all trials."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from merge.checkpoint import Checkpoint
from merge.plan import Plan, Row, unit_row
from merge.space import Space

from .bars import Bars, no_bars
from .errors import TrialError
from .lm import PrefixLM
from .mmlu import Subject
from .objective import (
    PARTS,
    TARGETS,
    Array,
    Part,
    capture_questions,
    capture_text,
    encode_questions,
    loss,
    measure,
    text_nll,
    text_windows,
)
from .trial import LayerWeights, Mixture, Tail, first_mixed, plan_tail

LACO_WINDOW, LACO_THRESHOLD, LACO_INTERVAL = 7, 0.45, 1  # as published
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
LIMIT_WEIGHT = 10.0  # of what a gradient search pays per nat of text beyond its limit


@dataclass
class Problem:
    """Everything a trial needs; `cut` is the first row that the space changes. Beside the parts that PARTS names there may be
    `others`: held-out questions of subjects that the search is not about.
    """

    tail: Tail
    mixture: Mixture
    cut: int
    parts: dict[str, Part]

    @property
    def num_tokens(self) -> int:
        """Tokens whose hidden states are kept."""
        return sum(one.states.num_tokens for part in self.parts.values() for one in part.held)

    @property
    def nbytes(self) -> int:
        """Size of the hidden states."""
        return sum(one.states.nbytes for part in self.parts.values() for one in part.held)

    def weights(self, target: str, text_weight: float) -> dict[str, float]:
        """The weight of every term of a target."""
        terms = TARGETS[target]
        return {term: text_weight if term == "text" and len(terms) > 1 else weight for term, weight in terms.items()}

    def tail_of(self, space: Space, x: Sequence[float]) -> list[LayerWeights]:
        """The changed layers for parameters."""
        with torch.no_grad():
            return self.mixture.layers(space.mixes(torch.tensor(x, device=self.tail.lm.device)))

    def loss(
        self, space: Space, x: torch.Tensor, weights: dict[str, float], limit: float | None, batch: int | None = None
    ) -> tuple[torch.Tensor, float]:
        """The loss on the part that is searched on, with a penalty beyond the limit of the text's nats per token, and by how
        much it is missed; of the text only one batch if `batch` says so.
        """
        layers = self.mixture.layers(space.mixes(x.to(self.tail.lm.device)))
        part = self.parts["search"]
        if batch is not None and part.text:
            part = Part(part.questions, (part.text[batch % len(part.text)],))
        if limit is None or not part.text:
            return loss(self.tail, layers, part, weights), 0.0
        over = text_nll(self.tail, layers, part.text) - limit
        rest = {term: weight for term, weight in weights.items() if term != "text"}
        value = loss(self.tail, layers, Part(part.questions, ()), rest) + weights.get("text", 0.0) * (over + limit)
        return value + LIMIT_WEIGHT * torch.relu(over), float(over.detach())

    def limited(self, space: Space, x: torch.Tensor, weights: dict[str, float], limit: float | None) -> tuple[float, float]:
        """(loss, nats per token beyond the limit) on the part that is searched on."""
        layers = self.tail_of(space, x.tolist())
        over = 0.0 if limit is None else self.text_nll(layers, "search") - limit
        return self.value(layers, "search", weights), over

    @torch.inference_mode()
    def value(self, layers: Sequence[LayerWeights], part: str, weights: dict[str, float]) -> float:
        """The loss on a part."""
        return float(loss(self.tail, layers, self.parts[part], weights))

    @torch.inference_mode()
    def text_nll(self, layers: Sequence[LayerWeights], part: str) -> float:
        """Nats per token of the text of a part; infinite where there is none."""
        text = self.parts[part].text
        return float(text_nll(self.tail, layers, text)) if text else math.inf

    def measure(self, plan: Plan | None, checkpoint: Checkpoint, part: str) -> dict[str, Array]:
        """What a plan reaches on a part, question by question and token by token; None is the original model."""
        if plan is None:
            layers = [LayerWeights(i, {}) for i in range(self.cut, checkpoint.num_hidden_layers)]
        else:
            layers = plan_tail(self.tail, plan, checkpoint, self.cut, allow_mixed_attention=True)
        return measure(self.tail, layers, self.parts[part])


def make_problem(
    lm: PrefixLM,
    space: Space,
    subjects: Sequence[Subject],
    text: str | None,
    *,
    num_fewshot: int,
    limit: int | None,
    seed: int,
    text_tokens: int,
    text_window: int,
    text_batch: int | None = None,
    others: Sequence[Subject] = (),
    folder: Path | None = None,
    done: Callable[[int], object] = lambda tokens: None,
) -> Problem:
    """Runs the model once over all questions and texts, and keeps what enters the first row that the space changes.

    Args:
        subjects: may be empty; then only text counts.
        limit: questions per subject.
        text_tokens: of the text for the search, and half as many for each of the other parts.
        text_batch: tokens of it that one gradient step takes; all if not given.
        others: subjects of which only held-out questions are asked, to see what the search did to them.
        folder: keeps the hidden states; what is there already is read.
        done: called with the number of tokens just run.
    """
    tail, cut = Tail(lm), first_mixed(space)
    encoded = encode_questions(lm, subjects, num_fewshot, limit, seed) if subjects else {}
    windows = text_windows(lm, text, [text_tokens, text_tokens // 2, text_tokens // 2], text_window) if text else {}
    parts = {}
    for part in PARTS:
        questions = capture_questions(tail, encoded[part], cut, done, folder) if encoded and encoded[part].ids else None
        parts[part] = Part(questions, capture_text(tail, windows[part], cut, done, text_batch, folder) if windows else ())
    if others:
        found = encode_questions(lm, others, num_fewshot, limit, seed)["held-out"]
        if found.ids:
            parts["others"] = Part(capture_questions(tail, found, cut, done, folder), ())
    return Problem(tail, Mixture(tail, space, cut), cut, parts)


@dataclass(frozen=True)
class Collapse:
    """A window of layers [first, last], by their places in the stack at that time, and the cosine if it became one layer."""

    first: int
    last: int
    cosine: float
    accepted: bool


@torch.inference_mode()
def laco_collapse(
    tail: Tail,
    checkpoint: Checkpoint,
    inputs: Sequence[Sequence[int]],
    layers: int,
    *,
    window: int = LACO_WINDOW,
    threshold: float = LACO_THRESHOLD,
    interval: int = LACO_INTERVAL,
    done: Callable[[Collapse], object] = lambda tried: None,
) -> tuple[Plan, list[Collapse]]:
    """Makes windows of layers one, from the top down, while the model's last hidden states keep their direction (LaCo).

    A window becomes its lowest layer plus the differences of all others to it; it is accepted where the cosine of the
    last hidden states at the inputs' last tokens to those of the original model, mean over inputs, is above the threshold
    (Yang et al., arXiv 2402.11187, algorithm 1). The last window is as small as `layers` asks.

    Raises:
        TrialError: fewer than `layers` layers can go at this threshold.
    """
    total = len(tail.layers)
    states = [tail.capture(inputs, [len(one) - 1 for one in inputs], 0)]
    for layer in range(total - 1):
        states.append(tail.through(states[-1], LayerWeights(layer, {})))
    norm = next(getattr(tail.decoder, name) for name in FINAL_NORMS if hasattr(tail.decoder, name))
    original = norm(tail.run(states[-1], [LayerWeights(total - 1, {})])).float()

    def cosine(rows: Sequence[Row], lowest: int) -> float:
        plan = Plan(tuple(rows), total)
        hidden = tail.run(states[lowest], plan_tail(tail, plan, checkpoint, lowest, allow_mixed_attention=True))
        return float(torch.nn.functional.cosine_similarity(norm(hidden).float(), original, dim=-1).mean())

    rows, tried = [unit_row(layer) for layer in range(total)], []
    window = min(window, total)
    first = total - window
    while first >= 0 and total - len(rows) < layers:
        last = min(first + window - 1, len(rows) - 1, first + layers - (total - len(rows)))
        mix = {layer: (first - last + 1) * c for layer, c in rows[first].mix.items()}
        for row in rows[first + 1 : last + 1]:
            for layer, c in row.mix.items():
                mix[layer] = mix.get(layer, 0.0) + c
        merged = Row(rows[first].base, {layer: c for layer, c in mix.items() if c})
        candidate = [*rows[:first], merged, *rows[last + 1 :]]
        found = cosine(candidate, first)
        tried.append(Collapse(first, last, found, found > threshold))
        done(tried[-1])
        if found > threshold:
            rows = candidate
            first = min(first - interval, len(rows) - window)
        else:
            first -= 1
    if total - len(rows) < layers:
        best = max((one.cosine for one in tried if not one.accepted), default=math.nan)
        raise TrialError(
            f"only {total - len(rows)} of {layers} layers can go at a threshold of {threshold}; the best cosine refused was "
            f"{best:.3f}, so lower the threshold, or try another window"
        )
    return Plan(tuple(rows), total, name=f"laco-{layers}", method="laco"), tried


@dataclass(frozen=True)
class Removal:
    """A layer removed, and the text's nats per token without it and those before; `tried` has them for every candidate."""

    layer: int
    nll: float
    tried: Mapping[int, float] = field(default_factory=dict, compare=False)


@torch.inference_mode()
def greedy_removal(
    tail: Tail,
    windows: Sequence[Sequence[int]],
    layers: int,
    done: Callable[[int], object] = lambda trials: None,
    *,
    begun: Sequence[Removal] = (),
    chosen: Callable[[list[Removal]], object] = lambda removed: None,
) -> list[Removal]:
    """Removes `layers` layers one by one, each time the one without which a text is most probable (SLEB, arXiv 2402.09025).

    Hidden states entering every layer that is left are kept, so a trial runs only the layers above the one that it removes.

    Args:
        windows: the text as token ids, as `objective.text_windows` cuts it.
        done: called with the number of trials just made.
        begun: what an earlier call removed by the same text, to go on from.
        chosen: called with all that is removed after each layer.
    """
    (text,) = capture_text(tail, windows, 0)
    removed = list(begun)
    kept = [layer for layer in range(len(tail.layers)) if layer not in {one.layer for one in removed}]
    entering = [text.states]

    def fill(first: int) -> None:
        """Recomputes what enters the layers after position `first`."""
        del entering[first + 1 :]
        for layer in kept[first:-1]:
            entering.append(tail.through(entering[-1], LayerWeights(layer, {})))

    def nll(position: int) -> float:
        above = [LayerWeights(layer, {}) for layer in kept[position + 1 :]]
        hidden = tail.run(entering[position], above) if above else tail.answers(entering[position])
        return float(-tail.logprobs(hidden[text.rows], text.targets).mean())

    fill(0)
    for _ in range(layers - len(removed)):
        found = []
        for position in range(len(kept)):
            found.append(nll(position))
            done(1)
        best = min(range(len(kept)), key=lambda position: (math.isnan(found[position]), found[position]))
        tried = dict(zip(kept, found, strict=True))
        removed.append(Removal(kept.pop(best), found[best], tried))
        if best == len(entering) - 1:  # the last one: nothing above it changes
            entering.pop()
        else:
            fill(best)
        chosen(removed)
    return removed


def remove_by_text(lm: PrefixLM, text: str, layers: int, tokens: int, window: int, bars: Bars = no_bars) -> list[Removal]:
    """What `greedy_removal` takes away by the first `tokens` tokens of a text, in windows of `window`."""
    tail = Tail(lm)
    windows = text_windows(lm, text, [tokens, 0, 0], window)["search"]
    trials = sum(len(tail.layers) - step for step in range(layers))
    with bars("removing greedily", "trial", trials) as bar:
        return greedy_removal(tail, windows, layers, bar.update)
