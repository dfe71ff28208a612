"""lm-eval's Hugging Face model, with every shared prefix computed once.

Few-shot prompts of one subject differ only in their last question, and the continuations of one question not even in that.
`PrefixLM` scores the same token sequences as lm-eval's HFLM and returns the same log-probabilities; it only arranges the
work: `tree.plan` finds the prefixes, each is run once into keys and values, and what follows is run as packed prefix trees
on top of them. Logits are computed at scored positions only, and log-softmax is in float32.

A model that cannot be run this way is found by comparing a few real requests with HFLM, and is scored by HFLM itself.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .tree import Cluster, Pack, plan

log = logging.getLogger(__name__)

CPU_PACK_TOKENS = 512  # nodes per call: larger packs pay more for masked attention than they save in calls
GPU_PACK_TOKENS = 4096
TOKENIZER_BATCH = 1000  # texts per call of the tokenizer, which spreads them over the cores
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of log-probabilities against HFLM; other dtypes below
LOW_PRECISION_TOLERANCE = 0.5  # bf16 logits around 16 are 0.125 apart, and batch shapes already move them by a few steps
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # rotary frequencies that depend on the whole length of the input

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # strings for lm-eval's cache, context ids, continuation ids
Answer = tuple[float, bool]  # log-probability of the continuation, whether greedy decoding would have written it


@dataclass
class Work:
    """Tokens that the model was run on, and the fewest that any arrangement of the same requests needs."""

    tokens_run: int = 0
    tokens_minimum: int = 0
    tokens_unshared: int = 0


class FrozenLayer(DynamicLayer):
    """Keys and values of a prefix: updates see them followed by the new ones, and leave them as they are."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


