"""Models of different architectures joined by their intermediate states, under a parameter budget.

Naming `FusionForCausalLM` or `FusionConfig` here registers them, so that AutoModelForCausalLM loads what was saved.
"""

import importlib
from typing import Any

_PUBLIC = {"FusionConfig": "configuration_fusion", "FusionForCausalLM": "modeling_fusion"}

__all__ = sorted(_PUBLIC)


def register() -> None:
    """Makes transformers' Auto classes know fused models, and saved folders carry the code that loads them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from .configuration_fusion import FusionConfig
    from .modeling_fusion import FusionForCausalLM

    AutoConfig.register(FusionConfig.model_type, FusionConfig, exist_ok=True)
    AutoModelForCausalLM.register(FusionConfig, FusionForCausalLM, exist_ok=True)
    FusionConfig.register_for_auto_class()
    FusionForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
