"""Tensor names and shapes of a model, worked out from its config alone.

Covers the families in `families.FAMILIES`; a test compares every one with the model class of transformers. Symbols:
D hidden size, I intermediate size, V vocabulary, A heads x head size, K key/value heads x head size.
"""

import math

from .errors import CheckpointError
from .families import FAMILIES, Config


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every stored parameter, in the order of the forward pass; a tied head is not stored.

    Raises:
        CheckpointError: the model type is not one of FAMILIES.
    """
    model_type = config.get("model_type", "")
    if model_type not in FAMILIES:
        raise CheckpointError(f"no shapes are known for model_type {model_type!r}; known: {', '.join(FAMILIES)}")
    D, V = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in _layer_shapes(config).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (D,)
    if not config.get("tie_word_embeddings", FAMILIES[model_type].tied):
        shapes["lm_head.weight"] = (V, D)
    return shapes


def count_parameters(config: Config) -> int:
    """Number of parameters of a config, tied ones once."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def _layer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    model_type = config["model_type"]
    D, I = config["hidden_size"], config["intermediate_size"]  # noqa: E741 (the field's symbol)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or D // heads
    A, K = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    if model_type == "phi3":
        matrices = {
            "self_attn.qkv_proj": (A + 2 * K, D),
            "self_attn.o_proj": (D, A),
            "mlp.gate_up_proj": (2 * I, D),
            "mlp.down_proj": (D, I),
        }
    else:
        matrices = {
            "self_attn.q_proj": (A, D),
            "self_attn.k_proj": (K, D),
            "self_attn.v_proj": (K, D),
            "self_attn.o_proj": (D, A),
            "mlp.gate_proj": (I, D),
            "mlp.up_proj": (I, D),
            "mlp.down_proj": (D, I),
        }
    biased: list[str] = []
    if model_type == "qwen2":  # always, and the keys below are ignored
        biased = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    elif config.get("attention_bias") and model_type not in ("mistral", "phi3"):
        biased = [group for group in matrices if group.startswith("self_attn")]
    if config.get("mlp_bias") and model_type in ("llama", "smollm3"):
        biased += [group for group in matrices if group.startswith("mlp")]
    norms = {"input_layernorm": D, "post_attention_layernorm": D}
    if model_type in ("gemma2", "gemma3_text"):
        norms |= {"pre_feedforward_layernorm": D, "post_feedforward_layernorm": D}
    if model_type in ("qwen3", "gemma3_text"):
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    shapes: dict[str, tuple[int, ...]] = {}
    for group, shape in matrices.items():
        shapes[f"{group}.weight"] = shape
        if group in biased:
            shapes[f"{group}.bias"] = shape[:1]
    return shapes | {f"{group}.weight": (size,) for group, size in norms.items()}
