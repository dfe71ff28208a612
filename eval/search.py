"""A search's problem: a model, a space, and questions and text in three parts, with the hidden states of all trials."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from merge.checkpoint import Checkpoint
from merge.plan import Plan
from merge.space import Space

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
    ) -> torch.Tensor:
        """The loss on the part that is searched on, with a penalty beyond the limit of the text's nats per token; of the text
        only one batch if `batch` says so.
        """
        layers = self.mixture.layers(space.mixes(x.to(self.tail.lm.device)))
        part = self.parts["search"]
        if batch is not None and part.text:
            part = Part(part.questions, (part.text[batch % len(part.text)],))
        value = loss(self.tail, layers, part, weights)
        if limit is not None and part.text:
            value = value + LIMIT_WEIGHT * torch.relu(text_nll(self.tail, layers, part.text) - limit)
        return value

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
class Removal:
    """A layer removed, and the text's nats per token without it and those before."""

    layer: int
    nll: float


@torch.inference_mode()
def greedy_removal(
    tail: Tail, windows: Sequence[Sequence[int]], layers: int, done: Callable[[int], object] = lambda trials: None
) -> list[Removal]:
    """Removes `layers` layers one by one, each time the one without which a text is most probable (SLEB, arXiv 2402.09025).

    Hidden states entering every layer that is left are kept, so a trial runs only the layers above the one that it removes.

    Args:
        windows: the text as token ids, as `objective.text_windows` cuts it.
        done: called with the number of trials just made.
    """
    (text,) = capture_text(tail, windows, 0)
    kept = list(range(len(tail.layers)))
    entering = [text.states]
    removed: list[Removal] = []

    def fill(first: int) -> None:
        """Recomputes what enters the layers after position `first`."""
        del entering[first + 1 :]
        for layer in kept[first:-1]:
            entering.append(tail.through(entering[-1], LayerWeights(layer, {})))

    def nll(position: int) -> float:
        above = [LayerWeights(layer, {}) for layer in kept[position + 1 :]]
        hidden = tail.run(entering[position], above) if above else tail.answers(entering[position])
        return float(-tail.logprobs(hidden, text.targets).mean())

    fill(0)
    for _ in range(layers):
        found = []
        for position in range(len(kept)):
            found.append(nll(position))
            done(1)
        best = min(range(len(kept)), key=lambda position: (math.isnan(found[position]), found[position]))
        removed.append(Removal(kept.pop(best), found[best]))
        if best == len(entering) - 1:  # the last one: nothing above it changes
            entering.pop()
        else:
            fill(best)
    return removed
