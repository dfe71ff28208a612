"""The tables that networks learn: a binary operation over a finite alphabet, every pair once.

    sequence    [a, o, b, =]   four tokens; the answer is a class, never a token
    ids         0..K-1 the operators, K "=", K+1.. the alphabet (K = 1 in all tasks of the study)

Protocol: the `grokking` template of AI-Scientist (Lu et al., arXiv 2408.06292), after Power et al., arXiv 2201.02177.
Where its splits and batches were not seeded, ours are.
"""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import StudyError, near

MODULUS = 97
PERMUTED = 5  # S5


@dataclass(frozen=True)
class Task:
    """All pairs of one or several operations.

    a, b, op, answer    [N] numbers from 0: of the symbols, of the operator, of the class
    """

    name: str
    num_symbols: int
    num_classes: int
    num_ops: int
    a: torch.Tensor
    op: torch.Tensor
    b: torch.Tensor
    answer: torch.Tensor

    def __len__(self) -> int:
        return len(self.a)


def modular(name: str, modulus: int, answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], first_b: int = 0) -> Task:
    """Every (a, b) with a in 0..modulus-1 and b in first_b..modulus-1, in that order."""
    pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(first_b, modulus))
    a, b = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
    return Task(name, modulus, modulus, 1, a, torch.zeros_like(a), b, answer(a, b) % modulus)


def x_plus_y(modulus: int = MODULUS) -> Task:
    """a + b mod p."""
    return modular("x_plus_y", modulus, torch.add)


def x_minus_y(modulus: int = MODULUS) -> Task:
    """a - b mod p."""
    return modular("x_minus_y", modulus, torch.sub)


def x_div_y(modulus: int = MODULUS) -> Task:
    """a * b^(p-2) mod p for b other than 0: a / b where p is prime.

    Raises:
        StudyError: the modulus is not prime, so that division is not defined.
    """
    if modulus < 2 or any(modulus % k == 0 for k in range(2, int(modulus**0.5) + 1)):
        raise StudyError(f"x_div_y needs a prime modulus, found {modulus}; 97 is the study's")
    inverse = torch.tensor([pow(b, modulus - 2, modulus) for b in range(modulus)])
    return modular("x_div_y", modulus, lambda a, b: a * inverse[b], first_b=1)


def permutation(size: int = PERMUTED) -> Task:
    """c[i] = a[b[i]] for permutations a, b of `size` things, numbered in lexicographic order: apply b, then a."""
    elements = list(itertools.permutations(range(size)))
    number = {element: i for i, element in enumerate(elements)}
    answer = [number[tuple(a[i] for i in b)] for a in elements for b in elements]
    pairs = torch.cartesian_prod(torch.arange(len(elements)), torch.arange(len(elements)))
    a, b = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
    return Task("permutation", len(elements), len(elements), 1, a, torch.zeros_like(a), b, torch.tensor(answer))


def three_operations(modulus: int = MODULUS) -> Task:
    """Plus, minus and division over one alphabet; the operator's token tells which."""
    parts = [x_plus_y(modulus), x_minus_y(modulus), x_div_y(modulus)]
    return Task(
        "three_operations", modulus, modulus, len(parts),
        a=torch.cat([one.a for one in parts]),
        op=torch.cat([torch.full_like(one.a, i) for i, one in enumerate(parts)]),
        b=torch.cat([one.b for one in parts]),
        answer=torch.cat([one.answer for one in parts]),
    )  # fmt: skip


MODULAR: dict[str, Callable[[int], Task]] = {
    "x_div_y": x_div_y,
    "x_minus_y": x_minus_y,
    "x_plus_y": x_plus_y,
    "three_operations": three_operations,
}
TASKS = (*MODULAR, "permutation")
STUDIED = ("x_div_y", "x_minus_y", "x_plus_y", "permutation")


def make_task(name: str, modulus: int = MODULUS, permuted: int = PERMUTED) -> Task:
    """The task of that name.

    Raises:
        StudyError: there is none, or the modulus does not suit it.
    """
    if name not in TASKS:
        raise StudyError(f"there is no data set {name!r}{near(name, TASKS)}")
    if modulus < 2 or permuted < 2:
        raise StudyError(f"modulus is {modulus} and permuted {permuted}, expected at least 2")
    return permutation(permuted) if name == "permutation" else MODULAR[name](modulus)


def generator(seed: int, *what: object) -> torch.Generator:
    """A generator for one purpose: streams of different names are independent, the same names give the same stream."""
    text = "/".join(str(part) for part in (seed, *what))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)


@dataclass(frozen=True)
class Split:
    """Numbers of the pairs to train on and to validate on."""

    train: torch.Tensor
    validation: torch.Tensor


def split(task: Task, seed: int, fraction: float = 0.5) -> Split:
    """The pairs shuffled, the first `int(N * fraction)` of them for training. The same for the same seed, task by task.

    Raises:
        StudyError: nothing would be left on one side.
    """
    order = torch.randperm(len(task), generator=generator(seed, "split", task.name, task.num_symbols))
    cut = int(len(task) * fraction)
    if not 0 < cut < len(task):
        raise StudyError(f"a fraction of {fraction} of {len(task)} pairs leaves nothing to train or to validate on")
    return Split(order[:cut], order[cut:])


def draws(total: int, shape: tuple[int, ...], source: torch.Generator) -> torch.Tensor:
    """Numbers below `total`, with replacement; int32, of that shape."""
    return torch.randint(total, shape, generator=source, dtype=torch.int32)
