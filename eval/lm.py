"""lm-eval's Hugging Face model, with every shared prefix computed once.

Few-shot prompts of one subject differ only in their last question, and the continuations of one question not even in that.
`PrefixLM` scores the same token sequences as lm-eval's HFLM and returns the same log-probabilities; it only arranges the
work: `tree.plan` finds the prefixes, each is run once into keys and values, and what follows is run as packed prefix trees
on top of them. Logits are computed at scored positions only, and log-softmax is in float32.

A model that cannot be run this way is found by comparing a few real requests with HFLM, and is scored by HFLM itself.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from merge.checkpoint import FUSED

from .errors import ScoreError
from .logs import unsaid
from .tree import UNLIMITED, Cluster, Limits, Pack, plan

log = logging.getLogger(__name__)

CPU_PACK_TOKENS = 512  # nodes per call: larger packs pay more for masked attention than they save in calls
GPU_PACK_TOKENS = 4096
CPU_LOGITS_BYTES, GPU_LOGITS_BYTES = 2**28, 2**30  # of the logits of one call; more scored positions go into another call
SOFTMAX_ROWS = 128  # positions whose logits are in float32 at a time
CPU_FALLBACK_BATCH, GPU_FALLBACK_BATCH = 8, 64  # prompts per call where lm-eval scores by itself; halved when memory runs out
TOKENIZER_BATCH = 1000  # texts per call of the tokenizer, which spreads them over the cores
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of log-probabilities against HFLM; other dtypes below
LOW_PRECISION_TOLERANCE = 0.5  # bf16 logits around 16 are 0.125 apart, and batch shapes already move them by a few steps
LOW_PRECISION_SHARE = 0.01  # of a long, improbable text's log-probability, which such models get no better than that
TOKENS_PER_TOLERANCE = 50  # rounding adds up: longer continuations may differ by as much for every so many tokens
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # rotary frequencies that depend on the whole length of the input

ALIBI = ("bloom", "mpt")  # model types whose positions are biases of the attention

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
        assert self.keys is not None  # set where it is made, in _encode
        assert self.values is not None
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


@register_model("layerfuse")
class PrefixLM(HFLM):
    """HFLM whose loglikelihood requests share prefixes.

    Args:
        batch_size: prompts per call at most; "auto" leaves it to pack_tokens.
        pack_tokens: tokens per call, by default chosen by device. Halved when memory runs out; results do not change.
        self_check: compare a few requests with HFLM before the first use.
        letters_apart: encode a continuation by itself, without leading blanks, and keep its last token only, as the
            reference tool does ("A" rather than " A"); lm-eval encodes context and continuation together.
        device: where a model that was handed in ready takes its inputs, if that is not where its first weights are.
        accelerator: of `accelerate launch`, for a model that was handed in ready.

    Attributes:
        work: what was run so far.
        not_shared_because: why lm-eval's own path is taken; None while prefixes are shared.
        answered: called with the number of requests that were just answered, in place of a progress bar.
        head_of: None, or gives the beginning of a context that its prompt shares with others; the log-likelihood of the
            rest of the context is then put into `prompts`: context -> (nll, tokens), nearly for free.
    """

    def __init__(
        self,
        pretrained: Any,
        *args: Any,
        batch_size: int | str = "auto",
        pack_tokens: int | None = None,
        self_check: bool = True,
        letters_apart: bool = False,
        device: str | None = None,
        accelerator: Any = None,
        **kwargs: Any,
    ) -> None:
        self._encoded: dict[str, list[int]] = {}
        options = kwargs | ({"device": device} if device else {})
        auto = str(batch_size).startswith("auto")
        # Of a model that was handed in ready lm-eval says that options may be ignored, of a fused one that its type is unknown.
        false_alarms = () if isinstance(pretrained, str) else ("`pretrained`", "neither marked as CausalLM")
        with unsaid("lm_eval.models.huggingface", *false_alarms):
            super().__init__(pretrained, *args, batch_size=1 if auto else int(batch_size), **options)
        if not isinstance(pretrained, str) and device:
            self._device = torch.device(device)
        if accelerator is not None and accelerator.num_processes > 1:
            self.accelerator = accelerator
        if getattr(self, "accelerator", None) is not None:
            # HFLM does this on machines with several GPUs only; processes on CPUs would each answer everything.
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        on_cpu = self.device.type == "cpu"
        self.pack_tokens = pack_tokens or (CPU_PACK_TOKENS if on_cpu else GPU_PACK_TOKENS)
        self.pack_inputs = UNLIMITED if auto else int(batch_size)
        if auto:
            self.batch_size_per_gpu = CPU_FALLBACK_BATCH if on_cpu else GPU_FALLBACK_BATCH
        logits_bytes = CPU_LOGITS_BYTES if on_cpu else GPU_LOGITS_BYTES
        self.pack_scored = max(1, logits_bytes // (self.model.config.get_text_config().vocab_size * self.model.dtype.itemsize))
        self.self_check = self_check
        self._checking = False  # while a check runs, every mask is one of ours
        self._checked = 0  # length of the longest request that was compared with HFLM
        self._windows = sorted(_windows(self.model.config.to_dict()))
        self.letters_apart = letters_apart
        self.not_shared_because = self._obstacle()
        self.work = Work()
        self.answered: Callable[[int], object] | None = None
        self.head_of: Callable[[str], str] | None = None
        self.prompts: dict[str, tuple[float, int]] = {}

    def _obstacle(self) -> str | None:
        """Why prefixes cannot be shared, as far as that can be seen without running; None if they may."""
        if self.backend != "causal":
            return "the model is not a causal language model"
        if self.model.config.model_type == FUSED:
            return "its donors read every text by itself, from the start"
        config = self.model.config.get_text_config()
        if getattr(config, "alibi", False) or config.model_type in ALIBI:
            return "its attention adds biases by position (ALiBi), which masks of prefix trees would replace"
        rope = getattr(config, "rope_parameters", None) or {}
        if str(rope.get("rope_type", rope.get("type", ""))) in LENGTH_DEPENDENT_ROPE:
            return "its rotary frequencies depend on the length of the whole input"
        return None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """lm-eval's own, with every distinct text tokenised once and in batches; the token ids are the same."""
        self._encode_texts(requests)
        try:
            answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.answered is not None)
        finally:
            self._encoded.clear()
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or self.answered is not None)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        found: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm or self.answered is not None)
        return found

    def encode(self, requests: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
        """The token ids (context, continuation) that `loglikelihood` scores for requests with contexts."""
        self._encode_texts(requests)
        try:
            return [self._encode_pair(*request.args) for request in requests]
        finally:
            self._encoded.clear()

    def _encode_texts(self, requests: Sequence[Any]) -> None:
        texts: dict[str, None] = {}
        for context, continuation in (request.args for request in requests):
            if context:
                texts[context.rstrip()] = texts[context + continuation] = None
                if self.letters_apart:
                    texts[context] = None
                if self.head_of:
                    texts[self.head_of(context)] = None
        bos = self.tokenizer.decode(self.prefix_token_id)
        plain = [text for text in texts if text and not (bos and text.startswith(bos))]
        options = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        for start in range(0, len(plain), TOKENIZER_BATCH):
            batch = plain[start : start + TOKENIZER_BATCH]
            self._encoded |= dict(zip(batch, self.tokenizer(batch, **options)["input_ids"], strict=True))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and not kwargs and string in self._encoded:
            return list(self._encoded[string])
        ids: list[int] = super().tok_encode(string, add_special_tokens=add_special_tokens, **kwargs)
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.letters_apart:
            return self.tok_encode(context), self.tok_encode(continuation.strip(), add_special_tokens=False)[-1:]
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        longest = max((len(context) + len(rest) for _, context, rest in requests), default=0)
        if self.not_shared_because is None and self.self_check and self._must_check(longest):
            self._checked = longest
            self.not_shared_because = self._check(requests)
            if self.not_shared_because is not None:
                log.warning("prefixes are not shared: %s", self.not_shared_because)
        prompts = self._prompt_requests(requests)
        self.work.tokens_unshared += sum(map(len, {self._input(context, rest) for _, context, rest in requests}))
        bar = tqdm(
            total=len(requests), disable=disable_tqdm or self.answered is not None or self.rank != 0, desc="Scoring requests"
        )
        advance = self.answered or bar.update
        score = self._score if self.not_shared_because is None else self._score_unshared
        everything = score([*requests, *prompts.values()], lambda k: advance(1) if k < len(requests) else None)
        bar.close()
        answers = everything[: len(requests)]
        for (context, (_, _, rest)), (logprob, _) in zip(prompts.items(), everything[len(requests) :], strict=True):
            self.prompts[context] = (-logprob, len(rest))
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def _prompt_requests(self, requests: Sequence[Request]) -> dict[str, Request]:
        """For every context: its head as the context, and the rest of it to be predicted."""
        found: dict[str, Request] = {}
        for strings, context_ids, _ in requests if self.head_of else ():
            if strings is None or strings[0] in found or len(context_ids) > self.max_length:
                continue
            # The head ends where the tokens first differ: the last token of its text may have grown over the border.
            head = self.tok_encode(self.head_of(strings[0]))  # type: ignore[misc]
            shared = next((i for i, (a, b) in enumerate(zip(head, context_ids, strict=False)) if a != b), len(head))
            if 0 < shared < len(context_ids):
                found[strings[0]] = (None, context_ids[:shared], context_ids[shared:])
        return found

    def _score_unshared(self, requests: Sequence[Request], done: Callable[[int], object]) -> list[Answer]:
        """lm-eval's own scores, a few calls' worth at a time so that running out of memory loses little."""
        answers: list[Answer] = []
        order = sorted(range(len(requests)), key=lambda k: -len(requests[k][1]) - len(requests[k][2]))
        while len(answers) < len(order):
            chosen = order[len(answers) : len(answers) + 16 * self.batch_size_per_gpu]
            try:
                answers += super()._loglikelihood_tokens([requests[k] for k in chosen], True, self.batch_size_per_gpu)
            except RuntimeError as error:
                if not _out_of_memory(error) or self.batch_size_per_gpu == 1:
                    raise
                self.batch_size_per_gpu //= 2
                log.warning("out of memory: going on with %d prompts per call", self.batch_size_per_gpu)
                continue
            self.work.tokens_run += sum(map(len, {self._input(requests[k][1], requests[k][2]) for k in chosen}))
            for k in chosen:
                done(k)
        return [answer for _, answer in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])]

    def _must_check(self, longest: int) -> bool:
        """Whether inputs of that length are the first, or the first beyond a window: short ones do not vouch for those."""
        return longest > 0 and (not self._checked or any(self._checked <= window < longest for window in self._windows))

    def _check(self, requests: list[Request]) -> str | None:
        """The reason not to share prefixes, found by comparing the longest, the shortest and some neighbours with HFLM."""
        order = sorted(range(len(requests)), key=lambda k: requests[k][1] + requests[k][2])
        lengths = sorted(range(len(requests)), key=lambda k: len(requests[k][1]) + len(requests[k][2]))
        middle, longest = len(order) // 2, order.index(lengths[-1])
        chosen = list(dict.fromkeys([*order[max(0, longest - 1) : longest + 1], lengths[0], *order[middle : middle + 2]]))
        sample = [(None, requests[k][1], requests[k][2]) for k in chosen]
        before = self.work
        self.work, self._checking = Work(), True
        try:
            ours = self._score(sample, overhead=0)  # shares whatever can be shared
        except ScoreError:  # the request's fault, not the model's
            raise
        except Exception as error:  # whatever a model does that was not made for this; lm-eval can still score it
            reason = str(error).partition("\n")[0] or type(error).__name__
            return f"{type(self.model).__name__} cannot be run on packed prefix trees ({reason})"
        finally:
            self.work, self._checking = before, False
        theirs = super()._loglikelihood_tokens(sample, disable_tqdm=True, override_bs=1)
        low = self.model.dtype not in TOLERANCE
        for (one, _), (two, _), (_, _, rest) in zip(ours, theirs, sample, strict=True):
            allowed = TOLERANCE.get(self.model.dtype, LOW_PRECISION_TOLERANCE) * max(1.0, len(rest) / TOKENS_PER_TOLERANCE)
            if abs(one - two) > max(allowed, LOW_PRECISION_SHARE * abs(two) if low else 0.0):
                return f"log-probabilities would differ from lm-eval's by {abs(one - two):.2g}"
        return None

    def _score(
        self, requests: Sequence[Request], done: Callable[[int], object] = lambda k: None, overhead: int | None = None
    ) -> list[Answer]:
        """The answers to `requests`, in order; `done` is called with the index of each as it is answered."""
        for _, _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ScoreError(
                    f"a continuation has {len(continuation)} tokens, expected 1 to {self.max_length}, the model's window"
                )
        keys = [self._input(context, continuation) for _, context, continuation in requests]
        inputs = list(dict.fromkeys(keys))
        number = {tokens: index for index, tokens in enumerate(inputs)}
        asked: list[list[int]] = [[] for _ in inputs]
        for k, key in enumerate(keys):
            asked[number[key]].append(k)
        first = [len(tokens) - max(len(requests[k][2]) for k in asks) for tokens, asks in zip(inputs, asked, strict=True)]
        whole_tree = plan(inputs, first, Limits(UNLIMITED), overhead=UNLIMITED)
        self.work.tokens_minimum += sum(cluster.num_tokens for cluster in whole_tree)
        options = {} if overhead is None else {"overhead": overhead}
        answers: dict[int, Answer] = {}
        left = list(range(len(inputs)))
        while left:
            limits = Limits(self.pack_tokens, self.pack_inputs, self.pack_scored)
            try:
                for cluster in plan([inputs[i] for i in left], [first[i] for i in left], limits, **options):
                    for position, scored in self._run(cluster):
                        for k in asked[left[position]]:
                            answers[k] = scored.answer(requests[k][2])
                            done(k)
            except RuntimeError as error:
                if not _out_of_memory(error) or self.pack_tokens == 1:
                    raise
                self.pack_tokens //= 2
                log.warning("out of memory: going on with %d tokens per call", self.pack_tokens)
            left = [i for i in left if asked[i][0] not in answers]
        return [answers[k] for k in range(len(requests))]

    def _input(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """What goes into the model, cut from the left as HFLM does."""
        return tuple((context + continuation)[-(self.max_length + 1) :][:-1])

    def _run(self, cluster: Cluster) -> "Iterator[tuple[int, Scored]]":
        """Yields (input, its scored positions) for every input of a cluster."""
        cache = self._encode(cluster.prefix) if cluster.prefix else None
        for pack in cluster.packs:
            rows = sorted({node for path in pack.paths for node in path})
            where = {node: row for row, node in enumerate(rows)}
            logits = self._forward(pack, cache, len(cluster.prefix), rows)
            greedy = logits.argmax(dim=-1)
            top = logits.gather(1, greedy[:, None]).float()
            total = torch.cat(
                [
                    (x.float() - m).logsumexp(dim=-1)
                    for x, m in zip(logits.split(SOFTMAX_ROWS), top.split(SOFTMAX_ROWS), strict=True)
                ]
            )
            for index, path in zip(pack.inputs, pack.paths, strict=True):
                yield index, Scored([where[node] for node in path], logits, greedy, top[:, 0], total)

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
            if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
                raise TypeError(f"a layer keeps its state as {type(layer).__name__}, not as keys and values")
            one = FrozenLayer()
            one.lazy_initialization(layer.keys, layer.values)
            one.keys, one.values = layer.keys, layer.values
            frozen.append(one)
        return frozen

    @torch.inference_mode()
    def _forward(self, pack: Pack, cache: list[FrozenLayer] | None, past: int, rows: list[int]) -> torch.Tensor:
        """Logits after the nodes `rows` of a pack, in the model's dtype: [len(rows), V]."""
        device = self.device
        chain = not self._checking and past == 0 and pack.depth[0] == 0 and all(end == len(pack.tokens) for end in pack.end)
        logits: torch.Tensor = self.model(
            input_ids=torch.tensor([pack.tokens], device=device),
            position_ids=torch.tensor([pack.depth], device=device),
            attention_mask=None if chain else self._masks(pack, past),  # a single sequence is causal as the model makes it
            past_key_values=Cache(layers=list(cache)) if cache else None,
            use_cache=cache is not None,
            logits_to_keep=torch.tensor(rows, device=device),
        ).logits[0]
        self.work.tokens_run += len(pack.tokens)
        return logits

    def _masks(self, pack: Pack, past: int, rows: list[int] | None = None) -> "torch.Tensor | dict[str, torch.Tensor]":
        """Additive attention masks [1, 1, R, past + S] for the nodes `rows` (default: all S), for each kind of attention: a
        node sees the whole prefix and its ancestors, within the layer's window.
        """
        device = self.device
        size = len(pack.tokens)
        index = torch.arange(size, device=device)
        row = index if rows is None else torch.tensor(rows, device=device)
        end = torch.tensor(pack.end, device=device)
        depth = torch.tensor(pack.depth, device=device)
        ancestor = (index[None, :] <= row[:, None]) & (row[:, None] < end[None, :])  # [i, j]: j is i or above it
        seen = torch.cat([torch.ones(len(row), past, dtype=torch.bool, device=device), ancestor], dim=1)

        def additive(allowed: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(allowed.shape, dtype=self.model.dtype, device=device)
            return mask.masked_fill_(~allowed, torch.finfo(self.model.dtype).min)[None, None]

        config = self.model.config.get_text_config()
        window: int = getattr(config, "sliding_window", None) or 0
        kinds = getattr(config, "layer_types", None)

        def within() -> torch.Tensor:
            distance = depth[row][:, None] - torch.cat([torch.arange(past, device=device), depth])[None, :]
            return seen & (distance < window)

        if kinds is None:
            return additive(within() if window else seen)
        masks = {"full_attention": additive(seen)}
        if "sliding_attention" in kinds and window:
            masks["sliding_attention"] = additive(within())
        return masks


@dataclass(frozen=True)
class Scored:
    """Positions of one input: its rows of `logits` [R, V], their argmax `greedy`, the logit there `top`, and `total`, the
    log of the sum of exp(logits - top), each [R]. Subtracting `top` first keeps the small differences of large logits.
    """

    rows: list[int]
    logits: torch.Tensor
    greedy: torch.Tensor
    top: torch.Tensor
    total: torch.Tensor

    def answer(self, continuation: list[int]) -> Answer:
        """Log-probability of a continuation that ends at the last position, in float32."""
        rows = torch.tensor(self.rows[-len(continuation) :], device=self.logits.device)
        tokens = torch.tensor(continuation, device=self.logits.device)
        logprobs = (self.logits[rows, tokens].float() - self.top[rows]) - self.total[rows]
        return float(logprobs.sum()), bool((self.greedy[rows] == tokens).all())


def _windows(config: Any) -> Iterator[int]:
    """Every number in a config, however deep, that is the width of a window or chunk of attention by its name."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _windows(value)
        elif isinstance(value, int) and not isinstance(value, bool) and ("window" in str(key) or "chunk" in str(key)):
            yield value


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
