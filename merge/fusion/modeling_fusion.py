"""A host that reads the intermediate states of donors: one causal language model, from models of other architectures.

    for every donor    its tokens (`streams`), run without gradients as far as its last tap; states at the taps
    at every site      h <- h + Delta(h, f_1..f_K)   (`fusers`), by a forward hook, so that the host's code and names stay
    then               the host's own norm, head and loss

or, in the modes of `mixers`, the donors run to their ends and their distributions are mixed into the host's.

    >>> from merge.fusion import FusionForCausalLM                      # registers with AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("runs/fused")      # doctest: +SKIP

generate() with caches, beams and left padding, and lm-eval work as for the host alone. Only fusers and mixers are trainable.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .byte_tables import ByteTable
from .configuration_fusion import FusionConfig
from .errors import FusionError
from .fusers import MODES as FUSERS
from .fusers import Features, Fuser
from .mixers import MODES as MIXERS
from .mixers import Mixer, log_ratio
from .prefix import Retokenizer
from .streams import ALIGNMENTS, FusionCache, check_cache

DONOR_FOLDER = "donor-{}"  # where the tokenizers of donors are that need one
PUSHING = ("commit_message", "private", "token", "revision", "create_pr")  # options of saving that pushing has too
WHERE = ("revision", "token", "cache_dir", "local_files_only", "force_download")  # options of loading that tokenizers have too


class Tables(nn.Module):
    """Between the vocabularies of host and donor, to be filled; for a map `offsets` and `tokens` (`streams`), and where outputs
    are mixed `begins` and `lands` (`mixers`).
    """

    def __init__(self, donor: Mapping[str, Any], host_size: int, donor_size: int | None) -> None:
        """Of a donor of the config; `donor_size`: ids of its head, where it has one."""
        super().__init__()
        sizes = {"offsets": host_size + 1, "tokens": donor["map_size"]} if donor["alignment"] == "map" else {}
        sizes |= {"begins": host_size, "lands": donor_size} if donor_size is not None else {}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size, dtype=torch.int32))


class FusionForCausalLM(PreTrainedModel, GenerationMixin):
    """A host with donors; all arguments of `forward` are the host's.

    `control` replaces what the donors say, for comparisons: "zero", or "shuffle" (another row's; batches of two and more).

    Args:
        host, donors: models to build it of instead of empty ones; donors without head, cut after their last tap. Where
            outputs are mixed, `donor_heads` are to be filled, but for those that are the donors' embeddings.

    Raises:
        FusionError: a mode, tap or site that does not exist; in `forward`, inputs without token ids, a cache of another kind.
    """

    config_class = FusionConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    _no_split_modules: Any = frozenset(cls.__name__ for cls in (*FUSERS.values(), *MIXERS.values()))

    def __init__(
        self, config: FusionConfig, host: PreTrainedModel | None = None, donors: Sequence[PreTrainedModel] | None = None
    ) -> None:
        asked = getattr(config, "_attn_implementation_internal", None)  # before the base class puts its default there
        super().__init__(config)
        self.host = AutoModelForCausalLM.from_config(config.text_config, attn_implementation=asked) if host is None else host
        how: dict[str, Any] = {"dtype": self.host.dtype}  # what the whole is loaded in, whatever a donor was stored in
        how |= {"attn_implementation": "eager"} if asked == "eager" else {}  # donors get masks that others may not take
        self.donors: Any = nn.ModuleList(
            [AutoModel.from_config(one, **how) for one in config.donor_configs()] if donors is None else donors
        )
        self.fusers: Any = nn.ModuleList(make_fusers(config))
        heads = config.donor_configs() if config.fuses_outputs else []
        self.donor_heads: Any = nn.ModuleList(
            nn.Linear(one.hidden_size, one.vocab_size, bias=False, dtype=self.host.dtype) for one in heads
        )
        self._tied_weights_keys = {
            f"donor_heads.{number}.weight": f"donors.{number}.embed_tokens.weight"
            for number, one in enumerate(heads)
            if one.tie_word_embeddings
        }
        self.tables: Any = nn.ModuleList(
            Tables(donor, config.text_config.vocab_size, heads[number].vocab_size if heads else None)
            for number, donor in enumerate(config.donors)
        )
        self.tokenizers: tuple[Any, dict[int, Any]] | None = None  # as of `give_tokenizers`
        self._rules: dict[int, Retokenizer] = {}
        self.control: str | None = None
        self._features: Features | None = None
        self._states: dict[tuple[int, int], torch.Tensor] = {}
        self._last: torch.Tensor | None = None
        self._hook()
        self.post_init()
        parts: Any = self.donors  # which are not asked: a layer on two devices could not add what it writes to what it reads
        self._no_split_modules = {*self._no_split_modules, *(type(one.layers[0]).__name__ for one in parts)}
        self.freeze()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of any model of transformers; then all but the fusers is frozen again, which loading undoes."""
        found = super().from_pretrained(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        model.freeze()
        if model.prefixed:
            name = args[0] if args else kwargs["pretrained_model_name_or_path"]
            base = kwargs.get("subfolder", "")
            read = partial(AutoTokenizer.from_pretrained, name, **{key: kwargs[key] for key in WHERE if key in kwargs})
            donors = model.config.donor_configs()  # configs are named, or that of the folder would ask to run its code
            several = {
                one: read(subfolder=str(Path(base, DONOR_FOLDER.format(one))), config=donors[one]) for one in model.prefixed
            }
            model.give_tokenizers(read(subfolder=base, config=model.config.text_config), several)
        return found

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As of any model of transformers; with the tokenizers that it needs to run."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if self.tokenizers is not None and is_main_process:
            host, donors = self.tokenizers
            host.save_pretrained(save_directory)
            for number, one in donors.items():
                one.save_pretrained(Path(save_directory) / DONOR_FOLDER.format(number))
        if push_to_hub:  # not by the base class, which would not wait for the tokenizers
            how = {name: kwargs[name] for name in PUSHING if name in kwargs}
            self.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), **how)

    @property
    def prefixed(self) -> list[int]:
        """The donors that read their own tokens of the text so far."""
        return [number for number, donor in enumerate(self.config.donors) if donor["alignment"] == "prefix"]

    def give_tokenizers(self, host: PreTrainedTokenizerBase, donors: Mapping[int, PreTrainedTokenizerBase]) -> None:
        """The host's, and those of the donors with alignment "prefix"; `from_pretrained` does it.

        Raises:
            FusionError: one is missing, has no byte semantics, or more tokens than its model.
        """
        if missing := [number for number in self.prefixed if number not in donors]:
            raise FusionError(
                f"donor {missing[0]} reads its own tokens (alignment 'prefix'); expected a tokenizer of it, found none"
            )
        table = ByteTable.from_tokenizer(host, self.config.text_config.vocab_size)
        for number in self.prefixed:
            one = donors[number]
            own = ByteTable.from_tokenizer(one, self.config.donors[number]["config"]["vocab_size"])
            self._rules[number] = Retokenizer(table, own, one)
        self.tokenizers = host, dict(donors)

    def take_tables(self, other: "FusionForCausalLM") -> None:
        """Has the tables and tokenizers of a model with the same donors."""
        self.tables.load_state_dict(other.tables.state_dict())
        self.tokenizers, self._rules = other.tokenizers, other._rules

    def __getstate__(self) -> dict[str, Any]:
        """Of copies in other processes: what is made of tokenizers is made again there."""
        return {**self.__dict__, "_rules": {}}

    def _tables(self, number: int) -> Any:
        """What a donor's stream reads with."""
        if self.config.donors[number]["alignment"] == "map":
            return self.tables[number].offsets, self.tables[number].tokens
        if number not in self._rules:
            if self.tokenizers is None:
                raise FusionError(
                    f"donor {number} reads its own tokens (alignment 'prefix') and has no tokenizer; load the model with "
                    "from_pretrained, or call give_tokenizers"
                )
            self.give_tokenizers(*self.tokenizers)
        return self._rules[number]

    def freeze(self) -> None:
        """Only the fusers are trained."""
        for name, value in self.named_parameters():
            value.requires_grad_(name.startswith("fusers."))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: FusionCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """What the host returns: loss where `labels` are given, logits [B, T, V], past_key_values, ..."""
        if input_ids is None:
            raise FusionError("a fused model reads input_ids: its donors have other embeddings; found inputs_embeds alone")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise FusionError(f"attention_mask has shape {tuple(attention_mask.shape)}; expected [batch, tokens so far]")
        check_cache(past_key_values)
        if past_key_values is None and (self.config.text_config.use_cache if use_cache is None else use_cache):
            if not self.training:
                past_key_values = FusionCache(self.config)
        try:
            self._features = self.features(input_ids, attention_mask, past_key_values)
            run = self._mixed if self.config.fuses_outputs else self.host
            return run(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                labels=labels,
                use_cache=past_key_values is not None,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        finally:
            self._features = self._last = None
            self._states.clear()

    @torch.no_grad()
    def features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: FusionCache | None = None,
        *,
        tokens: bool | None = None,
    ) -> Features:
        """What the donors say of host ids [B, T]; the mask may reach back to what is in the cache.

        tokens    also the donors' tokens themselves, by default where a fuser reads them
        """
        if tokens is None:
            tokens = any(getattr(fuser, "reads_tokens", False) for fuser in self.fusers)
        current = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        found = Features([], [])
        for number, donor in enumerate(self.donors):
            taps, alignment = (self.config.donors[number][name] for name in ("taps", "alignment"))
            stream = ALIGNMENTS[alignment](None) if cache is None else cache.streams[number]
            if stream.read(input_ids, current, self._tables(number)):
                donor(**stream.inputs(donor.config, donor.dtype))
                states = [self._states.pop((number, tap)) for tap in taps]
            else:  # nothing but control tokens, or the beginning of a character
                shape, where = (len(input_ids), 0, donor.config.hidden_size), input_ids.device
                states = [torch.zeros(shape, dtype=donor.dtype, device=where) for _ in taps]
            aligned, memories = stream.take(states, tokens)
            found.aligned += aligned
            found.memories += memories
        return self.controlled(found)

    def controlled(self, found: Features) -> Features:
        """The features, or what `control` puts in their place."""
        if self.control is None:
            return found
        if self.control not in ("zero", "shuffle"):
            raise FusionError(f"there is no control {self.control!r}; there are zero, shuffle")

        def change(x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x) if self.control == "zero" else x.roll(1, 0)

        for memory in found.memories:
            memory.new = change(memory.new)
            if self.control == "shuffle":
                memory.positions, memory.valid = memory.positions.roll(1, 0), memory.valid.roll(1, 0)
        return Features([change(x) for x in found.aligned], found.memories)

    def get_input_embeddings(self) -> nn.Module:
        """The host's."""
        found: nn.Module = self.host.get_input_embeddings()
        return found

    def get_output_embeddings(self) -> nn.Module:
        """The host's."""
        found: nn.Module = self.host.get_output_embeddings()
        return found

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Heads of donors that are their embeddings too: transformers asks the config of the whole, which is the host's."""
        found: dict[str, str] = super().get_expanded_tied_weights_keys(all_submodels)
        return found | self._tied_weights_keys

    def fuser_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by its name in the model."""
        return {f"fusers.{name}": value for name, value in self.fusers.named_parameters()}

    def _hook(self) -> None:
        """Has the layers of host and donors tell what they find, and take what the fusers add."""
        parts: Any = self  # attributes of modules have no types
        for number, donor in enumerate(self.config.donors):
            for tap in donor["taps"]:
                one = parts.donors[number].norm if self.config.fuses_outputs else parts.donors[number].layers[tap - 1]
                one.register_forward_hook(partial(self._tap, (number, tap)))
        if self.config.fuses_outputs:
            self.get_output_embeddings().register_forward_pre_hook(self._keep)
            return
        for site, fuser in zip(self.config.fusion["sites"], parts.fusers, strict=True):
            parts.host.model.layers[site - 1].register_forward_hook(partial(self._inject, fuser))

    def _mixed(
        self,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the host returns, with the donors' distributions mixed into its logits at the positions that are kept."""
        assert self._features is not None
        output = self.host(logits_to_keep=logits_to_keep, return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = [x[:, kept] for x in self._features.aligned]
        ratios = [
            log_ratio(output.logits, x, partial(self._say, m), self.tables[m].begins, self.tables[m].lands)
            for m, x in enumerate(states)
        ]
        logits = self.fusers[0](output.logits, self._last, states, ratios)
        found = dict(output) | {"logits": logits}
        if labels is not None:
            vocabulary = self.config.text_config.vocab_size
            found["loss"] = self.host.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        result = type(output)(**found)
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def _say(self, number: int, state: torch.Tensor) -> torch.Tensor:
        """A donor's logits [..., U] of its last state [..., D]."""
        head = self.donor_heads[number]
        logits: torch.Tensor = head(state.to(head.weight.dtype))
        cap = getattr(self.donors[number].config, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()

    def _tap(self, key: tuple[int, int], module: nn.Module, arguments: Any, output: Any) -> None:
        self._states[key] = output[0] if isinstance(output, tuple) else output

    def _keep(self, module: nn.Module, arguments: Any) -> None:
        if self._features is not None:
            self._last = arguments[0]

    def _inject(self, fuser: Fuser, module: nn.Module, arguments: Any, output: Any) -> Any:
        if self._features is None:  # the host is called by itself
            return None
        if isinstance(output, tuple):
            return (self._inject(fuser, module, arguments, output[0]), *output[1:])
        return output + fuser(output, self._features).to(output.device)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Fuser | Mixer):
            module.reset_parameters()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **kwargs: Any
    ) -> None:
        """Generation makes the host's kind of cache; ours has the donors' beside it."""
        if generation_config.cache_implementation is not None:
            raise FusionError(
                f"cache_implementation is {generation_config.cache_implementation!r}; a fused model has its own, leave it out"
            )
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest, **kwargs)
        if given is None and model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"] = FusionCache(self.config)


def make_fusers(config: FusionConfig) -> list[Fuser | Mixer]:
    """What is trained, as it is before: a fuser for every site, or one mixer."""
    mode, hidden, settings = config.fusion["mode"], config.text_config.hidden_size, dict(config.fusion)
    if config.fuses_outputs:
        return [MIXERS[mode](hidden, config.widths(), **{name: settings[name] for name in MIXERS[mode].settings})]
    rest = [settings[name] for name in ("rank", "heads", "norm", "dropout")]
    return [FUSERS[mode](site, hidden, config.widths(), *rest) for site in settings["sites"]]
