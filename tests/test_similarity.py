"""Similarity and importance against plain references, and the script as a user runs it."""

import gc
import json
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.special import digamma
from sklearn.feature_selection import mutual_info_regression
from test_mmlu import write_archive
from tiny import NAMES, ROOT, load, tiny_source
from transformers import LlamaModel

from eval.activations import Gathered, capture_activations, question_texts
from eval.errors import DataError
from eval.lm import PrefixLM
from eval.load import load_model
from eval.mmlu import SUBJECTS, read_mmlu
from eval.objective import text_windows
from eval.search import greedy_removal, laco_collapse
from eval.streamed import capture_streamed
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
    mutual_information,
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


def reference_information(x, y):
    """Kraskov's first estimator for two variables, point by point."""
    total = 0.0
    for a in range(len(x)):
        others = [b for b in range(len(x)) if b != a]
        radius = sorted(max(abs(x[a] - x[b]), abs(y[a] - y[b])) for b in others)[4]
        near = [sum(abs(one[a] - one[b]) < radius for b in others) for one in (x, y)]
        total += digamma(near[0] + 1) + digamma(near[1] + 1)
    return max(0.0, digamma(len(x)) + digamma(5) - total / len(x))


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
    maps = np.stack(maps) + 1e-10 * np.random.default_rng(0).standard_normal((size, len(inputs[0]), 2))
    found = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            both = [reference_information(maps[i][:, p], maps[j][:, q]) for p in range(2) for q in range(2)]
            found[i, j] = np.mean(both) / math.sqrt(entropies[i] * entropies[j])
    return found


def test_mka_is_its_equations():
    activations = random_activations(layers=3)
    np.testing.assert_allclose(mka(activations), reference_mka(activations.inputs[:-1]), rtol=1e-6)


def test_mutual_information_is_scikit_learns():
    """On values without ties; unit variance, to which scikit-learn scales."""
    values = np.random.default_rng(0).standard_normal((3, 80))
    values[1] += values[0]
    values /= values.std(axis=1, keepdims=True)
    found = mutual_information(values)
    for i in range(3):
        for j in range(3):
            if i != j:
                (expected,) = mutual_info_regression(values[i][:, None], values[j], n_neighbors=5, random_state=0)
                assert found[i, j] == pytest.approx(expected, abs=1e-6)


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


@pytest.mark.parametrize("name", NAMES)
def test_streamed_is_the_same(name, tiny_cache):
    """One layer at a time gives what the whole model gives, in every family, whatever is sliding or tied."""
    source = tiny_source(name, tiny_cache)
    lm, _ = load_model(source.checkpoint(), "cpu", "float32", self_check=False)
    texts = ["A first text.", "Another text, and a longer one than the first: long enough for any window of the twins."]
    whole = capture_activations(lm, texts)
    layers = []
    streamed = capture_streamed(source.checkpoint(), texts, "cpu", "float32", layers.append)
    np.testing.assert_allclose(streamed.inputs, whole.inputs, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(streamed.cosines, whole.cosines, atol=1e-6)
    assert sum(layers) == source.checkpoint().num_hidden_layers


def test_streamed_keeps_one_layer(tiny_cache, monkeypatch):
    """While a layer runs, the weights of all others are not in memory."""
    source = tiny_source("llama3-8b", tiny_cache)
    real = []
    add = Gathered.add

    def watch(self, *arguments):
        models = [one for one in gc.get_objects() if type(one) is LlamaModel]
        models = [one for one in models if any(parameter.is_meta for parameter in one.parameters())]  # not other tests'
        real.append(sum(not next(layer.parameters()).is_meta for model in models for layer in model.layers))
        add(self, *arguments)

    gc.collect()
    monkeypatch.setattr(Gathered, "add", watch)
    capture_streamed(source.checkpoint(), ["One text.", "Two texts."], "cpu", "float32")
    assert len(real) == 2 * 32
    assert max(real) - min(real) == 0
    assert min(real) == 1


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
        assert len(json.loads((tmp_path / f"{method}.json").read_text())["steps" if method == "mka" else "rows"]) == (
            3 if method == "mka" else 29
        )
    assert "removed: [" in done.stdout
    again = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert again.returncode == 2
    assert "exists; give --overwrite" in again.stderr


def test_script_methods_without_a_model_run(tmp_path, tiny_cache):
    environment = os.environ | {"XDG_CACHE_HOME": str(tiny_cache), "HF_HUB_OFFLINE": "1"}
    rows = [{"body": f"Text number {i} of a data set, with something said in it."} for i in range(20)]
    (tmp_path / "set").mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path / "set" / "train.parquet")

    def run(*arguments, status=0):
        command = [sys.executable, ROOT / "scripts" / "similarity.py", "--model", "tiny:llama3-8b", *arguments, "--overwrite"]
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    assert "removed: [29, 30, 31]" in run("--layers", 3, "--compat", "released", "--out", "a.json")
    assert "removed: [28, 29, 30]" in run("--layers", 3, "--method", "drop-keep-last", "--out", "b.json")
    dataset = ("--dataset", tmp_path / "set", "--text-column", "body")
    run("--layers", 3, "--method", "angular-block", *dataset, "--stream", "--out", "c.json")
    assert len(json.loads((tmp_path / "c.json").read_text())["rows"]) == 29
    assert (tmp_path / "c.png").stat().st_size > 5_000
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 33
    said = run("--layers", 3, "--method", "laco", *dataset, "--samples", 4, "--window", 3, "--threshold", -1, "--out", "d.json")
    assert "layers 29 to 31: cosine" in said
    assert len(json.loads((tmp_path / "d.json").read_text())["rows"]) == 29
    assert "only 0 of 3 layers can go at a threshold of 1.5" in run(
        "--layers", 3, "--method", "laco", *dataset, "--threshold", 1.5, "--out", "e.json", status=1
    )
    assert not (tmp_path / "e.json").exists()
    for arguments, status, said in (
        (("--method", "laco", "--stream"), 2, "--stream is for mka"),
        (("--method", "cka", "--compat", "released"), 2, "--compat is for --method mka"),
        (("--method", "sleb"), 2, "needs --text FILE or --dataset"),
        (("--method", "cka", *dataset, "--text", "x"), 2, "give one of --text and --dataset"),
        (("--method", "cka", *dataset[:2]), 1, "has no column 'text'; it has body"),
        (("--method", "cka", "--dataset", "no/such-set"), 1, "cannot be had"),
        (("--method", "laco", "--window", "1"), 2, "--window is 1"),
    ):
        assert said in run("--layers", 3, *arguments, "--out", "f.json", status=status)


