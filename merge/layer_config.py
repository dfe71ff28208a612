"""config.json after layers are gone: every per-layer entry is cut with the same keep list, or the merge is refused.

Writing only `num_hidden_layers` makes folders that do not load (a list of the old length) or, worse, load and compute
something else (SmolLM3's `no_rope_layers`). The rule here: a list as long as the model is per layer and is cut; a key that
describes layers by index or by period is recomputed where that can be expressed, and refused by name where it cannot.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import CheckpointError, PlanError
from .families import FAMILIES, Config, rope_layers
from .plan import Plan

# Lists that may happen to be as long as the model and are not per layer.
NOT_PER_LAYER = {"architectures", "eos_token_id", "bos_token_id", "pad_token_id", "bad_words_ids", "suppress_tokens"}

# Keys that describe layers by period or index, which no cut list can stand for. A value here is inert.
BY_INDEX: dict[str, tuple[Any, ...]] = {
    "attn_layer_indices": (None, []),
    "cross_attention_layers": (None, []),
    "decoder_sparse_step": (None, 1),
    "first_k_dense_replace": (None, 0),
    "full_attention_interval": (None,),
    "full_attn_idxs": (None, []),
    "global_attn_every_n_layers": (None, 1),
    "hybrid_override_pattern": (None,),
    "interleave_moe_layer_step": (None, 1),
    "mlp_only_layers": (None, []),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "shared_layers": (None, []),
}
FROM_THE_TOP = {"num_kv_shared_layers": (None, 0)}  # counts from the last layer, so even dropping the top changes it

# Keys from which model classes work out attention kinds when layer_types is not listed. The families in FAMILIES have a
# rule here; for others the kinds are unknown and layers can neither be renumbered nor mixed.
KIND_RULES = (
    "sliding_window",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "layer_group_size",
    "no_rope_layer_interval",
)


@dataclass(frozen=True)
class CutConfig:
    """A config for the surviving layers, and what was changed in words."""

    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def layer_count(config: Config) -> int:
    """The number of decoder layers that a config declares.

    Raises:
        CheckpointError: the config does not describe one plain stack of layers.
    """
    for nested in ("text_config", "decoder"):
        if isinstance(config.get(nested), dict):
            raise CheckpointError(
                f"config.json nests its decoder in {nested!r}; only plain decoder-only models can be merged: "
                "save the language model alone first"
            )
    if not isinstance(config.get("model_type", ""), str):
        raise CheckpointError(f"config.json: 'model_type' is {config['model_type']!r:.60}, expected a string")
    layers = config.get("num_hidden_layers")
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise CheckpointError(f"config.json: 'num_hidden_layers' is {layers!r}, expected a whole number of at least 1")
    return layers


def layer_types(config: Config, layers: int) -> list[str]:
    """The attention kind of every layer ('full_attention', 'sliding_attention', ...), listed or by the family's rule."""
    listed = config.get("layer_types")
    if listed is None:
        family = FAMILIES.get(config.get("model_type", ""))
        return family.layer_types(config, layers) if family and family.layer_types else ["full_attention"] * layers
    if not isinstance(listed, list) or len(listed) != layers:
        raise CheckpointError(f"config.json: 'layer_types' has not one entry for each of the {layers} layers")
    return [str(kind) for kind in listed]


def cut_config(config: Config, keep: Sequence[int]) -> CutConfig:
    """The config of the model whose layers are `keep` (original numbers, in order, repeats allowed).

    Raises:
        PlanError: a key describes layers in a way that the new layers cannot be described in; the message names it.
    """
    layers = layer_count(config)
    types = layer_types(config, layers)
    is_prefix = list(keep) == list(range(len(keep)))
    if not is_prefix and (rule := _unknown_kinds(config)):
        raise PlanError(
            f"config.json: {rule} = {config[rule]!r} decides the attention kind of each layer of {config.get('model_type')!r} "
            "by a rule that is not known here; list 'layer_types' in config.json, or keep a run of layers that starts at 0"
        )
    result: dict[str, Any] = dict(config)
    result["num_hidden_layers"] = len(keep)
    notes = []

    for key, value in config.items():
        if key not in NOT_PER_LAYER and isinstance(value, list) and len(value) == layers:
            result[key] = [value[layer] for layer in keep]
            notes.append(f"{key}: {layers} entries cut to {len(keep)}")
        elif key in BY_INDEX and value not in BY_INDEX[key] and not is_prefix:
            raise PlanError(
                f"config.json: {key!r} = {value!r} describes layers by index, which the layers kept {_ranges(keep)} do "
                "not allow; keep a run of layers that starts at 0, or use a model without this key"
            )
        elif key in FROM_THE_TOP and value not in FROM_THE_TOP[key] and list(keep) != list(range(layers)):
            raise PlanError(f"config.json: {key!r} = {value!r} counts layers from the top, so none can be removed or moved")

    if config.get("model_type") == "smollm3" and result.get("no_rope_layers") is None:
        cut = [rope_layers(config, layers)[layer] for layer in keep]
        if cut != rope_layers(config, len(keep)):
            result["no_rope_layers"] = cut
            notes.append("no_rope_layers: written out, the interval no longer describes it")

    if isinstance(window_from := config.get("max_window_layers"), int):
        result["max_window_layers"] = sum(layer < window_from for layer in keep)
        if result["max_window_layers"] != window_from:
            notes.append(f"max_window_layers: {window_from} -> {result['max_window_layers']}")

    expected = [types[layer] for layer in keep]
    if result.get("layer_types") is None and expected != layer_types(result, len(keep)):
        result["layer_types"] = expected
        notes.append("layer_types: written out, the family's rule no longer describes it")

    quantised = str(config.get("quantization_config", ""))
    if not is_prefix and re.search(r"\blayers\b", quantised):
        raise PlanError(
            "config.json: 'quantization_config' names single layers, which renumbering would make wrong; "
            "keep a run of layers that starts at 0"
        )
    return CutConfig(result, notes)


def mixed_attention(plan: Plan, config: Config) -> list[str]:
    """What a plan does to models whose layers are not all of one attention kind; empty when it does no harm.

    Two things are named: a row that mixes layers of different kinds (their queries and keys were trained for different
    ranges, in Gemma 3 and SmolLM3 for different position codes), and a result whose kinds do not follow the family's rule
    (transformers reads the explicit list, but a runtime that has the rule built in computes something else).
    """
    layers = layer_count(config)
    if (rule := _unknown_kinds(config)) and not all(row.is_unit for row in plan.rows):
        return [f"{rule} decides the attention kinds of {config.get('model_type')!r} by a rule that is not known here"]
    kinds = _kinds(config, layers)
    if len(set(kinds)) == 1:
        return []
    problems = []
    for index, row in enumerate(plan.rows):
        attention = [mix for group, mix in row.groups.items() if group.startswith("self_attn")]
        for mix in [row.mix, *attention]:
            used = {kinds[layer] for layer in mix} | {kinds[row.base]}
            if len(used) > 1:
                of = ", ".join(f"{layer} ({kinds[layer]})" for layer in mix)
                problems.append(f"row {index} mixes attention of different kinds: layers {of} by config.json")
                break
    cut = cut_config(config, plan.keep).config
    by_rule = {key: value for key, value in cut.items() if key not in ("layer_types", "no_rope_layers")}
    family = FAMILIES.get(config.get("model_type", ""))
    if family and family.layer_types and _kinds(cut, len(plan.rows)) != _kinds(by_rule, len(plan.rows)):
        problems.append(
            f"the kinds of the {len(plan.rows)} layers kept no longer follow the rule of {config.get('model_type')}; "
            "runtimes with that rule built in (llama.cpp, for one) compute something else than transformers"
        )
    return problems


def _unknown_kinds(config: Config) -> str | None:
    """The key that decides attention kinds by an unknown rule, if there is one."""
    if config.get("model_type") in FAMILIES or config.get("layer_types") is not None:
        return None
    return next((key for key in KIND_RULES if config.get(key) is not None), None)


def _kinds(config: Config, layers: int) -> list[str]:
    kinds = layer_types(config, layers)
    if config.get("model_type") == "smollm3":
        kinds = [
            kind if rope else f"{kind} without rope" for kind, rope in zip(kinds, rope_layers(config, layers), strict=True)
        ]
    return kinds


def _ranges(layers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as '0-2, 5'."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
