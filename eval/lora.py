"""Low-rank adapters on a host alone, as many parameters as fusers have: what training by itself gives, without any donor.

    y = W x + B A x,  A [r, in] normal with variance 1 / in, B [out, r] zero at first  (Hu et al., arXiv 2106.09685)

On the output projections of attention and MLP, the matrices that write into the residual stream as fusers do.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

WRITERS = ("self_attn.o_proj", "mlp.down_proj")


class LowRank(nn.Module):
    """B A of one matrix."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return functional.linear(functional.linear(x.to(self.down.dtype), self.down), self.up).to(x.dtype)


class LoraHost(nn.Module):
    """A frozen host with adapters; it is trained as a fused model is (`fusers`, `fuser_parameters`)."""

    def __init__(self, host: Any, layers: Sequence[int], parameters: int) -> None:
        """Of the host's layers with these numbers, with about so many parameters in all."""
        super().__init__()
        self.host = host
        matrices = [host.model.layers[layer].get_submodule(name) for layer in layers for name in WRITERS]
        each = sum(one.in_features + one.out_features for one in matrices)
        self.rank = max(1, round(parameters / each))
        self.fusers = nn.ModuleList(LowRank(one.in_features, one.out_features, self.rank) for one in matrices)
        self._hooks = [
            one.register_forward_hook(partial(self._add, adapter)) for one, adapter in zip(matrices, self.fusers, strict=True)
        ]

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        """What the host returns."""
        return self.host(input_ids=input_ids, **options)

    def fuser_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return {f"fusers.{name}": value for name, value in self.fusers.named_parameters()}

    def remove(self) -> None:
        """Leaves the host as it was."""
        for hook in self._hooks:
            hook.remove()

    @staticmethod
    def _add(adapter: nn.Module, module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = adapter(arguments[0])
        return output + added