def test_laco_is_brute_force(tiny_cache):
    """Every cosine against a model whose layers were made one by surgery; what is accepted and refused follows the rule."""
    import torch
    from tiny import surgery

    source = tiny_source("llama3.2-1b", tiny_cache)
    lm = PrefixLM(str(source.folder), dtype="float32", device="cpu", self_check=False)
    texts = ["Some plain text.", "More of it, which is a little longer."]
    inputs = [lm.tok_encode(text) for text in texts]
    checkpoint = source.checkpoint()
    total = checkpoint.num_hidden_layers
    _, tried = laco_collapse(Tail(lm), checkpoint, inputs, 5, window=3, threshold=-1.0, interval=2)
    assert [(one.first, one.last) for one in tried] == [(total - 3, total - 1), (total - 5, total - 3), (total - 7, total - 6)]
    least = tried[0].cosine  # so the first window is refused
    plan, tried = laco_collapse(Tail(lm), checkpoint, inputs, 3, window=3, threshold=least, interval=2)
    model = load(source.folder)

    def last_hidden(one):
        with torch.inference_mode():
            return torch.stack(
                [
                    one(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[-1][0, -1]
                    for ids in inputs
                ]
            )

    goal, stack = last_hidden(model), [{layer: 1.0} for layer in range(total)]
    for one in tried:
        mix = {layer: (one.first - one.last + 1) * c for layer, c in stack[one.first].items()}
        for row in stack[one.first + 1 : one.last + 1]:
            for layer, c in row.items():
                mix[layer] = mix.get(layer, 0.0) + c
        candidate = [*stack[: one.first], mix, *stack[one.last + 1 :]]
        bases = [min(row) for row in candidate]
        originals = [dict(layer.named_parameters()) for layer in model.model.layers]

        def mixed(index, name, parameter, candidate=candidate, originals=originals):
            if "norm" in name:
                return None
            return sum(c * originals[layer][name] for layer, c in candidate[index].items())

        found = last_hidden(surgery(model, bases, mixed))
        cosine = float(torch.nn.functional.cosine_similarity(found, goal, dim=-1).mean())
        assert one.cosine == pytest.approx(cosine, abs=1e-4)
        assert one.accepted == (one.cosine > least)
        if one.accepted:
            stack = candidate
    assert [dict(row.mix) for row in plan.rows] == [{layer: c for layer, c in row.items() if c} for row in stack]
    assert any(not one.accepted for one in tried)


def test_greedy_removal_is_brute_force(tiny_cache):
    """Each step against every model with one layer less, by surgery on modules."""
    import torch
    from tiny import surgery

    source = tiny_source("llama3.2-1b", tiny_cache)
    lm = PrefixLM(str(source.folder), dtype="float32", device="cpu", self_check=False)
    text = "Some plain text that is long enough for three windows, and then a little more of it."
    windows = text_windows(lm, text, [75, 0, 0], 25)["search"]
    steps = []
    found = greedy_removal(Tail(lm), windows, 3, chosen=lambda removed: steps.append(list(removed)))
    assert steps == [found[:1], found[:2], found]
    trials = []
    assert greedy_removal(Tail(lm), windows, 3, trials.append, begun=found[:1]) == found
    layers = source.checkpoint().num_hidden_layers
    assert sum(trials) == (layers - 1) + (layers - 2)
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
