"""One pass of a model over calibration texts: what enters each layer at the last token, and how far each layer turns it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from merge.similarity import Activations

from .errors import DataError
from .lm import PrefixLM
from .mmlu import LETTERS, Subject


@torch.inference_mode()
def capture_activations(lm: PrefixLM, texts: Sequence[str], done: Callable[[int], object] = lambda texts: None) -> Activations:
    """Runs every text once, alone, so that no padding is seen; texts beyond the model's window lose their beginning.

    Raises:
        DataError: fewer than two texts, an empty one, or activations that are not numbers.
    """
    if len(texts) < MIN_TEXTS:
        raise DataError(f"found {len(texts)} calibration texts, expected at least {MIN_TEXTS}")
    layers = list(lm.model.get_decoder().layers)
    inputs = np.empty((len(layers) + 1, len(texts), lm.model.config.get_text_config().hidden_size))
    cosines, tokens = np.zeros(len(layers)), 0
    seen: dict[int, torch.Tensor] = {}

    def note(index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = (args[0] if args else kwargs["hidden_states"])[0].float()
            after = (output[0] if isinstance(output, tuple) else output)[0].float()
            seen[index], seen[index + 1] = before[-1], after[-1]
            cosines[index] += float(torch.nn.functional.cosine_similarity(before, after, dim=-1).sum())

        return hook

    hooks = [layer.register_forward_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for sample, text in enumerate(texts):
            ids = lm.tok_encode(text)[-lm.max_length :]
            if not ids:
                raise DataError(f"calibration text {sample} is empty")
            lm.model(input_ids=torch.tensor([ids], device=lm.device), use_cache=False, logits_to_keep=1)
            for layer, vector in seen.items():
                inputs[layer, sample] = vector.cpu().double().numpy()
            tokens += len(ids)
            done(1)
    finally:
        for one in hooks:
            one.remove()
    if not np.isfinite(inputs).all():
        raise DataError("activations are not numbers; the model's weights hold NaN or overflow")
    return Activations(inputs, cosines / tokens)


def question_texts(subjects: Sequence[Subject], per_subject: int) -> list[str]:
    """The first dev questions of each subject as bare prompts: question, options, "Answer:". Never test questions."""
    return [
        "\n".join([q.question.strip(), *(f"{x}. {c}" for x, c in zip(LETTERS, q.choices, strict=True)), "Answer:"])
        for subject in subjects
        for q in subject.dev[:per_subject]
    ]


MIN_TEXTS = 2  # a comparison needs two points
