"""The arithmetic study: tables, splits, networks against plain ones, training, resuming."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks._plain import Network, Training, copy_weights, plain_names
from eval.arithmetic.layers import Sequences
from eval.arithmetic.models import FUSIONS, Model, Source, initialise, logits, num_parameters, shapes
from eval.arithmetic.precision import has_bfloat16_products, matmul_precision
from eval.arithmetic.tasks import TASKS, generator, make_task, split
from eval.arithmetic.batches import Member, Recipe
from eval.arithmetic.train import _identity, train
from eval.errors import StudyError

SMALL = Source(2, 16, 2)
QUICK = Recipe(updates=40, batch=32, drawn=64, exhaustive_every=20, warmup=5)


def test_tables_are_the_operations():
    plus, minus, over = (make_task(name) for name in ("x_plus_y", "x_minus_y", "x_div_y"))
    assert [len(one) for one in (plus, minus, over)] == [9409, 9409, 9312]
    assert ((plus.a + plus.b) % 97 == plus.answer).all()
    assert ((minus.answer + minus.b) % 97 == minus.a).all()
    assert ((over.answer * over.b) % 97 == over.a).all()
    assert (over.b != 0).all()


def test_permutations_apply_the_second_first():
    import itertools

    task = make_task("permutation")
    assert len(task) == 14400
    elements = list(itertools.permutations(range(5)))
    for i in range(0, 14400, 977):
        a, b, c = (elements[int(x[i])] for x in (task.a, task.b, task.answer))
        assert c == tuple(a[k] for k in b)
    counts = torch.bincount(task.answer)
    assert (counts == 120).all()


def test_three_operations_are_told_apart_by_the_operator():
    task = make_task("three_operations", 7)
    assert task.num_ops == 3
    assert len(task) == 49 + 49 + 42
    for op, name in enumerate(("x_plus_y", "x_minus_y", "x_div_y")):
        alone, of = make_task(name, 7), task.op == op
        assert torch.equal(task.answer[of], alone.answer)


@pytest.mark.parametrize("name", TASKS)
def test_splits_come_from_the_seed(name):
    task = make_task(name, 11, 4)
    one, again, other = split(task, 3), split(task, 3), split(task, 4)
    assert torch.equal(one.train, again.train)
    assert not torch.equal(one.train, other.train)
    assert len(one.train) == len(task) // 2
    assert torch.equal(torch.cat([one.train, one.validation]).sort().values, torch.arange(len(task)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_task("x_pluss_y"), "no data set 'x_pluss_y'; did you mean x_plus_y"),
        (lambda: make_task("x_div_y", 91), "prime modulus, found 91"),
        (lambda: split(make_task("x_plus_y", 5), 0, 0.01), "leaves nothing"),
        (lambda: Source(2, 128, 6), "6 heads do not divide the width 128"),
        (lambda: Model(fusion="concatenate"), "no fusion 'concatenate'; did you mean concat"),
        (lambda: Model((SMALL, SMALL)), "2 sources need a fusion"),
        (lambda: Model(fusion="attention", heads=3), "3 heads of the fusion do not divide its width 128"),
        (lambda: Recipe(exhaustive_every=15), "multiple of evaluate_every"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(StudyError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# Networks


SIZES = {  # of mod 97 and S5, counted by hand from the definitions
    "baseline": (Model(), 422_625, 428_536),
    "concat": (Model(fusion="concat"), 435_297, 444_152),
    "weighted": (Model(fusion="weighted"), 435_299, 444_154),
    "attention": (Model(fusion="attention"), 501_345, 510_200),
    "over positions": (Model(fusion="attention-over-positions"), 698_465, 707_320),
    "layer norm": (Model(fusion="layer-norm"), 435_809, 444_664),
    "two sources": (Model((Source(), Source()), "concat"), 870_497, 888_184),
    "dynamic 3": (Model((Source(3),), "dynamic"), 688_097, 694_008),
    "dynamic 6 heads": (Model((Source(4, 128, 6, 32),), "dynamic", heads=6), 1_051_809, 1_057_720),
    "dynamic of two": (Model((Source(3), Source(3)), "dynamic", taps="last"), 1_295_841, 1_304_696),
    "sum": (Model((Source(), Source(4, 256, 8)), "sum", taps="last"), 3_720_545, 3_735_288),
    "adapters": (Model((Source(), Source(4, 256, 8)), "adapters"), 4_374_631, 4_389_374),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    model, modular, permuted = SIZES[name]
    assert num_parameters(model, make_task("x_plus_y")) == modular
    assert num_parameters(model, make_task("permutation")) == permuted


def batch_of(task, size=50, seed=0):
    index = torch.randint(len(task), (size,), generator=generator(seed, "batch"))
    return [getattr(task, name)[index] for name in ("a", "op", "b", "answer")]


def one_by_one(model, p, task, a, op, b):
    """The logits of sequences that are computed alone: whatever is shared in a batch cannot be shared here."""
    rows = [
        logits(model, p, Sequences(a[i : i + 1], op[i : i + 1], b[i : i + 1], task.num_symbols, task.num_ops))
        for i in range(len(a))
    ]
    return torch.cat(rows)


EVERY = [
    *[Model((SMALL,), fusion, heads=2) for fusion in FUSIONS],
    *[Model((SMALL,), fusion, "parallel", heads=2) for fusion in ("concat", "weighted", "attention-over-positions")],
    *[Model((SMALL, Source(3, 24, 4)), fusion, heads=2) for fusion in FUSIONS if fusion != "none"],
    *[Model((SMALL, SMALL), "dynamic", taps="last", routing=routing) for routing in ("static", "mean", "top-1")],
]


@pytest.mark.parametrize("model", EVERY, ids=lambda m: f"{m.fusion}-{m.wiring}-{len(m.sources)}-{m.taps}-{m.routing}")
def test_a_batch_is_its_sequences(model):
    task = make_task("three_operations", 7)
    p = initialise(model, task, 0)
    assert {name: tuple(value.shape) for name, value in p.items()} == {
        name: one for name, (_, one) in shapes(model, task).items()
    }
    a, op, b, _ = batch_of(task)
    whole = logits(model, p, Sequences(a, op, b, task.num_symbols, task.num_ops))
    assert whole.shape == (50, 7)
    torch.testing.assert_close(whole, one_by_one(model, p, task, a, op, b), atol=2e-6, rtol=2e-5)
    assert whole.std(0).min() > 1e-3  # it depends on the input


@pytest.mark.parametrize(("name", "layers"), [("x_plus_y", 1), ("x_div_y", 2), ("permutation", 2), ("x_minus_y", 4)])
def test_the_baseline_is_the_plain_network(name, layers):
    """Logits and every gradient, against nn.MultiheadAttention over all positions."""
    task, model = make_task(name), Model((Source(layers),))
    p = {key: value.requires_grad_() for key, value in initialise(model, task, 1).items()}
    plain = Network(task.num_symbols, layers)
    copy_weights(plain, p)
    a, op, b, answer = batch_of(task, 512)
    tokens = torch.stack([a + 2, torch.zeros_like(a), b + 2, torch.ones_like(a)], 1)
    ours, theirs = logits(model, p, Sequences(a, op, b, task.num_symbols, 1)), plain(tokens)[:, -1]
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)
    torch.nn.functional.cross_entropy(ours, answer).backward()
    torch.nn.functional.cross_entropy(theirs, answer).backward()
    theirs_by_name = dict(plain.named_parameters())
    names = plain_names(p)
    assert set(names) == set(theirs_by_name)
    for name, key in names.items():
        found, expected = p[key].grad, theirs_by_name[name].grad
        assert expected.abs().sum() > 0 or "positions" in name
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_loss_curve_is_the_plain_one():
    """The same batches and weights: 300 updates, losses equal to 2e-6."""
    task, model, recipe = make_task("x_div_y"), Model(), Recipe(updates=300, evaluate_every=1, drawn=1, exhaustive_every=300)
    parts = split(task, 0)
    start = initialise(model, task, 0)
    (ours,) = train(model, [Member(task, parts, 0, start)], recipe)
    plain = Network(task.num_symbols)
    copy_weights(plain, start)
    training = Training(plain, [(0, 0, 0)], [(0, 0, 0)])
    from eval.arithmetic.tasks import draws

    index = parts.train[draws(len(parts.train), (300, 512), generator(0, "batches", task.name)).long()]
    theirs = []
    for row in index:
        a, b = task.a[row], task.b[row]
        tokens = torch.stack([a + 2, torch.zeros_like(a), b + 2, torch.ones_like(a)], 1)
        theirs.append(training.update(tokens, task.answer[row]))
    assert np.abs(ours.log[1:, 1] - np.array(theirs)[:, 0]).max() < 2e-6
    assert ours.log[-1, 1] < ours.log[1, 1]


def test_bfloat16_rounds_the_factors_of_products_and_nothing_else():
    task, model, recipe = make_task("x_div_y", 31), Model(), Recipe(updates=20, batch=64, drawn=64, exhaustive_every=10)
    member = Member(task, split(task, 0), 0, initialise(model, task, 0))
    rounded = replace(recipe, matmul_precision="bfloat16")
    before = torch.backends.mkldnn.matmul.fp32_precision
    if not has_bfloat16_products():
        with pytest.raises(StudyError, match="makes no such products on this CPU"):
            train(model, [member], rounded)
        return
    (exact,), (found,) = train(model, [member], recipe), train(model, [member], rounded)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert {value.dtype for value in found.weights.values()} == {torch.float32}
    assert not torch.equal(found.weights["s0.head.weight"], exact.weights["s0.head.weight"])
    # 1e-4 here; a loss of 3.4 that is itself rounded to bfloat16 is moved by up to 8e-3.
    assert 0 < np.abs(found.log[1:, 1] - exact.log[1:, 1]).max() < 1e-3


def test_settings_of_before_there_was_a_precision_are_the_same_ones():
    """Checkpoints and results made then are gone on with."""
    assert "matmul_precision" not in Recipe().settings()
    assert Recipe(matmul_precision="bfloat16").settings() == {**Recipe().settings(), "matmul_precision": "bfloat16"}
    task = make_task("x_plus_y", 11)
    one = Member(task, split(task, 0), 0, initialise(Model((SMALL,)), task, 0))
    assert "precision" not in _identity(Model((SMALL,)), [one], Recipe(), False)


def test_float32_is_float32_whatever_torch_is_set_to():
    factor, setting = torch.full((128, 128), 1 + 2**-10), torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        with matmul_precision("float32"):
            assert torch.mm(factor, torch.eye(128))[0, 0] == 1 + 2**-10
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before


def test_adapters_start_as_their_reference():
    """Also where the reference is not the first source, and others are narrower and shallower."""
    task = make_task("x_plus_y", 11)
    big = Source(3, 24, 4)
    model = Model((SMALL, big), "adapters")
    assert model.reference == 1
    alone = initialise(Model((big,)), task, 5)
    p = initialise(model, task, 0)
    for name, value in alone.items():
        key = name.removeprefix("s0.")
        p[key if key.startswith(("norm", "head")) else f"s1.{key}"] = value
    a, op, b, _ = batch_of(task)
    s = Sequences(a, op, b, 11, 1)
    torch.testing.assert_close(logits(model, p, s), logits(Model((big,)), alone, s), atol=2e-6, rtol=2e-5)


def test_weights_are_redundant_where_layers_are_parallel():
    """The study's second run can be written as its first: w (g z + b) = (w g) z + (w b)."""
    task = make_task("x_plus_y", 11)
    weighted, plain = Model((SMALL,), "weighted", "parallel"), Model((SMALL,), "concat", "parallel")
    p = initialise(weighted, task, 0)
    p["weights"] = torch.tensor([0.3, 1.7])
    q = {name: value for name, value in p.items() if name != "weights"}
    for i, w in enumerate((0.3, 1.7)):
        for kind in ("weight", "bias"):
            q[f"s0.layers.{i}.mlp_norm.{kind}"] = w * q[f"s0.layers.{i}.mlp_norm.{kind}"]
    a, op, b, _ = batch_of(task)
    s = Sequences(a, op, b, 11, 1)
    torch.testing.assert_close(logits(weighted, p, s), logits(plain, q, s))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def member(model, seed, name="x_plus_y"):
    task = make_task(name, 11, 3)
    return Member(task, split(task, seed), seed, initialise(model, task, seed))


