"""Activations of a model that does not fit into memory: every layer's weights are read once and meet all texts, then go."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from merge.checkpoint import Checkpoint, Tensor
from merge.runtime import place_model, torch_dtype
from merge.similarity import Activations

from .activations import Gathered, check_texts
from .errors import DataError, LoadError, short
from .load import stored_dtype
from .trial import Probe, instead_of_layers


@torch.inference_mode()
def capture_streamed(
    checkpoint: Checkpoint,
    texts: Sequence[str],
    device: str = "auto",
    dtype: str = "auto",
    done: Callable[[int], object] = lambda layers: None,
) -> Activations:
    """As `activations.capture_activations`, with the embedding, one layer and the texts' hidden states in memory at a time.

    Args:
        done: called with the number of layers just run.

    Raises:
        DataError: as there.
        LoadError: transformers does not know the model, or its weights do not have the names of its layers' parameters.
    """
    check_texts(texts)
    largest = max(sum(tensor.numel for tensor in layer.values()) for layer in checkpoint.layers)
    stored = stored_dtype(checkpoint.tensors.values())
    needed = largest + sum(tensor.numel for tensor in checkpoint.rest.values())
    placement = place_model(device, dtype, num_parameters=needed, stored=stored)
    device, dtype = placement.device, placement.dtype
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
        with init_empty_weights():  # buffers, such as rotary frequencies, are real
            eager = {"attn_implementation": "eager"} if checkpoint.config.get("attn_logit_softcapping") else {}
            model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype), **eager).eval()
    except Exception as error:  # the code of many model classes
        raise LoadError(f"{checkpoint.folder} cannot be loaded by transformers ({short(error)})") from error
    decoder = model.get_decoder()
    layers = list(decoder.layers)
    prefix = checkpoint.stack.rpartition("layers")[0]
    below = {name.removeprefix(prefix): tensor for name, tensor in checkpoint.rest.items() if name.startswith(prefix)}
    _fill(checkpoint, decoder, below, device, dtype, leave="layers.")
    for module in decoder.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)

    maximum = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    hidden: list[torch.Tensor] = []
    arguments: list[list[dict[str, Any]]] = []
    for number, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"][-maximum:]
        if not ids:
            raise DataError(f"calibration text {number} is empty")
        probes = [Probe(layer) for layer in layers]
        with instead_of_layers(decoder, probes):
            decoder(input_ids=torch.tensor([ids], device=device), use_cache=False)
        hidden.append(probes[0].hidden)
        arguments.append([probe.arguments for probe in probes])
    gathered = Gathered(len(layers), len(texts), config.get_text_config().hidden_size)
    for index, layer in enumerate(layers):
        _fill(checkpoint, layer, checkpoint.layers[index], device, dtype)
        for number, before in enumerate(hidden):
            output = layer(before, **arguments[number][index])
            after = output[0] if isinstance(output, tuple) else output
            gathered.add(index, number, before[0], after[0])
            hidden[number] = after
        layer.to_empty(device="meta")
        done(1)
    return gathered.activations()


def _fill(
    checkpoint: Checkpoint, module: torch.nn.Module, tensors: Mapping[str, Tensor], device: str, dtype: str, leave: str = " "
) -> None:
    """Puts the tensors into the module's parameters; those that begin with `leave` stay as they are."""
    safe_open = importlib.import_module("safetensors").safe_open
    wanted = {name for name, _ in module.named_parameters() if not name.startswith(leave)}
    if missing := sorted(wanted - set(tensors)):
        raise LoadError(f"{checkpoint.folder} has no {missing[0]} where its model class wants it; load it as a whole instead")
    by_file: dict[str, list[str]] = {}
    for name in wanted:
        by_file.setdefault(str(checkpoint.path(tensors[name])), []).append(name)
    found = {}
    for path, names in by_file.items():
        with safe_open(path, "pt", device=device) as file:
            for name in names:
                found[name] = file.get_tensor(tensors[name].name).to(torch_dtype(dtype))
    module.load_state_dict(found, assign=True, strict=False)