@register_model("layerfuse")
class PrefixLM(HFLM):
    """HFLM whose loglikelihood requests share prefixes.

    Args:
        pack_tokens: nodes per call, by default chosen by device. Halved when memory runs out; results do not change.
        self_check: compare a few requests with HFLM before the first use.
    """

    def __init__(self, *args: Any, pack_tokens: int | None = None, self_check: bool = True, **kwargs: Any) -> None:
        self._encoded: dict[str, list[int]] = {}
        super().__init__(*args, **kwargs)
        self.pack_tokens = pack_tokens or (CPU_PACK_TOKENS if self.device.type == "cpu" else GPU_PACK_TOKENS)
        self.self_check = self_check
        self.not_shared_because = self._obstacle()
        self.work = Work()

    def _obstacle(self) -> str | None:
        """Why prefixes cannot be shared, as far as that can be seen without running; None if they may."""
        if self.backend != "causal":
            return "the model is not a causal language model"
        rope = getattr(self.model.config, "rope_parameters", None) or {}
        if str(rope.get("rope_type", rope.get("type", ""))) in LENGTH_DEPENDENT_ROPE:
            return "its rotary frequencies depend on the length of the whole input"
        return None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """lm-eval's own, with every distinct text tokenised once and in batches; the token ids are the same."""
        texts: dict[str, None] = {}
        for context, continuation in (request.args for request in requests):
            if context:
                texts[context.rstrip()] = texts[context + continuation] = None
        bos = self.tokenizer.decode(self.prefix_token_id)
        plain = [text for text in texts if text and not (bos and text.startswith(bos))]
        options = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        for start in range(0, len(plain), TOKENIZER_BATCH):
            batch = plain[start : start + TOKENIZER_BATCH]
            self._encoded |= dict(zip(batch, self.tokenizer(batch, **options)["input_ids"], strict=True))
        try:
            answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._encoded.clear()
        return answers

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and not kwargs and string in self._encoded:
            return list(self._encoded[string])
        ids: list[int] = super().tok_encode(string, add_special_tokens=add_special_tokens, **kwargs)
        return ids

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if self.not_shared_because is None and self.self_check and requests:
            self.self_check = False
            self.not_shared_because = self._check(requests)
        if self.not_shared_because is not None:
            log.warning("prefixes are not shared: %s", self.not_shared_because)
            answers: list[Answer] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return answers
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring requests")
        answers = self._score(requests, bar)
        bar.close()
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def _check(self, requests: list[Request]) -> str | None:
        """The reason not to share prefixes, found by comparing the longest, the shortest and two neighbours with HFLM."""
        order = sorted(range(len(requests)), key=lambda k: requests[k][1] + requests[k][2])
        lengths = sorted(range(len(requests)), key=lambda k: len(requests[k][1]) + len(requests[k][2]))
        middle = len(order) // 2
        chosen = list(dict.fromkeys([lengths[-1], lengths[0], *order[middle : middle + 2]]))
        sample = [(None, requests[k][1], requests[k][2]) for k in chosen]
        before = self.work
        self.work = Work()
        try:
            ours = self._score(sample, None, overhead=0)  # shares whatever can be shared
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            return f"{type(self.model).__name__} cannot be run on packed prefix trees ({reason})"
        finally:
            self.work = before
        theirs = super()._loglikelihood_tokens(sample, disable_tqdm=True, override_bs=1)
        worst = max(abs(one - two) for (one, _), (two, _) in zip(ours, theirs, strict=True))
        allowed = TOLERANCE.get(self.model.dtype, LOW_PRECISION_TOLERANCE)
        return None if worst <= allowed else f"log-probabilities would differ from lm-eval's by {worst:.2g}"

    def _score(self, requests: list[Request], bar: Any, overhead: int | None = None) -> list[Answer]:
        """The answers to `requests`, in order."""
        keys = [self._input(context, continuation) for _, context, continuation in requests]
        inputs = list(dict.fromkeys(keys))
        number = {tokens: index for index, tokens in enumerate(inputs)}
        asked: list[list[int]] = [[] for _ in inputs]
        for k, key in enumerate(keys):
            asked[number[key]].append(k)
        first = [len(tokens) - max(len(requests[k][2]) for k in asks) for tokens, asks in zip(inputs, asked, strict=True)]
        self.work.tokens_unshared += sum(len(tokens) for tokens in inputs)
        self.work.tokens_minimum += sum(cluster.num_tokens for cluster in plan(inputs, first, 1 << 60, overhead=1 << 60))
        options = {} if overhead is None else {"overhead": overhead}
        answers: dict[int, Answer] = {}
        left = list(range(len(inputs)))
        while left:
            try:
                for cluster in plan([inputs[i] for i in left], [first[i] for i in left], self.pack_tokens, **options):
                    for position, logprobs, greedy in self._run(cluster):
                        for k in asked[left[position]]:
                            continuation = requests[k][2]
                            answers[k] = _answer(logprobs[-len(continuation) :], greedy[-len(continuation) :], continuation)
                        if bar is not None:
                            bar.update(len(asked[left[position]]))
            except torch.OutOfMemoryError:
                if self.pack_tokens == 1:
                    raise
                self.pack_tokens //= 2
                log.warning("out of memory: going on with %d tokens per call", self.pack_tokens)
            left = [i for i in left if asked[i][0] not in answers]
        return [answers[k] for k in range(len(requests))]

    def _input(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """What goes into the model, cut from the left as HFLM does."""
        return tuple((context + continuation)[-(self.max_length + 1) :][:-1])

    def _run(self, cluster: Cluster) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yields (input, log-probabilities [positions, V], their argmax [positions]) for every input of a cluster."""
        cache = self._encode(cluster.prefix) if cluster.prefix else None
        for pack in cluster.packs:
            rows = sorted({node for path in pack.paths for node in path})
            where = {node: row for row, node in enumerate(rows)}
            logprobs = self._forward(pack, cache, len(cluster.prefix), rows)
            greedy = logprobs.argmax(dim=-1)
            for index, path in zip(pack.inputs, pack.paths, strict=True):
                at = torch.tensor([where[node] for node in path], device=logprobs.device)
                yield index, logprobs[at], greedy[at]

    @torch.inference_mode()
    def _encode(self, prefix: Sequence[int]) -> list[FrozenLayer]:
        """Keys and values of a prefix, one layer each."""
        # A cache that knows the config would drop what has left a sliding window; later tokens' windows are masked here.
        cache = DynamicCache()
        tokens = torch.tensor([prefix], device=self.device)
        self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.work.tokens_run += len(prefix)
        frozen = []
        for layer in cache.layers:
            one = FrozenLayer()
            one.lazy_initialization(layer.keys, layer.values)
            one.keys, one.values = layer.keys, layer.values
            frozen.append(one)
        return frozen

    @torch.inference_mode()
    def _forward(self, pack: Pack, cache: list[FrozenLayer] | None, past: int, rows: list[int]) -> torch.Tensor:
        """Log-probabilities in float32 after the nodes `rows` of a pack: [len(rows), V]."""
        device = self.device
        logits = self.model(
            input_ids=torch.tensor([pack.tokens], device=device),
            position_ids=torch.tensor([pack.depth], device=device),
            attention_mask=self._masks(pack, past),
            past_key_values=Cache(layers=list(cache)) if cache else None,
            use_cache=cache is not None,
            logits_to_keep=torch.tensor(rows, device=device),
        ).logits[0]
        self.work.tokens_run += len(pack.tokens)
        return torch.log_softmax(logits.float(), dim=-1)

    def _masks(self, pack: Pack, past: int) -> "torch.Tensor | dict[str, torch.Tensor]":
        """Additive attention masks [1, 1, S, past + S]: the whole prefix and a node's ancestors, within each layer's window."""
        device = self.device
        size = len(pack.tokens)
        index = torch.arange(size, device=device)
        end = torch.tensor(pack.end, device=device)
        depth = torch.tensor(pack.depth, device=device)
        ancestor = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])  # [i, j]: j is i or above it
        seen = torch.cat([torch.ones(size, past, dtype=torch.bool, device=device), ancestor], dim=1)
        distance = depth[:, None] - torch.cat([torch.arange(past, device=device), depth])[None, :]

        def additive(allowed: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(allowed.shape, dtype=self.model.dtype, device=device)
            return mask.masked_fill_(~allowed, torch.finfo(self.model.dtype).min)[None, None]

        config = self.model.config
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            return additive(seen & (distance < window) if window else seen)
        masks = {"full_attention": additive(seen)}
        if "sliding_attention" in kinds:
            masks["sliding_attention"] = additive(seen & (distance < window))
        return masks


def _answer(logprobs: torch.Tensor, greedy: torch.Tensor, continuation: list[int]) -> Answer:
    tokens = torch.tensor(continuation, device=logprobs.device)
    chosen = logprobs.gather(1, tokens[:, None])
    return float(chosen.sum()), bool((greedy == tokens).all())
