"""PrefixLM against lm-eval's own model class on the same requests."""

import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny import NAMES, tiny_source

from eval.lm import PrefixLM
from merge.checkpoint import read_config


def requests():
    """Few-shot groups, several continuations, left-overs, an empty context, trailing blanks, overlong prompts."""
    rng = random.Random(0)

    def text(length):
        return "".join(rng.choice("abcdefgh \n") for _ in range(length))

    pairs = []
    for _ in range(3):
        shots = text(60)
        for _ in range(5):
            context = f"{shots}{text(rng.randint(3, 30))}."
            pairs += [(context, continuation) for continuation in (" A", " B", " a longer one")]
    pairs += [("", " x"), ("x" * 600, " tail"), ("only", "B"), ("trailing  ", " A"), pairs[0], ("a", "b" * 40)]
    return [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]


def options(source, **more):
    soft = {"attn_implementation": "eager"} if read_config(source.folder).get("attn_logit_softcapping") else {}
    return {"pretrained": str(source.folder), "dtype": "float32", "device": "cpu", "batch_size": 4, **soft, **more}


@pytest.fixture(scope="module")
def reference(tiny_cache):
    """HFLM's answers for each family, computed once."""
    return {name: HFLM(**options(tiny_source(name, tiny_cache))).loglikelihood(requests(), disable_tqdm=True) for name in NAMES}


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for (one, greedy), (two, other) in zip(ours, theirs, strict=True):
        assert abs(one - two) <= 1e-4
        assert greedy == other


@pytest.mark.parametrize("pack_tokens", [1, 7, 100, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_equals_lm_eval(name, pack_tokens, tiny_cache, reference):
    lm = PrefixLM(**options(tiny_source(name, tiny_cache), pack_tokens=pack_tokens))
    assert_same(lm.loglikelihood(requests(), disable_tqdm=True), reference[name])
    assert lm.not_shared_because is None
    assert lm.work.tokens_minimum <= lm.work.tokens_run < lm.work.tokens_unshared
    if pack_tokens >= 100:
        assert lm.work.tokens_run <= 1.3 * lm.work.tokens_minimum


@pytest.mark.parametrize("wrong", ["window", "causal"])
def test_the_comparison_has_teeth(wrong, tiny_cache, reference, monkeypatch):
    """With a mask that forgets the sliding window, or sees other branches of the tree, the answers differ."""
    if wrong == "window":
        original = PrefixLM._masks

        def masks(self, pack, past):
            self.model.config.sliding_window, before = 10**6, self.model.config.sliding_window
            try:
                return original(self, pack, past)
            finally:
                self.model.config.sliding_window = before
    else:

        def masks(self, pack, past):
            size = len(pack.tokens)
            return torch.triu(torch.full((size, past + size), -1e9), past + 1)[None, None]

    monkeypatch.setattr(PrefixLM, "_masks", masks)
    lm = PrefixLM(**options(tiny_source("mistral-7b", tiny_cache), self_check=False))
    ours = lm.loglikelihood(requests(), disable_tqdm=True)
    assert max(abs(one - two) for (one, _), (two, _) in zip(ours, reference["mistral-7b"], strict=True)) > 0.01


def test_self_check_falls_back(tiny_cache, reference, monkeypatch, caplog):
    """A model that computes something else on packed trees is found and scored by lm-eval itself."""
    monkeypatch.setattr(
        PrefixLM, "_masks", lambda self, pack, past: torch.zeros(1, 1, len(pack.tokens), past + len(pack.tokens))
    )
    lm = PrefixLM(**options(tiny_source("llama3-8b", tiny_cache)))
    assert_same(lm.loglikelihood(requests(), disable_tqdm=True), reference["llama3-8b"])
    assert "would differ" in lm.not_shared_because
    assert "prefixes are not shared" in caplog.text


def test_an_exception_in_the_model_falls_back(tiny_cache, reference, monkeypatch):
    def fails(self, pack, past):
        raise NotImplementedError("no 4-D masks here")

    monkeypatch.setattr(PrefixLM, "_masks", fails)
    lm = PrefixLM(**options(tiny_source("llama3-8b", tiny_cache)))
    assert_same(lm.loglikelihood(requests(), disable_tqdm=True), reference["llama3-8b"])
    assert "cannot be run on packed prefix trees (no 4-D masks here)" in lm.not_shared_because


def test_length_dependent_rope_is_not_shared(tiny_cache):
    lm = PrefixLM(**options(tiny_source("llama3-8b", tiny_cache)))
    lm.model.config.rope_parameters = {"rope_type": "longrope"}
    assert "length of the whole input" in lm._obstacle()


def test_out_of_memory_halves_and_changes_nothing(tiny_cache, reference, monkeypatch, caplog):
    original = PrefixLM._forward

    def forward(self, pack, *arguments):
        if len(pack.tokens) > 30 and len(pack.inputs) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, pack, *arguments)

    monkeypatch.setattr(PrefixLM, "_forward", forward)
    lm = PrefixLM(**options(tiny_source("llama3-8b", tiny_cache), pack_tokens=100, self_check=False))
    assert_same(lm.loglikelihood(requests(), disable_tqdm=True), reference["llama3-8b"])
    assert lm.pack_tokens == 25
    assert "out of memory" in caplog.text


def test_tokens_are_lm_evals(tiny_cache):
    """Batched tokenisation gives the ids that one text at a time does, with a tokenizer that merges across the border too."""
    lm = PrefixLM(**options(tiny_source("llama3-8b", tiny_cache)))
    seen = []
    original = HFLM.tok_encode
    lm._loglikelihood_tokens = lambda found, disable_tqdm: seen.extend(found) or [(0.0, False)] * len(found)
    lm.loglikelihood(requests(), disable_tqdm=True)
    for (context, continuation), ids, rest in seen:
        if context:
            whole = original(lm, context + continuation)
            assert ids + rest == whole
            assert ids == original(lm, context.rstrip())


def test_registered_with_lm_eval():
    from lm_eval.api.registry import get_model

    assert get_model("layerfuse") is PrefixLM
