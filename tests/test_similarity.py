"""Similarity and importance against plain references, and the script as a user runs it."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.feature_selection import mutual_info_regression
from test_mmlu import write_archive
from tiny import ROOT, load, tiny_source

from eval.activations import capture_activations, question_texts
from eval.errors import DataError
from eval.lm import PrefixLM
from eval.mmlu import SUBJECTS, read_mmlu
from eval.objective import text_windows
from eval.search import greedy_removal
from eval.trial import Tail
from merge.errors import PlanError
from merge.methods import plan_from_method
from merge.similarity import (
    IMPORTANCE,
    SIMILARITIES,
    Activations,
    alphas_from_similarity,
    angular_block,
    block_influence,
    linear_cka,
    mka,
    plan_from_similarity,
)


def random_activations(layers=4, samples=60, size=8, seed=0):
    """Layers that add a little to what they get, so that neighbours are alike."""
    rng = np.random.default_rng(seed)
    states = [rng.standard_normal((samples, size)) * 3]
    for _ in range(layers):
        states.append(states[-1] + 0.5 * rng.standard_normal((samples, size)))
    inputs = np.stack(states)
    cosines = [
        float(
            np.mean(
                [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(inputs[i], inputs[i + 1], strict=True)]
            )
        )
        for i in range(layers)
    ]
    return Activations(inputs, np.array(cosines))


def reference_mka(inputs):
    """Straight from the equations: loops, SVD, sorting by hand."""
    maps, entropies = [], []
    for points in inputs:
        count = len(points)
        kernel = np.array([[math.exp(-math.sqrt(np.linalg.norm(a - b) / 8.0)) for b in points] for a in points])
        p = kernel.sum(0)
        kernel = np.array([[kernel[a, b] / math.sqrt(p[a] * p[b]) for b in range(count)] for a in range(count)])
        v = np.sqrt(kernel.sum(0))
        u, _, _ = np.linalg.svd(kernel / np.outer(v, v))
        columns = []
        for k in (1, 2):
            column = u[:, k] / abs(u[:, 0])
            column = column * np.sign(u[np.abs(u[:, k]).argmax(), k])
            columns.append([sum(other < one for other in column) / count for one in column])
        embedded = np.array(columns).T
        maps.append(embedded)
        distances = [sorted(np.linalg.norm(a - b) for b in embedded)[50] for a in embedded]
        entropies.append(-np.mean([math.log(50 / (count * rho**2)) for rho in distances]))
    size = len(maps)
    found = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            both = [
                max(0.0, mutual_info_regression(one, two[:, q], n_neighbors=5, random_state=0)[p])
                for one, two in ((maps[i], maps[j]), (maps[j], maps[i]))
                for p in range(2)
                for q in range(2)
            ]
            found[i, j] = np.mean(both) / math.sqrt(entropies[i] * entropies[j])
    return found


def test_mka_is_its_equations():
    activations = random_activations(layers=3)
    np.testing.assert_allclose(mka(activations), reference_mka(activations.inputs[:-1]), rtol=1e-6)


def test_mka_needs_more_samples_than_neighbours():
    with pytest.raises(PlanError, match="more than 50 samples for its 50 neighbours, found 50"):
        mka(random_activations(samples=50))


@pytest.mark.parametrize("method", SIMILARITIES)
def test_similarities_are_symmetric_and_repeatable(method):
    activations = random_activations()
    one, two = SIMILARITIES[method](activations, 3), SIMILARITIES[method](activations, 3)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(one, one.T)
    if method != "mka":  # bounded, and 1 for itself
        np.testing.assert_allclose(np.diag(one), 1.0, atol=1e-6)
        assert one.max() <= 1.0 + 1e-9


def test_cka_of_a_rotated_representation_is_one():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((40, 6))
    rotation, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    found = linear_cka(Activations(np.stack([points, 3.0 * points @ rotation + 5.0, points]), np.ones(2)))
    np.testing.assert_allclose(found, 1.0, atol=1e-12)


def test_a_layer_that_does_nothing_goes_first():
    activations = random_activations(layers=5)
    cosines = activations.cosines.copy()
    cosines[3] = 1.0
    assert block_influence(Activations(activations.inputs, cosines), 1) == [3]
    inputs = activations.inputs.copy()
    inputs[4] = inputs[2] * 2.0  # layers 2 and 3 together only scale
    assert angular_block(Activations(inputs, cosines), 2) == [2, 3]


def test_alphas_are_the_published_formula():
    similarity = np.array([[1.0, 0.5, 0.2], [0.5, 1.0, 0.4], [0.2, 0.4, 1.0]])
    means = similarity.mean(1)
    alphas, replaced = alphas_from_similarity(similarity, 2)
    expected = [1 / (1 + math.exp(-means[i] / (means[i] + means[i + 1]))) for i in (0, 1)]
    assert alphas == pytest.approx(expected)
    assert replaced == 0
    assert alphas_from_similarity(np.full((3, 3), np.nan), 2) == ([0.5, 0.5], 2)


def test_released_is_drop_last():
    assert plan_from_similarity("released", random_activations(), 2).rows == plan_from_method("drop-last", 4, 2).rows
    for method in [*SIMILARITIES, *IMPORTANCE]:
        assert len(plan_from_similarity(method, random_activations(), 2).rows) == 2
    with pytest.raises(PlanError, match="cannot remove 4 of 4"):
        plan_from_similarity("cka", random_activations(), 4)


def test_activations_are_the_models(tiny_cache):
    import torch

    source = tiny_source("gemma2-2b", tiny_cache)
    lm = PrefixLM(str(source.folder), dtype="float32", device="cpu", attn_implementation="eager")
    texts = ["A first text.", "Another, longer text than the first."]
    found = capture_activations(lm, texts)
    model = load(source.folder)
    total, tokens = np.zeros(found.num_hidden_layers), 0
    for sample, text in enumerate(texts):
        ids = torch.tensor([lm.tok_encode(text)])
        with torch.inference_mode():
            states = model(ids, output_hidden_states=True).hidden_states
        for layer in range(found.num_hidden_layers):
            np.testing.assert_allclose(found.inputs[layer, sample], states[layer][0, -1], atol=1e-4)
            if layer + 1 < found.num_hidden_layers:  # the last one is after the final norm
                total[layer] += torch.nn.functional.cosine_similarity(states[layer][0], states[layer + 1][0], dim=-1).sum()
        tokens += ids.shape[1]
    np.testing.assert_allclose(found.cosines[:-1], total[:-1] / tokens, atol=1e-5)
    with pytest.raises(DataError, match="found 1 calibration texts"):
        capture_activations(lm, texts[:1])


def test_calibration_is_dev_questions(tmp_path):
    subjects = read_mmlu(write_archive(tmp_path), ["anatomy", "virology"])
    texts = question_texts(subjects, 2)
    assert len(texts) == 4
    assert texts[1].startswith("Question 1 of anatomy?")
    assert texts[1].endswith("\nAnswer:")


def test_script(tmp_path, tiny_cache):
    environment = os.environ | {"XDG_CACHE_HOME": str(tiny_cache), "HF_HUB_OFFLINE": "1"}
    data = write_archive(tmp_path / "mmlu", SUBJECTS, count=1)
    for method in ("mka", "block-influence"):
        command = [sys.executable, ROOT / "scripts" / "similarity.py", "--model", "tiny:llama3-8b", "--layers", 3]
        command += ["--method", method, "--data-dir", data, "--out", f"{method}.json"]
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert len(json.loads((tmp_path / f"{method}.json").read_text())["steps" if method == "mka" else "rows"]) in (3, 29)
    assert "removed: [" in done.stdout
    again = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert again.returncode == 2
    assert "exists; give --overwrite" in again.stderr


def test_greedy_removal_is_brute_force(tiny_cache):
    """Each step against every model with one layer less, by surgery on modules."""
    import torch
    from tiny import surgery

    source = tiny_source("llama3.2-1b", tiny_cache)
    lm = PrefixLM(str(source.folder), dtype="float32", device="cpu", self_check=False)
    text = "Some plain text that is long enough for three windows, and then a little more of it."
    windows = text_windows(lm, text, [75, 0, 0], 25)["search"]
    found = greedy_removal(Tail(lm), windows, 2)
    model, kept = load(source.folder), list(range(source.checkpoint().num_hidden_layers))
    for one in found:
        losses = {}
        for layer in kept:
            smaller = surgery(model, [other for other in kept if other != layer])
            parts = []
            for window in windows:
                ids = torch.tensor(window)
                with torch.inference_mode():
                    logits = smaller(ids[None, :-1], use_cache=False).logits[0]
                parts += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").tolist()
            losses[layer] = float(np.mean(parts))
        assert one.layer == min(losses, key=losses.get)
        assert one.nll == pytest.approx(losses[one.layer], abs=1e-4)
        kept.remove(one.layer)
