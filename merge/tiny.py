"""Tiny random twins of real models: the same config class, tensor names, tying and layer count, some 10k parameters.

`tiny:llama3-8b` stands for Llama-3-8B wherever a model is named, so that everything can be tried without weights. A twin
is made from its config and a seed by numpy alone, in well under a second; the bytes are the same on every machine.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from .checkpoint import INDEX_FILE, encode_header
from .errors import ModelNotFoundError
from .families import FAMILIES
from .publish import build_once
from .records import read_json
from .shapes import tensor_shapes

PREFIX = "tiny:"
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
VOCABULARY = 256 + 8  # all bytes, the special tokens, and room that no token uses, as real models have
HIDDEN, INTERMEDIATE, HEADS = 8, 16, 4
WINDOW = 4  # sliding window in tokens: short prompts already reach beyond it
RECIPE = 1  # raise when the same config would give other bytes
CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"


def tiny_names(configs: Path) -> list[str]:
    """The names for which `configs`/models holds a config."""
    return sorted(path.stem for path in (configs / "models").glob("*.json"))


def tiny_folder(name: str, configs: Path, cache: Path, *, seed: int = 0) -> Path:
    """The folder of the twin of `configs`/models/NAME.json, built in `cache` on first use.

    Raises:
        ModelNotFoundError: there is no config of that name.
    """
    path = configs / "models" / f"{name}.json"
    if not path.is_file():
        raise ModelNotFoundError(f"there is no tiny model {name!r}; known: {', '.join(tiny_names(configs))}")
    config = tiny_config(read_json(path)["config"])
    key = hashlib.sha256(json.dumps([config, seed, RECIPE], sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / "tiny" / f"{name}-{key}"
    build_once(folder, lambda scratch: write_tiny(config, scratch, seed=seed))
    return folder


def tiny_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a real model with small sizes; everything that decides the computation's form is kept."""
    small = small_config(
        config, HIDDEN, INTERMEDIATE, HEADS, 2 * HIDDEN // HEADS
    ) | {  # real heads are not hidden / heads either
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    if config.get("sliding_window"):
        small["sliding_window"] = WINDOW
    if "original_max_position_embeddings" in (config.get("rope_scaling") or {}):
        small["rope_scaling"] = config["rope_scaling"] | {"original_max_position_embeddings": 256}
    return small


def small_config(config: Mapping[str, Any], hidden: int, intermediate: int, heads: int, head_dim: int) -> dict[str, Any]:
    """The config of a real model with other widths; keys and values keep their share of the heads.

    head_dim    where the config names one; elsewhere it is hidden / heads
    """
    old_heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or old_heads
    small = dict(config) | {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads * kv_heads // old_heads),
    }
    return small | {key: head_dim for key in ("head_dim", "query_pre_attn_scalar") if config.get(key)}


def write_tiny(config: Mapping[str, Any], folder: Path, *, seed: int = 0, max_shard_size: str = "20KB") -> None:
    """Writes a checkpoint with random bf16 weights and a byte-level tokenizer into `folder`.

    Matrices are normal with variance 1 / fan-in, so that signals keep their size through the layers; norms scatter around 1.
    """
    offset = FAMILIES[config["model_type"]].norm_offset
    tensors = {}
    for index, (name, shape) in enumerate(tensor_shapes(config).items()):
        draw = np.random.default_rng([seed, index]).standard_normal(shape, dtype=np.float32)
        if name.endswith(".bias"):
            draw *= 0.1
        elif len(shape) == 1:
            draw = 1.0 - offset + 0.1 * draw
        elif "embed_tokens" not in name:
            draw /= np.sqrt(shape[1])
        bits = draw.astype(np.float32).view(np.uint32)
        tensors[name] = (bits >> 16).astype(np.uint16)  # truncated to bf16, which is as random as rounding
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        entries = [(name, "BF16", tensors[name].shape, tensors[name].nbytes) for name in names]
        (folder / file).write_bytes(encode_header(entries) + b"".join(tensors[name].tobytes() for name in names))
    if split.is_sharded:
        shard_index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / INDEX_FILE, shard_index)
    _write_json(folder / "config.json", dict(config))
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    _write_json(folder / "generation_config.json", generation | {"pad_token_id": config["pad_token_id"]})
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """One token per byte, then the special tokens; everything round-trips."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos, pad = SPECIAL_TOKENS
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    _write_json(folder / "special_tokens_map.json", names)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", names | settings)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
