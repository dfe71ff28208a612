"""Checkpoints in, checkpoints out: plans, the executor that carries them out and the verifier that checks the result.

    >>> from merge import plan_from_alphas, read_alphas, resolve, merge_checkpoint   # doctest: +SKIP
    >>> plan = plan_from_alphas(read_alphas(Path("alphas/base.json")))               # doctest: +SKIP
    >>> merge_checkpoint(plan, resolve("meta-llama/Meta-Llama-3-8B"), Path("out"))   # doctest: +SKIP

Names are loaded when they are first used, so that `import merge` costs nothing and a dry run never imports torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Alphas": "alphas", "plan_from_alphas": "alphas", "read_alphas": "alphas",
    "Options": "api", "blueprint_for": "api", "merge_checkpoint": "api",
    "Checkpoint": "checkpoint", "read_checkpoint": "checkpoint",
    "MergeError": "errors",
    "Explanation": "explain", "explain_plan": "explain",
    "Parts": "fusion.assemble", "make_parts": "fusion.assemble",
    "Backbone": "fusion.budget", "Budgeted": "fusion.budget", "Fusers": "fusion.budget", "plan_budget": "fusion.budget",
    "read_backbone": "fusion.budget",
    "FusionError": "fusion.errors",
    "Fused": "fusion.make", "fuse": "fusion.make",
    "HubError": "hub", "check_push": "hub", "push_folder": "hub",
    "Recipe": "fusion.recipe", "read_recipe": "fusion.recipe", "recipe_from": "fusion.recipe",
    "METHODS": "methods", "plan_dropping": "methods", "plan_from_method": "methods",
    "Plan": "plan", "Row": "plan", "Step": "plan", "compose": "plan", "read_plan": "plan",
    "Report": "report",
    "fold_top": "similarity",
    "Source": "source", "resolve": "source",
    "Verification": "verify", "verify_folder": "verify",
}  # fmt: skip

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
