"""Spaces say what they mean, and searches find what was planted."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trial import inputs, tail_of

from eval.trial import Mixture, plan_tail
from merge.errors import PlanError, SearchError
from merge.methods import plan_dropping
from merge.plan import Plan, chain, compose
from merge.search import gradient_search, open_study, slices, study_search, study_trials
from merge.space import Alphas, Coefficients, RowSpec, effective_dimensions, windows

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
unit = st.floats(0, 1, allow_nan=False)


@given(st.lists(unit, min_size=1, max_size=5))
def test_alphas_mean_what_a_plan_means(alphas):
    """The tensors that gradients flow through are the closed form's coefficients."""
    space = Alphas(chain([0.5] * len(alphas), 8), 8, PROJECTIONS)
    order = torch.tensor(list(reversed(alphas)), dtype=torch.float64)
    (mixes,) = space.mixes(order)
    plan = space.plan(order.tolist(), "x")
    assert plan.rows == compose(chain(alphas, 8), 8)
    row = plan.rows[-1]
    layers = space.rows[-1].layers
    assert mixes["mlp.up_proj"].tolist() == pytest.approx([row.mix.get(layer, 0.0) for layer in layers], abs=1e-12)


def test_alphas_start_from_every_layer():
    space = Alphas(chain([0.5] * 3, 8), 8, PROJECTIONS)
    rows = [space.plan(x.tolist(), name).rows[-1].mix for name, x in space.starts().items()]
    assert rows == [{4: 1.0}, {5: 1.0}, {6: 1.0}, {7: 1.0}]


def test_coefficients_make_the_same_plan():
    rows = (RowSpec(0, (0,)), RowSpec(1, (1, 2)), RowSpec(3, (3,)))
    space = Coefficients(rows, 4, ("mlp.up_proj", "input_layernorm"), "llama")
    assert space.names == tuple(f"row 1 {g} layer {j}" for g in ("mlp.up_proj", "input_layernorm") for j in (1, 2))
    plan = space.plan([1.5, -0.5, 0.5, -0.1], "x")
    assert plan.rows[1].groups == {"mlp.up_proj": {1: 1.5, 2: -0.5}, "input_layernorm": {1: 0.5}}  # norms: none below zero
    assert plan.rows[0].is_unit
    gemma = Coefficients(rows, 4, ("input_layernorm",), "gemma2")
    assert sum(gemma.plan([0.3, 0.3], "x").rows[1].groups["input_layernorm"].values()) == pytest.approx(1.0)
    starts = {name: space.plan(x.tolist(), name).rows[1].groups for name, x in space.starts().items()}
    assert starts == {
        "dropped": {"mlp.up_proj": {1: 1.0}, "input_layernorm": {1: 1.0}},
        "layer 2 in the place of 1": {"mlp.up_proj": {2: 1.0}, "input_layernorm": {2: 1.0}},
        "layer 2 in the place of 1, norms of 1": {"mlp.up_proj": {2: 1.0}, "input_layernorm": {1: 1.0}},
    }


def test_a_layer_alone_is_scaled():
    """Its norms stay positive, and gradients lead back from where they would not be; Gemma's have nothing to search."""
    rows = (RowSpec(0, (0, 1)), RowSpec(2, (2,), scaled=True))
    groups = ("mlp.up_proj", "input_layernorm")
    space = Coefficients(rows, 3, groups, "llama")
    assert space.names[-2:] == ("row 1 mlp.up_proj layer 2", "row 1 input_layernorm layer 2")
    assert set(space.starts()) == {name for name in space.starts() if "of 2" not in name}  # nothing to put in its place
    for asked, kept in ((0.5, 0.5), (-0.2, 0.01), (0.0, 0.01), (1.3, 1.3)):
        x = torch.tensor([1.0, 0.0, 1.0, 0.0, -0.4, asked], requires_grad=True)
        norm = space.mixes(x)[1]["input_layernorm"]
        assert norm.item() == pytest.approx(kept)
        norm.sum().backward()
        assert x.grad[-1] == 1.0
        assert space.plan(x.tolist(), "x").rows[1].groups["mlp.up_proj"] == {2: pytest.approx(-0.4)}
    gemma = Coefficients(rows, 3, groups, "gemma2")
    assert gemma.names[-1] == "row 1 mlp.up_proj layer 2"
    assert "input_layernorm" not in gemma.plan([1.0, 0.0, 1.0, 0.0, 0.7], "x").rows[1].groups
    assert len(gemma.starts()["dropped"]) == len(gemma.names)


def test_windows_share_out_the_dropped_layers():
    plan = plan_dropping([0, 3, 4, 7], 8)
    assert [row.layers for row in windows(plan)] == [(0, 1), (2, 3, 4), (5,), (6, 7)]
    assert [row.layers for row in windows(plan, reach=1)] == [(0, 1), (2, 3), (5,), (6, 7)]
    scaled = windows(plan_dropping([2, 3], 6), scale_kept=True)
    assert [row.layers for row in scaled] == [(0,), (1, 2, 3), (4,), (5,)]
    assert [row.mixed for row in scaled] == [False, True, True, True]  # nothing below the first gap
    with pytest.raises(PlanError, match="in their order"):
        windows(Plan(tuple(reversed(plan.rows)), 8))


def test_effective_dimensions():
    assert effective_dimensions(chain([0.5], 4), 4) == pytest.approx(1.0)
    assert 1.0 < effective_dimensions(chain([0.62] * 13, 32), 32) < 3.0
    separate = [step for low in (0, 2, 4) for step in [type(chain([0.5], 4)[0])(low, low + 1, 0.5)]]
    assert effective_dimensions(separate, 6) == pytest.approx(3.0)


@pytest.fixture(scope="module")
def problem(tiny_cache):
    """A tiny Llama, hidden states below its top three layers, and a loss against the mixture with known numbers."""
    from tiny import tiny_source

    source = tiny_source("llama3-8b", tiny_cache)
    tail = tail_of(source)
    tokens, first = inputs()
    states = tail.capture(tokens, first, 29)

    def planted(space, x):
        mixture = Mixture(tail, space, 29)

        def logprobs(x):
            return torch.log_softmax(tail.logits(tail.run(states, mixture.layers(space.mixes(x)))), -1)

        with torch.no_grad():
            goal = logprobs(torch.tensor(x))
        return lambda x: (goal.exp() * (goal - logprobs(x))).sum(-1).mean()

    planted.tail, planted.states, planted.checkpoint = tail, states, source.checkpoint()
    return planted


ALPHAS = [0.35, 0.8]  # 30 <- 31, then 29 <- 30


def alphas_space():
    return Alphas(chain([0.5, 0.5], 32), 32, PROJECTIONS)


def test_a_mixture_is_the_plan(problem):
    space = alphas_space()
    plan = space.plan(ALPHAS, "planted")
    mixture = Mixture(problem.tail, space, 29)
    with torch.inference_mode():
        one = problem.tail.run(problem.states, mixture.layers(space.mixes(torch.tensor(ALPHAS))))
        two = problem.tail.run(problem.states, plan_tail(problem.tail, plan, problem.checkpoint, 29))
    torch.testing.assert_close(one, two)


def test_gradient_recovers_planted_alphas(problem):
    trials = []
    found = gradient_search(
        alphas_space(), problem(alphas_space(), ALPHAS), steps=150, learning_rate=0.2, progress=trials.append
    )
    assert found[0].x == pytest.approx(ALPHAS, abs=0.02)
    assert found[0].loss == min(trial.loss for trial in trials)
    assert {(trial.start, trial.step) for trial in trials} >= {(name, 0) for name in alphas_space().starts()}


def test_gradient_recovers_planted_coefficients(problem):
    rows = (*(RowSpec(i, (i,)) for i in range(29)), RowSpec(29, (29, 30, 31)))
    space = Coefficients(rows, 32, ("self_attn.v_proj", "mlp.down_proj", "post_attention_layernorm"), "llama")
    goal = [0.7, 0.2, -0.3, 0.1, 0.9, 0.4, 0.8, 0.1, 0.1]
    trials = []
    found = gradient_search(space, problem(space, goal), steps=300, refine=1, learning_rate=0.05, progress=trials.append)
    assert found[0].x[:6] == pytest.approx(goal[:6], abs=0.05)
    # Norms of neighbours point almost the same way, so only the sum of their coefficients can be told.
    assert sum(max(c, 0.0) for c in found[0].x[6:]) == pytest.approx(1.0, abs=0.05)
    assert found[0].loss < 0.05 * min(trial.loss for trial in trials if trial.step == 0)


@pytest.mark.parametrize("method", ["gp", "tpe"])
def test_bayes_recovers_planted_alphas(method, problem):
    planted = problem(alphas_space(), ALPHAS)

    def loss(x):
        with torch.no_grad():
            return float(planted(x)), 0.0

    study = open_study(None, "planted", {}, resume=False)
    found = study_search(alphas_space(), loss, study, method=method, trials=40 if method == "gp" else 120)
    assert found[0].x == pytest.approx(ALPHAS, abs=0.02 if method == "gp" else 0.1)


def quadratic(x):
    return float(((x - 0.3) ** 2).sum()), float(0.5 - x[0])  # the limit: x[0] at least 0.5


def test_limits_are_kept():
    study = open_study(None, "limited", {}, resume=False)
    best = study_search(alphas_space(), quadratic, study, method="tpe", trials=60)[0]
    assert best.x[0] >= 0.5
    assert best.x[0] == pytest.approx(0.5, abs=0.1)


def test_resumed_is_the_same_as_uninterrupted(tmp_path):
    values = []
    for name, parts in (("whole", [12]), ("parts", [5, 12])):
        url = f"sqlite:///{tmp_path / name}.db"
        for trials in parts:
            study = open_study(url, "s", {"a": 1}, resume=trials != parts[0])
            study_search(alphas_space(), quadratic, study, method="gp", trials=trials, settings={"a": 1})
        values.append([trial.params for trial in study.get_trials()])
    assert values[0] == values[1]
    with pytest.raises(SearchError, match="give --resume"):
        open_study(url, "s", {"a": 1}, resume=False)
    with pytest.raises(SearchError, match=r"made with other options \(a\)"):
        open_study(url, "s", {"a": 2}, resume=True)
    with pytest.raises(SearchError, match="cannot be opened"):
        open_study("nonsense://x", "s", {}, resume=False)


def test_a_worker_that_comes_too_late_to_make_the_tables_tries_again(tmp_path, monkeypatch):
    """PostgreSQL refuses the second of two workers that make them at once."""
    import optuna

    calls = []

    class Late(optuna.storages.RDBStorage):
        def __init__(self, *arguments, **options):
            calls.append(arguments)
            if len(calls) == 1:
                raise RuntimeError("duplicate key value")
            super().__init__(*arguments, **options)

    monkeypatch.setattr(optuna.storages, "RDBStorage", Late)
    assert open_study(f"sqlite:///{tmp_path / 'late.db'}", "s", {}, resume=False).trials == []
    assert len(calls) == 2


def test_points_beyond_a_limit_are_not_kept():
    """Gradients may pass through them; what is kept holds the limit, and nothing is kept where nothing does."""

    def loss(x):
        return ((x - 0.3) ** 2).sum() + 10 * torch.relu(0.5 - x[0]), float(0.5 - x[0].detach())

    trials = []
    (found,) = gradient_search(alphas_space(), loss, steps=60, refine=1, progress=trials.append)
    assert found.x[0] >= 0.5
    assert found.loss == min(trial.loss for trial in trials if trial.over <= 0 and trial.start == found.start)
    assert gradient_search(alphas_space(), lambda x: ((x**2).sum(), 1.0), steps=2, refine=2) == []
    with pytest.raises(SearchError, match="no start has 'nothing' in its name; there are: only layer 29"):
        gradient_search(alphas_space(), loss, steps=1, only="nothing")


@pytest.mark.parametrize("method", ["gp", "tpe"])
def test_trials_without_a_number_do_not_stop_a_study(method):
    """Nor is the same point drawn again and again."""
    tried = []

    def loss(x):
        tried.append(tuple(x.tolist()))
        value = quadratic(x)[0]
        return (value, math.nan) if x[1] > 0.8 else (math.nan if x[0] > 0.8 else value, 0.0)

    found = study_search(alphas_space(), loss, open_study(None, "nan", {}, resume=False), method=method, trials=15)
    assert all(math.isfinite(one.loss) for one in found)
    assert len(set(tried)) == len(tried)


def test_a_journal_file_is_a_storage(tmp_path):
    path = str(tmp_path / "search.log")
    for trials in (5, 9):
        study = open_study(path, "s", {"a": 1}, resume=trials > 5)
        found = study_search(alphas_space(), quadratic, study, method="tpe", trials=trials)
    trials = study_trials(alphas_space(), study)
    assert len(trials) == 9
    assert {trial.start for trial in trials[:3]} == {"given"}  # the starts come first
    assert trials[-1].start == "sampled"
    assert found[0].loss == min(trial.loss for trial in trials if trial.over <= 0)


def test_slices_pass_through_the_point():
    space = alphas_space()
    curves = slices(space, lambda x: quadratic(x)[0], (0.3, 0.8), (0.1, 0.5), points=5)
    assert list(curves) == list(reversed(space.names))  # the one that moved more comes first
    assert [value for value, _ in curves["29<-30"]] == [0.0, 0.25, 0.5, 0.75, 0.8, 1.0]
    assert dict(curves["29<-30"])[0.8] == pytest.approx(0.25)


WORKER = """
import sys, time, torch
sys.path[:0] = {paths!r}
from merge import search
from test_search import alphas_space
search.HEARTBEAT_S, search.GRACE_S = 1, 3
def loss(x):
    time.sleep(0.1)
    return float(((x - 0.3) ** 2).sum()), 0.0
study = search.open_study({url!r}, "s", {{}}, resume=True)
search.study_search(alphas_space(), loss, study, method="tpe", trials=40)
"""


def test_two_workers_one_killed(tmp_path):
    """The study ends with every trial complete once: the dead worker's trial is run again by the other."""
    url = f"sqlite:///{tmp_path / 'two.db'}"
    study = open_study(url, "s", {}, resume=True)
    code = WORKER.format(paths=[p for p in sys.path if p], url=url)
    workers = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    while len(study.get_trials(deepcopy=False)) < 12:
        time.sleep(0.1)
        assert all(worker.poll() is None for worker in workers)
    os.kill(workers[0].pid, signal.SIGKILL)
    _, errors = workers[1].communicate(timeout=120)
    workers[0].communicate()
    assert workers[1].returncode == 0, errors.decode()[-2000:]
    states = [trial.state.name for trial in study.get_trials()]
    assert 40 <= states.count("COMPLETE") <= 41
    complete = [tuple(sorted(t.params.items())) for t in study.get_trials() if t.state.name == "COMPLETE"]
    assert len(set(complete)) == len(complete)  # none was counted twice
