"""The model card (README.md) of a result: what it is made of, how, and what that means, for people and for the Hub."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from .blueprint import Blueprint
from .plan import ARITHMETICS, TENSOR_MODES, Mix, Plan, Row, effective_layers

HANDED_ON = ("license", "license_name", "license_link", "language", "pipeline_tag", "extra_gated_prompt")


def model_card(blueprint: Blueprint, base_model: str | None, revision: str | None, command: str, name: str) -> str:
    """The text of README.md; licence and language are carried over from the source's own card.

    `name` is what to call the source in words; `base_model` its Hub id, None where it has none.
    """
    source = _source_metadata(blueprint.checkpoint.folder / "README.md")
    handed_on = {key: source[key] for key in HANDED_ON if key in source}
    data = ModelCardData(
        base_model=[base_model] if base_model else None,
        base_model_relation="merge" if base_model else None,
        library_name="transformers",
        tags=["merge", "layerfuse"],
        **handed_on,
    )
    plan = blueprint.plan
    converted = any(not output.kept and not output.mixed for output in blueprint.outputs)
    own = "; beside them, the groups named above" if any(row.groups for row in plan.rows) else ""
    rest = f"Everything else is the source's, {'converted in dtype.' if converted else 'bit for bit.'}"
    body = [
        f"# {name}, {plan.num_hidden_layers} -> {len(plan.rows)} layers ({plan.name or plan.method})",
        f"Made by layerfuse out of the layers of {_linked(base_model, name)}"
        f"{f' at revision `{revision}`' if revision else ''}: {blueprint.num_parameters:,} parameters in {len(plan.rows)} of "
        f"{plan.num_hidden_layers} layers.",
        "## What was done",
        "\n".join(f"- {line}" for line in plan_in_words(plan)),
        f"Mixed tensors (`{plan.tensors}`): {TENSOR_MODES[plan.tensors]}{own}. Arithmetic: {ARITHMETICS[plan.arithmetic]}. "
        f"{rest} `plan.json` holds the exact coefficients and is input to the same "
        "program; `report.json` holds hashes and versions.",
        "\n".join(f"- Note: {note}" for note in [*blueprint.warnings, *blueprint.cut.notes]),
        "## Command",
        f"```\n{command}\n```",
        "## What it costs",
        "Not measured by this program's merge step. Removing layers damages a language model, often more than accuracy on "
        "multiple-choice questions shows: compare perplexity and generated text with the original, and with the same layers "
        "simply dropped, before using this model.",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in body if part) + "\n"


def plan_in_words(plan: Plan) -> list[str]:
    """The rows of a plan as sentences; runs of kept layers are one sentence."""
    lines: list[str] = []
    run: list[tuple[int, Row]] = []
    for index, row in enumerate(plan.rows):
        if run and not (row.is_unit and row.base == run[-1][1].base + 1):
            lines.append(_kept(run))
            run = []
        if row.is_unit:
            run.append((index, row))
        else:
            lines.append(f"layer {index}: {mix_in_words(row)}")
    if run:
        lines.append(_kept(run))
    gone = sorted(set(range(plan.num_hidden_layers)) - {j for row in plan.rows for j in [row.base, *_used(row)]})
    if gone:
        lines.append(f"dropped, in no mixture: original {'layers' if len(gone) > 1 else 'layer'} {', '.join(map(str, gone))}")
    return lines


def mix_in_words(row: Row) -> str:
    """`0.622 x layer 18 + 0.232 x layer 19 + ...`, and how many layers that amounts to."""
    parts = []
    if row.mix != {row.base: 1.0} or not row.groups:
        parts.append(f"{terms_in_words(row.mix)} (base {row.base}, effectively {effective_layers(row.mix):.2f} layers)")
    for group, mix in row.groups.items():
        parts.append(f"{group} = {terms_in_words(mix)}")
    return "; ".join(parts)


def terms_in_words(mix: Mix) -> str:
    """`0.622 x layer 18 + 0.232 x layer 19`."""
    return " + ".join(f"{c:.4g} x layer {layer}" for layer, c in mix.items())


def _kept(run: list[tuple[int, Row]]) -> str:
    (first, one), (last, other) = run[0], run[-1]
    if first == last:
        return f"layer {first}: original layer {one.base}, unchanged"
    return f"layers {first}-{last}: original layers {one.base}-{other.base}, unchanged"


def _used(row: Row) -> list[int]:
    return [layer for mix in [row.mix, *row.groups.values()] for layer in mix]


def _linked(model: str | None, name: str) -> str:
    return f"[{model}](https://huggingface.co/{model})" if model else f"a local model, {name}"


def _source_metadata(path: Path) -> Mapping[str, Any]:
    """The front matter of the source's card; empty where there is none that can be read."""
    try:
        metadata = importlib.import_module("huggingface_hub.repocard").metadata_load(path)  # brings the Hub's whole client
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return metadata if isinstance(metadata, Mapping) else {}
