"""How alike the layers of a model are, and which of them matter least: scores from activations, plans from scores.

    S       calibration samples, one vector for each per layer (their last token)
    X[l]    [S, D] what enters layer l, for l = 0..L; X[L] leaves the last layer
    s[i,j]  similarity of the inputs of layers i and j, [L, L]
    cos[l]  mean over all tokens of the cosine between what enters and what leaves layer l, [L]

Similarities: linear CKA (Kornblith et al. 2019, equation 7), angular (1 - angle / pi), and MKA (Liu et al., arXiv 2406.16330)
as its text intends it: samples are the points of a diffusion map, and normalised mutual information compares layers.
What the released code of MKA computes instead is `released`: layers dropped from the top (docs/searching.md).
Importance: block influence (Men et al., arXiv 2403.03853, equation 1) and the angular distance over blocks of layers
(Gromov et al., arXiv 2403.17887, equation 4).
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import PlanError
from .methods import check_count, plan_dropping, plan_from_method
from .plan import Plan, chain, compose

Array = npt.NDArray[np.float64]

SIGMA = 8.0  # of MKA's kernel, as published
DIFFUSION_ALPHA = 0.5  # how far the density of samples is divided out
DIMENSIONS = 2  # of the diffusion map
MI_NEIGHBOURS, ENTROPY_NEIGHBOURS = 5, 50  # as published
TIE_BREAK = 1e-10
FALLBACK_ALPHA = 0.5  # where a similarity is not a number


@dataclass(frozen=True)
class Activations:
    """`inputs` [L + 1, S, D]: what enters each layer at the last token of each sample, and what leaves the last layer;
    `cosines` [L]: between what enters and what leaves a layer, mean over all tokens.
    """

    inputs: Array
    cosines: Array

    @property
    def num_hidden_layers(self) -> int:
        """Layers."""
        return len(self.cosines)


# ---------------------------------------------------------------------------------------------------------------------
# Similarity of layers: [L, L]


def linear_cka(activations: Activations, seed: int = 0) -> Array:
    """|Y^T X|^2 / (|X^T X| |Y^T Y|) of centred inputs (Frobenius norms), from Gram matrices; 1 for a rotated representation."""
    centred = activations.inputs[:-1] - activations.inputs[:-1].mean(axis=1, keepdims=True)
    grams = np.einsum("lsd,ltd->lst", centred, centred).reshape(len(centred), -1)
    norms = np.linalg.norm(grams, axis=1)
    norms[norms == 0.0] = 1.0
    found: Array = (grams @ grams.T) / np.outer(norms, norms)
    return found


def angular(activations: Activations, seed: int = 0) -> Array:
    """1 - angle / pi between the inputs of two layers, mean over samples: 1 for the same direction, 0 for opposite ones."""
    unit = activations.inputs[:-1]
    unit = unit / np.maximum(np.linalg.norm(unit, axis=2, keepdims=True), 1e-300)
    cosines = np.clip(np.einsum("isd,jsd->ijs", unit, unit), -1.0, 1.0)
    found: Array = 1.0 - (np.arccos(cosines) / math.pi).mean(axis=2)
    return found


def mka(activations: Activations, seed: int = 0) -> Array:
    """Normalised mutual information of the layers' diffusion maps; not a number where an entropy is not below zero.

    Raises:
        PlanError: fewer samples than the entropy's neighbours, plus one.
    """
    layers, samples = activations.inputs[:-1], activations.inputs.shape[1]
    if samples <= ENTROPY_NEIGHBOURS:
        raise PlanError(
            f"MKA needs more than {ENTROPY_NEIGHBOURS} samples for its {ENTROPY_NEIGHBOURS} neighbours, found {samples}"
        )
    maps = np.stack([_ranks(diffusion_map(layer)) for layer in layers])
    entropies = np.array([entropy(one) for one in maps])
    entropies[entropies >= 0.0] = np.nan  # the root of two that are not negative would mean nothing
    # Ranks lie on a lattice, so distances tie; noise that is far smaller than its steps decides, the same for every pair.
    maps = maps + TIE_BREAK * np.random.default_rng(seed).standard_normal(maps.shape)
    coordinates = maps.transpose(0, 2, 1).reshape(-1, samples)
    information = mutual_information(coordinates).reshape(len(maps), DIMENSIONS, len(maps), DIMENSIONS).mean(axis=(1, 3))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = information / np.sqrt(np.outer(entropies, entropies))
    return found


def diffusion_map(points: Array, sigma: float = SIGMA) -> Array:
    """[S, D] -> [S, 2]: the second and third eigenvector of the normalised kernel exp(-sqrt(distance / sigma)), over the first.

    Signs are fixed: the entry of largest size is positive.
    """
    squares = (points**2).sum(axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2.0 * points @ points.T, 0.0))
    np.fill_diagonal(distances, 0.0)
    kernel = np.exp(-np.sqrt(distances / sigma))
    density = kernel.sum(axis=0)
    kernel = kernel / np.outer(density, density) ** DIFFUSION_ALPHA
    root = np.sqrt(kernel.sum(axis=0))
    _, vectors = np.linalg.eigh(kernel / np.outer(root, root))
    chosen = vectors[:, ::-1][:, 1 : 1 + DIMENSIONS]
    signs = np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(chosen.shape[1])])
    found: Array = chosen * signs / (root / np.linalg.norm(root))[:, None]  # the first is known: root / |root|
    return found


def entropy(points: Array, neighbours: int = ENTROPY_NEIGHBOURS) -> float:
    """-mean log(k / (S rho^d)), rho the distance to the k-th neighbour, as the method defines it."""
    tree = importlib.import_module("scipy.spatial").cKDTree(points)
    rho = tree.query(points, k=neighbours + 1)[0][:, -1]  # the nearest is the point itself
    return float(-np.mean(np.log(neighbours / (len(points) * rho ** points.shape[1]))))


def mutual_information(variables: Array, neighbours: int = MI_NEIGHBOURS) -> Array:
    """Between all variables [V, S], in nats, none below zero: [V, V] (Kraskov et al. 2004, equation 8).

    As scikit-learn's mutual_info_regression of one feature, for all pairs at once: that takes 8 ms for each, and the layers
    of a model make thousands.
    """
    digamma = importlib.import_module("scipy.special").digamma
    count = variables.shape[1]
    distances = np.abs(variables[:, :, None] - variables[:, None, :])
    distances[:, range(count), range(count)] = np.inf  # a point is not its own neighbour
    found = np.empty((len(variables), len(variables)))
    for i, one in enumerate(distances):
        joint = np.maximum(one, distances)
        radius = np.nextafter(np.partition(joint, neighbours - 1, axis=2)[:, :, neighbours - 1, None], 0.0)
        near = digamma(1 + (one <= radius).sum(axis=2)) + digamma(1 + (distances <= radius).sum(axis=2))
        found[i] = digamma(count) + digamma(neighbours) - near.mean(axis=1)
    np.maximum(found, 0.0, out=found)
    return found


def _ranks(values: Array) -> Array:
    """Each column replaced by its ranks over S: 0, 1/S, ..."""
    order = values.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    found: Array = order / len(values)
    return found


SIMILARITIES: dict[str, Callable[[Activations, int], Array]] = {"mka": mka, "cka": linear_cka, "angular": angular}


# ---------------------------------------------------------------------------------------------------------------------
# Importance: which layers to remove


def block_influence(activations: Activations, layers: int) -> list[int]:
    """The `layers` layers that change their input least: 1 - cos, each by itself."""
    influence = 1.0 - activations.cosines
    return sorted(int(layer) for layer in np.argsort(influence, kind="stable")[:layers])


def angular_block(activations: Activations, layers: int) -> list[int]:
    """The `layers` consecutive layers over which the angle between what enters and what leaves them is least."""
    unit = activations.inputs / np.maximum(np.linalg.norm(activations.inputs, axis=2, keepdims=True), 1e-300)
    cosines = np.clip((unit[:-layers] * unit[layers:]).sum(axis=2), -1.0, 1.0)
    first = int(np.arccos(cosines).mean(axis=1).argmin())
    return list(range(first, first + layers))


IMPORTANCE: dict[str, Callable[[Activations, int], list[int]]] = {
    "block-influence": block_influence,
    "angular-block": angular_block,
}


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def alphas_from_similarity(similarity: Array, layers: int, beta: float = 1.0) -> tuple[list[float], int]:
    """(alphas of the chain that folds the top `layers` + 1 layers, lowest layer first; how many had to be 0.5).

    As published: s_i = mean of row i, r = s_i / (s_i + s_j), alpha of i <- j = sigmoid(beta r). Whatever the similarities are,
    r is near 0.5 when rows are alike, and alpha near 0.62.
    """
    means = similarity.mean(axis=1)
    total, found, replaced = len(means), [], 0
    for into in range(total - 1 - layers, total - 1):
        one, two = float(means[into]), float(means[into + 1])
        ratio = one / (one + two) if one + two else math.nan
        if not math.isfinite(ratio) or abs(beta * ratio) > 30:
            found.append(FALLBACK_ALPHA)
            replaced += 1
        else:
            found.append(1.0 / (1.0 + math.exp(-beta * ratio)))
    return found, replaced


def plan_from_similarity(method: str, activations: Activations, layers: int, *, seed: int = 0) -> Plan:
    """The plan of a method in SIMILARITIES (the top folded with its alphas), IMPORTANCE (layers dropped), or 'released'.

    Raises:
        PlanError: unknown method, or not 1 <= layers < L.
    """
    total = activations.num_hidden_layers
    check_count(layers, total)
    if method == "released":
        return plan_from_method("drop-last", total, layers)
    if method in IMPORTANCE:
        return plan_dropping(IMPORTANCE[method](activations, layers), total)
    if method not in SIMILARITIES:
        raise PlanError(f"there is no method {method!r}; known: {', '.join([*SIMILARITIES, *IMPORTANCE, 'released'])}")
    alphas, _ = alphas_from_similarity(SIMILARITIES[method](activations, seed), layers)
    return fold_top(alphas, total, f"{method}-{layers}")


def fold_top(alphas: Sequence[float], num_hidden_layers: int, name: str) -> Plan:
    """The plan of the chain from the top with these alphas, lowest layer first."""
    steps = chain(alphas, num_hidden_layers)
    return Plan(compose(steps, num_hidden_layers), num_hidden_layers, name=name, method="alphas", steps=steps)
