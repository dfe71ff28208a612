"""How much memory a forward pass takes beside the weights, on any device: every storage that operators make is followed.

Scratch space inside an operator is not seen, and under inference_mode neither is what composite operators hold. On a GPU the
allocator counts that as well, and more cheaply (`torch.cuda.max_memory_allocated`); on a CPU there is no such count, and the
resident set of a process says what the process has ever held.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Inside, `peak` is the largest number of bytes that tensors made inside had at one time.

    >>> with PeakMemory() as memory:
    ...     x = torch.zeros(1000) + 1
    >>> memory.peak
    8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._count(tensor.untyped_storage(), 0)  # was there before
        found = func(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            self._count(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return found

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def weight_bytes(model: torch.nn.Module) -> int:
    """Of all parameters and buffers, shared ones once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in (*model.parameters(), *model.buffers())}
    return sum(storages.values())
