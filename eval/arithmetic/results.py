"""The study's five metrics with their names, and beside each what it hides.

final_train_loss, final_train_acc    means over the last round's batches, taken while the weights move
final_val_loss, final_val_acc        one evaluation, the last; networks leave their solution now and then (Thilak et al.,
                                     arXiv 2206.04817), so the median of the last 20 stands beside it
step_val_acc_99                      the first evaluation above 0.99; the number of updates where none is, which the study
                                     averages as if it were a time. Here `reached` says which it is
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..stats import stderr
from .train import COLUMNS

METRICS = ("final_train_loss", "final_val_loss", "final_train_acc", "final_val_acc", "step_val_acc_99")
THRESHOLD = 0.99
LAST = 20  # evaluations whose median is given


def columns(log: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
    """A log by the names of its columns."""
    return {name: log[:, i] for i, name in enumerate(COLUMNS)}


def metrics(log: npt.NDArray[np.float64], updates: int) -> dict[str, Any]:
    """What a log comes to; JSON has no nan, so what was not measured is None."""
    found = columns(log)
    rounds = {name: values[1:] for name, values in found.items()}
    full = found["full_val_acc"][~np.isnan(found["full_val_acc"])]
    full_loss = found["full_val_loss"][~np.isnan(found["full_val_loss"])]
    above = np.flatnonzero(rounds["val_acc"] > THRESHOLD)
    first = int(above[0]) if len(above) else None
    after = rounds["val_acc"][first:] if first is not None else np.array([])
    result = {
        "final_train_loss": _last(rounds["train_loss"]),
        "final_val_loss": _last(rounds["val_loss"]),
        "final_train_acc": _last(rounds["train_acc"]),
        "final_val_acc": _last(rounds["val_acc"]),
        "step_val_acc_99": float(rounds["step"][first]) if first is not None else float(updates),
        "reached": first is not None,
        "median_val_acc": float(np.median(rounds["val_acc"][-LAST:])) if len(rounds["val_acc"]) else None,
        "median_train_acc": float(np.median(rounds["train_acc"][-LAST:])) if len(rounds["train_acc"]) else None,
        "full_val_acc": float(full[-1]),
        "full_val_loss": float(full_loss[-1]),
        "start_full_val_acc": float(full[0]),
        "fell_below_99": float((after <= THRESHOLD).mean()) if len(after) else None,
    }
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in result.items()}


def _last(values: npt.NDArray[np.float64]) -> float | None:
    return float(values[-1]) if len(values) else None


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with its standard error (n - 1, root n); nan for fewer than two."""

    mean: float
    stderr: float
    count: int

    def __str__(self) -> str:
        mean = f"{self.mean:.0f}" if abs(self.mean) >= 1000 else f"{self.mean:.4g}"
        if math.isnan(self.stderr):
            return mean
        error = f"{self.stderr:.2g}"
        return f"{mean} +- {float(error):.0f}" if "e+" in error else f"{mean} +- {error}"  # updates are in the hundreds


def spread(values: Sequence[float]) -> Spread:
    """Of the values of several seeds."""
    return Spread(float(np.mean(values)) if len(values) else math.nan, stderr(values), len(values))


def final_info(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The study's own summary file: data set -> means, standard errors (correct here) and the values of all seeds."""
    found = {}
    for dataset, several in results.items():
        values = {name: [one[name] for one in several if one[name] is not None] for name in METRICS}
        found[dataset] = {
            "means": {f"{name}_mean": spread(v).mean if v else None for name, v in values.items()},
            "stderrs": {f"{name}_stderr": stderr(v) if len(v) > 1 else None for name, v in values.items()},
            "final_info_dict": values,
        }
    return found
