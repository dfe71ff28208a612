"""Tiny models for tests, and surgery on them in memory: an independent way to the same result."""

import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from merge.source import resolve
from merge.tiny import tiny_names

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
NAMES = tiny_names(CONFIGS)
TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]])  # longer than the tiny models' sliding windows

logging.disable_progress_bar()


def tiny_source(name, cache):
    """The source that `tiny:NAME` stands for."""
    return resolve(f"tiny:{name}", configs=CONFIGS, cache=cache)


def load(folder):
    """The model in a folder, in float32, with a complaint about every missing or unexpected tensor."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    left = {key: value for key, value in info.items() if value}
    assert not left, f"{folder}: {left}"
    return model.eval()


def logits(model, tokens=TOKENS):
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def surgery(model, keep, mixed=None):
    """A copy of `model` with the layers `keep`; `mixed(index, name, parameter)` may return other values for a parameter.

    Works on modules: every layer keeps the attention kind that it was built with, so nothing here depends on how config
    files are cut.
    """
    result = copy.deepcopy(model)
    stack = result.model
    types = getattr(result.config, "layer_types", None)
    stack.layers = torch.nn.ModuleList(copy.deepcopy(stack.layers[layer]) for layer in keep)
    for index, layer in enumerate(stack.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
        for name, parameter in layer.named_parameters():
            value = mixed(index, name, parameter) if mixed else None
            if value is not None:
                parameter.data = value.to(parameter.dtype)
    result.config.num_hidden_layers = len(keep)
    if types is not None:
        result.config.layer_types = [types[layer] for layer in keep]
    return result


def bf16(values):
    """Values rounded to bf16, as float32."""
    return values.to(torch.bfloat16).to(torch.float32)