@pytest.mark.parametrize("fusion", ["none", "dropout", "dynamic"])
def test_members_train_as_if_alone(fusion):
    model = Model((SMALL,), fusion)
    together = train(model, [member(model, 0), member(model, 1, "x_div_y")], QUICK)
    alone = [train(model, [member(model, 0)], QUICK)[0], train(model, [member(model, 1, "x_div_y")], QUICK)[0]]
    for one, two in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.log, two.log, atol=1e-5)


@pytest.mark.parametrize("model", [EVERY[0], *(m for m in EVERY if m.fusion in ("dropout", "dynamic", "adapters"))], ids=str)
def test_training_goes_on_exactly(tmp_path, monkeypatch, model):
    """Also where a parameter gets no gradient, such as the query of a dynamic fusion with equal weights."""
    monkeypatch.setattr("eval.arithmetic.train.CHECKPOINT_S", -1.0)
    whole = train(model, [member(model, 0)], QUICK)[0]

    class KilledError(Exception):
        pass

    made = []

    def dying(updates):
        made.append(updates)
        if sum(made) >= 20:
            raise KilledError

    path = tmp_path / "checkpoint"
    with pytest.raises(KilledError):
        train(model, [member(model, 0)], QUICK, checkpoint=path, progress=dying)
    resumed = []
    found = train(model, [member(model, 0)], QUICK, checkpoint=path, progress=resumed.append)[0]
    assert resumed[0] == 10  # updates that were not made again
    np.testing.assert_array_equal(found.log, whole.log)
    assert all(torch.equal(found.weights[name], value) for name, value in whole.weights.items())
    with pytest.raises(StudyError, match="other settings"):
        train(model, [member(model, 0)], replace(QUICK, updates=50), checkpoint=path)


