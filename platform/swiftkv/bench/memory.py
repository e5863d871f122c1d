"""How much tensor memory a piece of PyTorch code holds at most, on any device.

Counts the storages that operators return, until Python lets go of them; not what a kernel needs inside. (PyTorch's
own MemTracker, of which this has the idea, fails on modules with frozen parameters.)
Called by: bench/distill.py.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`with PeakMemory() as memory: …` leaves in `peak_bytes` the most that tensors made meanwhile held at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._held_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it returns."""
        known_before = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if _is_plain(tensor)}
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if _is_plain(tensor) and id(tensor.untyped_storage()) not in known_before:
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:
            return
        self._known.add(id(storage))
        self._held_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        weakref.finalize(storage, self._release, id(storage), storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._held_bytes -= size


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided
