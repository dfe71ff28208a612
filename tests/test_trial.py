"""Trials on cached states against the really fused, saved and loaded checkpoint, for every family and kind of plan."""

import random

import pytest
import torch
import eval.trial
from tiny import NAMES, load, tiny_source

from eval.errors import TrialError
from eval.lm import PrefixLM
from eval.trial import LayerWeights, States, Tail, first_changed, plan_tail
from merge.api import Options, merge_checkpoint
from merge.plan import Plan, Row, chain, compose, unit_row


def inputs():
    """Two groups with a shared beginning and a single, with one or more scored positions."""
    rng = random.Random(1)

    def draw(length):
        return [rng.randrange(256) for _ in range(length)]

    shots = [draw(90), draw(70)]
    found = [tuple(shot + draw(rng.randint(3, 30))) for shot in shots for _ in range(6)] + [tuple(draw(40))]
    return found, [len(one) - rng.choice([1, 1, 5]) for one in found]


def plans(layers):
    """One changed layer at the top, several in the middle, groups with coefficients of their own, dropping."""
    top = compose(chain([0.6, 0.7, 0.5], layers), layers)
    middle = (*map(unit_row, range(2)), Row(2, {2: 0.5, 3: 0.5}), *map(unit_row, range(4, layers - 2)),
              Row(layers - 2, {layers - 2: 1.5, layers - 1: -0.5}))  # fmt: skip
    one, two = layers - 2, layers - 1
    groups = {"self_attn.o_proj": {one: 0.1, two: 0.9}, "input_layernorm": {one: 0.5, two: 0.5}}
    grouped = (*map(unit_row, range(one)), Row(one, {one: 0.7, two: 0.3}, groups))
    return {
        "top": Plan(top, layers),
        "norms": Plan(top, layers, tensors="all"),
        "folded": Plan(top, layers, tensors="fold-norms"),
        "rounded": Plan(top, layers, arithmetic="sequential", steps=chain([0.6, 0.7, 0.5], layers)),
        "middle": Plan(middle, layers),
        "groups": Plan(grouped, layers),
        "copied": Plan((*map(unit_row, range(one)), Row(one, {two: 1.0})), layers),  # another layer's matrices, own norms
        "dropped": Plan(tuple(map(unit_row, [*range(3), *range(4, layers)])), layers),
    }


def model_logits(folder, tokens, first, dtype=torch.float32):
    model = load(folder).to(dtype)
    parts = []
    with torch.inference_mode():
        for one, start in zip(tokens, first, strict=True):
            parts.append(model(torch.tensor([one])).logits[0, start:])
    return torch.cat(parts)


def tail_of(source):
    config = source.checkpoint().config
    soft = {"attn_implementation": "eager"} if config.get("attn_logit_softcapping") else {}
    return Tail(PrefixLM(str(source.folder), dtype="float32", device="cpu", pack_tokens=50, self_check=False, **soft))