def test_frozen_values_stay():
    model = Model((SMALL, SMALL), "concat")
    start = member(model, 0)
    (found,) = train(model, [start], QUICK, frozen=lambda name: name.startswith("s"))
    for name, value in start.start.items():
        assert torch.equal(found.weights[name], value) == name.startswith("s"), name


def test_one_that_diverges_leaves_the_others_alone():
    model = Model((SMALL,))
    bad = member(model, 0)
    bad.start["s0.head.bias"][0] = math.inf
    found = train(model, [bad, member(model, 1)], QUICK)
    alone = train(model, [member(model, 1)], QUICK)[0]
    assert found[0].diverged_at == 10
    assert found[1].diverged_at is None
    np.testing.assert_allclose(found[1].log, alone.log, atol=1e-5)


def test_evaluations_count_what_was_drawn():
    """The sampled accuracy, which computes distinct pairs once, against one that does not."""
    from eval.arithmetic.tasks import draws

    model = Model((SMALL,))
    one = member(model, 0)
    recipe = replace(QUICK, updates=10, exhaustive_every=20)  # the last round is exhaustive all the same
    (found,) = train(model, [one], recipe)
    (short,) = train(model, [one], replace(recipe, updates=20, exhaustive_every=40))
    task, index = one.task, one.split.validation
    drawn = index[draws(len(index), (1, 64), generator(0, "evaluations", task.name))[0].long()]
    for pairs, columns in ((drawn, (3, 4)), (index, (5, 6))):
        z = logits(model, found.weights, Sequences(task.a[pairs], task.op[pairs], task.b[pairs], 11, 1))
        loss = torch.nn.functional.cross_entropy(z, task.answer[pairs])
        assert found.log[-1, columns[0]] == pytest.approx(float(loss), abs=1e-5)
        assert found.log[-1, columns[1]] == pytest.approx(float((z.argmax(-1) == task.answer[pairs]).float().mean()), abs=1e-6)
    np.testing.assert_allclose(short.log[1, 3:5], found.log[1, 3:5], atol=1e-6)
    assert math.isnan(short.log[1, 5])


