"""One pass of a model over calibration texts: what enters each layer at the last token, and how far each layer turns it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from merge.similarity import Activations

from .errors import DataError
from .lm import PrefixLM
from .mmlu import LETTERS, Subject

MIN_TEXTS = 2  # a comparison needs two points


class Gathered:
    """Activations as they come in, layer by layer and text by text."""

    def __init__(self, layers: int, texts: int, hidden_size: int) -> None:
        self.inputs = np.empty((layers + 1, texts, hidden_size))
        self.cosines, self.tokens = np.zeros(layers), np.zeros(layers)

    def add(self, layer: int, text: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """What enters and leaves a layer, [T, D] each."""
        before, after = before.float(), after.float()
        for index, one in ((layer, before), (layer + 1, after)):
            self.inputs[index, text] = one[-1].cpu().double().numpy()
        self.cosines[layer] += float(torch.nn.functional.cosine_similarity(before, after, dim=-1).sum())
        self.tokens[layer] += len(before)

    def activations(self) -> Activations:
        """The result.

        Raises:
            DataError: activations that are not numbers.
        """
        if not np.isfinite(self.inputs).all():
            raise DataError("activations are not numbers; the model's weights hold NaN or overflow")
        return Activations(self.inputs, self.cosines / self.tokens)


def check_texts(texts: Sequence[str]) -> None:
    """Refuses too few."""
    if len(texts) < MIN_TEXTS:
        raise DataError(f"found {len(texts)} calibration texts, expected at least {MIN_TEXTS}")


@torch.inference_mode()
def capture_activations(lm: PrefixLM, texts: Sequence[str], done: Callable[[int], object] = lambda texts: None) -> Activations:
    """Runs every text once, alone, so that no padding is seen; texts beyond the model's window lose their beginning.

    Raises:
        DataError: fewer than two texts, an empty one, or activations that are not numbers.
    """
    check_texts(texts)
    layers = list(lm.model.get_decoder().layers)
    gathered = Gathered(len(layers), len(texts), lm.model.config.get_text_config().hidden_size)
    number = 0

    def note(index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            gathered.add(index, number, before[0], (output[0] if isinstance(output, tuple) else output)[0])

        return hook

    hooks = [layer.register_forward_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for number, text in enumerate(texts):
            ids = lm.tok_encode(text)[-lm.max_length :]
            if not ids:
                raise DataError(f"calibration text {number} is empty")
            lm.model(input_ids=torch.tensor([ids], device=lm.device), use_cache=False, logits_to_keep=1)
            done(1)
    finally:
        for one in hooks:
            one.remove()
    return gathered.activations()


def question_texts(subjects: Sequence[Subject], per_subject: int) -> list[str]:
    """The first dev questions of each subject as bare prompts: question, options, "Answer:". Never test questions."""
    return [
        "\n".join([q.question.strip(), *(f"{x}. {c}" for x, c in zip(LETTERS, q.choices, strict=True)), "Answer:"])
        for subject in subjects
        for q in subject.dev[:per_subject]
    ]
