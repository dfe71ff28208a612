"""The study's data sets as text, for language models: `12 + 34 mod 97 =` and the answer ` 46`.

Permutations are written as digits: `20143 o 01234 =` is apply the right one, then the left one.
"""

import itertools
from typing import Any

from datasets import Dataset, DatasetDict

from .tasks import MODULUS, PERMUTED, Task, make_task, split

SYMBOLS = {"x_plus_y": "+", "x_minus_y": "-", "x_div_y": "/", "permutation": "o"}


def words(task: Task, permuted: int = PERMUTED) -> list[str]:
    """How the symbols of a task are written."""
    if task.name == "permutation":
        return ["".join(map(str, one)) for one in itertools.permutations(range(permuted))]
    return [str(i) for i in range(task.num_symbols)]


def question(task: Task, a: str, b: str) -> str:
    """A pair as text, up to the answer."""
    end = "" if task.name == "permutation" else f" mod {task.num_symbols}"
    return f"{a} {SYMBOLS[task.name]} {b}{end} ="


def documents(
    name: str, seed: int = 0, modulus: int = MODULUS, permuted: int = PERMUTED, fraction: float = 0.5, **metadata: Any
) -> DatasetDict:
    """The split of a seed as lm-eval's documents: question, choices, number of the right one."""
    task = make_task(name, modulus, permuted)
    parts, written = split(task, seed, fraction), words(task, permuted)
    found = {}
    for part, index in (("train", parts.train), ("validation", parts.validation)):
        pairs = zip(task.a[index].tolist(), task.b[index].tolist(), strict=True)
        found[part] = Dataset.from_dict(
            {
                "question": [question(task, written[a], written[b]) for a, b in pairs],
                "choices": [written] * len(index),
                "answer": task.answer[index].tolist(),
            }
        )
    return DatasetDict(found)