def test_routing_knows_an_even_a_hard_and_an_unused_one():
    from eval.arithmetic.routing import routing

    def measured(kind, change=lambda p: None):
        model = Model((SMALL, SMALL), "dynamic", taps="last", routing=kind)
        one = member(model, 0)
        p = {name: value.clone() for name, value in one.start.items()}
        change(p)
        z = logits(model, p, Sequences(one.task.a, one.task.op, one.task.b, 11, 1))
        accuracy = float((z.argmax(-1) == one.task.answer).double().mean())
        found = routing(model, one.task, torch.arange(len(one.task)), p, generator(0, "shuffle"))
        assert found["unshuffled_acc"] == pytest.approx(accuracy)
        return found

    even = measured("mean")
    assert even["routing_entropy"] == pytest.approx(1.0)
    assert even["shuffled_acc"] == even["unshuffled_acc"]
    assert measured("top-1")["routing_entropy"] == pytest.approx(0.0, abs=1e-6)
    constant = measured("attention", lambda p: p["query.weight"].zero_())  # a query of its bias; keys still differ by input
    assert 0 < constant["routing_entropy"] < 1
    seen = measured("attention", lambda p: [p[name].mul_(30) for name in ("query.weight", "key.weight", "value.weight")])
    assert seen["shuffled_acc"] != seen["unshuffled_acc"]