@pytest.fixture(params=["usual", "small"])
def limits(request, monkeypatch):
    """The last layer's work laid out in one piece, and in very many."""
    if request.param == "small":
        for name, value in (("GROUP_ENTRIES", 300), ("CALL_TOKENS", 250), ("BLOCK_TOKENS", 150), ("HEAD_ROWS", 3)):
            monkeypatch.setattr(eval.trial, name, value)
    return request.param


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_fused_checkpoint(name, limits, tiny_cache, tmp_path):
    source = tiny_source(name, tiny_cache)
    checkpoint = source.checkpoint()
    tail = tail_of(source)
    tokens, first = inputs()
    cases = plans(checkpoint.num_hidden_layers)
    if name != "llama3-8b":
        cases = {kind: cases[kind] for kind in ("middle", "groups")}
    for kind, plan in cases.items():
        cut = first_changed(plan)
        seen = {}
        states = tail.capture(
            tokens, first, cut, lambda numbers, logits, seen=seen: seen.update(zip(numbers, logits, strict=True))
        )
        original = torch.stack([seen[i] for i in range(states.num_answers)])
        reference = model_logits(source.folder, tokens, first)
        # Gemma 3's twin has large logits: transformers' own float32 is up to 1e-3 from float64, more on some processors.
        rounding = (reference.double() - model_logits(source.folder, tokens, first, torch.float64)).abs().max().item()
        noise = max(2e-4, 3 * rounding)
        assert noise < 1e-2
        torch.testing.assert_close(original, reference, atol=noise, rtol=1e-4)
        out = tmp_path / kind
        merge_checkpoint(plan, source, out, Options(dtype="float32", allow_mixed_attention=True))
        expected = model_logits(out, tokens, first)
        with torch.inference_mode():
            hidden = tail.run(states, plan_tail(tail, plan, checkpoint, cut, allow_mixed_attention=True))
            found = tail.logits(hidden)
            some = tail.logits(hidden, [65, 66, 67, 68])
        tolerance = {"atol": 2e-2, "rtol": 1e-2} if kind == "rounded" else {"atol": noise, "rtol": 1e-4}
        assert limits == "usual" or len(states.blocks) > 1
        torch.testing.assert_close(found, expected, **tolerance)
        torch.testing.assert_close(some, found[:, 65:69], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(original, expected, atol=1e-2)


def test_states_survive_a_file(llama, tmp_path):
    tail = tail_of(llama)
    tokens, first = inputs()
    plan = plans(32)["middle"]
    states = tail.capture(tokens, first, first_changed(plan))
    states.save(tmp_path / "states.safetensors")
    again, more = States.load(tmp_path / "states.safetensors")
    assert more == {}
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tmp_path / "states.safetensors").read_bytes()[:100])
    with pytest.raises(TrialError, match="does not hold hidden states"):
        States.load(damaged)
    assert (again.cut, again.num_answers, again.nbytes, again.num_tokens) == (
        states.cut, states.num_answers, states.nbytes, states.num_tokens,
    )  # fmt: skip
    layers = plan_tail(tail, plan, llama.checkpoint(), states.cut)
    with torch.inference_mode():
        assert torch.equal(tail.run(again, layers), tail.run(states, layers))


def test_states_are_named_after_what_they_depend_on(llama):
    """Another model of the same shapes, other inputs, another cut: another name."""
    tail = tail_of(llama)
    tokens, first = inputs()
    keys = {tail.key(tokens, first, 30), tail.key(tokens, first, 29), tail.key(tokens[1:], first[1:], 30)}
    assert len(keys) == 3
    assert tail_of(llama).key(tokens, first, 30) in keys
    other = tail_of(llama)
    with torch.no_grad():
        other.weights[5]["mlp.up_proj.weight"].mul_(1.01)
    assert other.key(tokens, first, 30) not in keys


def test_logprobs_and_their_gradient(llama, limits):
    """Gradients reach the replaced weights and agree with differences of the loss."""
    tail = tail_of(llama)
    tokens, first = inputs()
    states = tail.capture(tokens, first, 30)
    targets = torch.arange(states.num_answers) % 256
    name = "mlp.down_proj.weight"
    direction = torch.randn(tail.weights[31][name].shape, generator=torch.Generator().manual_seed(0))

    def loss(step):
        changed = {name: tail.weights[31][name].detach() + step * direction}
        hidden = tail.run(states, [LayerWeights(30, {}), LayerWeights(31, changed)])
        return -tail.logprobs(hidden, targets).mean()

    step = torch.zeros((), requires_grad=True)
    value = loss(step)
    value.backward()
    with torch.no_grad():
        whole = -torch.log_softmax(tail.logits(tail.run(states, [LayerWeights(30, {}), LayerWeights(31, {})])), -1)
        assert value.item() == pytest.approx(whole[range(len(targets)), targets].mean().item(), abs=1e-5)
        numeric = (loss(torch.tensor(1e-2)) - loss(torch.tensor(-1e-2))) / 2e-2
    assert step.grad.item() == pytest.approx(numeric.item(), rel=2e-2)


def test_what_cannot_be_tried(llama):
    lm = PrefixLM(str(llama.folder), dtype="float32", device="cpu")
    tail = Tail(lm)
    with pytest.raises(TrialError, match="changes row 2, but the cached states enter row 3"):
        plan_tail(tail, plans(32)["middle"], llama.checkpoint(), 3)
    with pytest.raises(TrialError, match="nothing to run"):
        tail.run(States(3, [], 0), [])
    lm.not_shared_because = "a reason"
    with pytest.raises(TrialError, match="a reason"):
        Tail(lm)
