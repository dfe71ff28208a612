"""A model as the layers that write into its residual stream: what projected RegMean has to know of one, and refuses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import FusionError

UNEXPLAINED = 0.05  # share of a state that may differ from the sum of what was read, for bfloat16; other designs miss more
WRITES = {  # where a layer writes -> its matrix, and the norm between matrix and residual stream that some families have
    "attention": ("self_attn.o_proj", "post_attention_layernorm"),
    "mlp": ("mlp.down_proj", "post_feedforward_layernorm"),
}
POST_NORMED = "post_feedforward_layernorm"  # only layers that have it use the other one behind attention, not before the MLP

Hooks = dict[nn.Module, Callable[[torch.Tensor, torch.Tensor], None]]
"""By module, what is called with its first input and its output."""


@dataclass(frozen=True)
class Decoder:
    """A model as its layers; `side` is host or donor."""

    side: str
    base: nn.Module
    layers: tuple[nn.Module, ...]

    def matrix(self, layer: int, place: str) -> nn.Linear:
        """The write matrix at a place of WRITES."""
        found = self.layers[layer].get_submodule(WRITES[place][0])
        assert isinstance(found, nn.Linear)
        return found

    def writer(self, layer: int, place: str) -> nn.Module:
        """The module whose output enters the residual stream: the matrix, or the norm behind it."""
        return getattr(self.layers[layer], WRITES[place][1]) if self.post_normed else self.matrix(layer, place)

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.matrix(0, "mlp").out_features

    @property
    def post_normed(self) -> bool:
        """Whether norms stand between write matrices and the residual stream (Gemma 2 and 3)."""
        return hasattr(self.layers[0], POST_NORMED)

    @torch.no_grad()
    def run(self, ids: torch.Tensor, hooks: Hooks) -> None:
        """One pass without the head."""

        def call(see: Callable[[torch.Tensor, torch.Tensor], None], _: nn.Module, inputs: Any, output: Any) -> None:
            see(inputs[0], output[0] if isinstance(output, tuple) else output)

        handles = [module.register_forward_hook(partial(call, see)) for module, see in hooks.items()]
        try:
            embedding: nn.Module = self.base.get_input_embeddings()  # type: ignore[operator]
            self.base(input_ids=ids.to(next(embedding.parameters()).device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()


def decoder_of(model: PreTrainedModel, side: str) -> Decoder:
    """Raises FusionError for a model without the layers and matrices that are known here, or in training mode."""
    base = model.base_model
    layers = getattr(base, "layers", None)
    name = f"the {side} ({getattr(model.config, 'model_type', type(model).__name__)})"
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise FusionError(
            f"{name} has no list of layers `model.layers`; expected a decoder such as Llama, Mistral, Phi-3, Gemma 2"
        )
    for number, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        for path, _ in WRITES.values():
            matrix = modules.get(path)
            if not isinstance(matrix, nn.Linear) or not matrix.weight.is_floating_point() or matrix.weight.is_meta:
                found = "absent" if matrix is None else f"a {type(matrix).__name__}"
                raise FusionError(f"{name}: {path} of layer {number} is {found}; expected a plain, loaded matrix of floats")
    if model.training:
        raise FusionError(f"{name} is in training mode, where dropout changes what layers write; call its eval()")
    return Decoder(side, base, tuple(layers))


def check_host(host: Decoder) -> None:
    """Raises FusionError for a host with post-norms: what it writes is no linear function of its write matrices."""
    if host.post_normed:
        raise FusionError(
            "the host has norms behind its write matrices (post_attention_layernorm, post_feedforward_layernorm), so no matrix "
            "can be solved for what enters the residual stream; take it as donor, and a model without them as host"
        )


def check_writes(decoder: Decoder, ids: torch.Tensor) -> None:
    """Raises FusionError unless each layer adds to its input what was read as written.

    Families that scale what they write, or write elsewhere too, have the same names of modules.
    """
    written: dict[int, torch.Tensor] = {}

    def write(layer: int, _: torch.Tensor, output: torch.Tensor) -> None:
        written[layer] = output + written[layer] if layer in written else output

    def leave(layer: int, entered: torch.Tensor, left: torch.Tensor) -> None:
        missing = float((left - entered - written.pop(layer)).float().norm()) / max(float(left.float().norm()), 1e-30)
        if missing > UNEXPLAINED:
            raise FusionError(
                f"the {decoder.side}: layer {layer} does not add to its input what its {' and '.join(WRITES)} write "
                f"({missing:.0%} of its output is something else); this family cannot be projected"
            )

    hooks: Hooks = {
        decoder.writer(layer, place): partial(write, layer) for layer in range(len(decoder.layers)) for place in WRITES
    }
    decoder.run(ids, hooks | {layer: partial(leave, number) for number, layer in enumerate(decoder.layers)})


def check_depth_map(depth_map: Sequence[int], host: Decoder, donor: Decoder) -> None:
    L, M = len(host.layers), len(donor.layers)
    fits = all(type(m) is int and 0 <= m < M for m in depth_map) and list(depth_map) == sorted(depth_map)
    if len(depth_map) != L or not fits:
        raise FusionError(f"the depth map is {list(depth_map)}; expected {L} donor layers from 0 to {M - 1}, in order")
