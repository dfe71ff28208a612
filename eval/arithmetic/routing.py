"""Whether dynamic fusion routes: how even its weights are, and what it loses when they belong to another input."""

import math
from typing import Any

import torch

from .layers import Parameters, Sequences
from .models import Model, dynamic_logits, routing_weights
from .tasks import Task


def routing(model: Model, task: Task, pairs: torch.Tensor, p: Parameters, generator: torch.Generator) -> dict[str, Any]:
    """Of a trained network with dynamic fusion, over the given pairs.

    Returns:
        routing_entropy   mean over pairs and heads of -sum_k w_k ln w_k, over ln K: 1 is even, 0 is one output alone
        unshuffled_acc    accuracy with the weights as they are
        shuffled_acc      accuracy when every pair gets the weights of another, drawn without replacement; where it is the same,
                          the weights need not depend on the input
    """
    with torch.inference_mode():
        sequences = Sequences(task.a[pairs], task.op[pairs], task.b[pairs], task.num_symbols, task.num_ops)
        weights, outputs = routing_weights(model, p, sequences)
        answers = task.answer[pairs]

        def accuracy(weights: torch.Tensor) -> float:
            return float((dynamic_logits(p, weights, outputs).argmax(-1) == answers).double().mean())

        entropy = torch.special.entr(weights.double()).sum(0).mean() / math.log(max(2, len(outputs)))
        others = weights[:, torch.randperm(len(pairs), generator=generator)]
        return {"routing_entropy": float(entropy), "unshuffled_acc": accuracy(weights), "shuffled_acc": accuracy(others)}
