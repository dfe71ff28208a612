"""What the model families differ in, as tables: tensor names, norms, attention kinds.

The tables cover decoder-only transformers with RMS norms and gated MLPs in the naming that Hugging Face uses. Everything
else can still be dropped layer by layer, because kept layers are bytes; only mixing needs to know what a tensor is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError

Config = Mapping[str, Any]

# Tensor groups of one layer (the name without ".weight" or ".bias") and what they are.
GROUPS = {
    "self_attn.q_proj": "projection",
    "self_attn.k_proj": "projection",
    "self_attn.v_proj": "projection",
    "self_attn.qkv_proj": "projection",  # Phi-3: q, k and v rows in one matrix
    "self_attn.o_proj": "projection",
    "mlp.gate_proj": "projection",
    "mlp.up_proj": "projection",
    "mlp.gate_up_proj": "projection",  # Phi-3: gate and up rows in one matrix
    "mlp.down_proj": "projection",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "pre_feedforward_layernorm": "norm",
    "post_feedforward_layernorm": "norm",
    "self_attn.q_norm": "norm",
    "self_attn.k_norm": "norm",
    "self_attn.rotary_emb.inv_freq": "buffer",  # written by old releases, recomputed by new ones
}
ATTENTION_READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj")
MLP_READERS = ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj")


@dataclass(frozen=True)
class Family:
    """What config.json leaves unsaid about a model type.

    norm_offset: what is added to a stored norm weight before it is used (Gemma stores weight - 1).
    tied: whether embeddings and head are one tensor when config.json does not say.
    layer_types: the attention kind of every layer where config.json does not list them, given the layer count.
    """

    norm_offset: float = 0.0
    tied: bool = False
    layer_types: Callable[[Config, int], list[str]] | None = None


def group_of(name: str) -> str:
    """The tensor group of a name within a layer: `mlp.up_proj.weight` -> `mlp.up_proj`."""
    for ending in (".weight", ".bias"):
        if name.endswith(ending):
            return name[: -len(ending)]
    return name


def kind_of(name: str) -> str | None:
    """'projection', 'norm' or 'buffer' for a tensor name within a layer; None when it is not known."""
    return GROUPS.get(group_of(name))


def norm_read_by(name: str, names_in_layer: Sequence[str]) -> str | None:
    """The name of the norm weight whose output the matrix `name` multiplies; None when it reads something else.

    Norms on a branch's output (post-norms of Gemma 2 and OLMo 2, q and k norms) are read by no matrix.
    """
    group = group_of(name)
    sandwich = "post_feedforward_layernorm.weight" in names_in_layer
    norm = {
        **dict.fromkeys(ATTENTION_READERS, "input_layernorm.weight"),
        **dict.fromkeys(MLP_READERS, f"{'pre_feedforward' if sandwich else 'post_attention'}_layernorm.weight"),
    }.get(group)
    return norm if name.endswith(".weight") and norm in names_in_layer else None


# ---------------------------------------------------------------------------------------------------------------------
# Attention kinds by layer index, as each model class fills them in (transformers 5)


def _alternating(config: Config, layers: int) -> list[str]:
    """Gemma 2: sliding, full, sliding, ..."""
    return _every(2, layers)


def _patterned(config: Config, layers: int) -> list[str]:
    """Gemma 3: every sixth layer sees everything, unless the config names another period."""
    period = config.get("sliding_window_pattern") or 6
    if not isinstance(period, int) or period < 1:
        raise CheckpointError(f"config.json: 'sliding_window_pattern' is {period!r}, expected at least 1")
    return _every(period, layers)


def _upper_window(config: Config, layers: int) -> list[str]:
    """Qwen 2 and 3: layers from max_window_layers on slide, if sliding is used at all."""
    first = config.get("max_window_layers", 28) if config.get("use_sliding_window") else layers
    if not isinstance(first, int):
        raise CheckpointError(f"config.json: 'max_window_layers' is {first!r}, expected a whole number")
    return ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]


def _nope(config: Config, layers: int) -> list[str]:
    """SmolLM3: layers without rotary positions slide, if sliding is used at all."""
    slides = config.get("use_sliding_window") and config.get("sliding_window") is not None
    return ["sliding_attention" if slides and not rope else "full_attention" for rope in rope_layers(config, layers)]


def _every(period: int, layers: int) -> list[str]:
    return ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)]


def rope_layers(config: Config, layers: int) -> list[int]:
    """SmolLM3's no_rope_layers: 1 where a layer rotates positions, 0 where it does not."""
    listed = config.get("no_rope_layers")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != layers:
            raise CheckpointError(f"config.json: 'no_rope_layers' has not one entry for each of the {layers} layers")
        return list(listed)
    interval = config.get("no_rope_layer_interval", 4)
    if not isinstance(interval, int) or interval < 1:
        raise CheckpointError(f"config.json: 'no_rope_layer_interval' is {interval!r}, expected at least 1")
    return [int((layer + 1) % interval != 0) for layer in range(layers)]


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "phi3": Family(),
    "qwen2": Family(layer_types=_upper_window),
    "qwen3": Family(layer_types=_upper_window),
    "smollm3": Family(tied=True, layer_types=_nope),
    "gemma": Family(norm_offset=1.0, tied=True),
    "gemma2": Family(norm_offset=1.0, tied=True, layer_types=_alternating),
    "gemma3_text": Family(norm_offset=1.0, tied=True, layer_types=_patterned),
}
