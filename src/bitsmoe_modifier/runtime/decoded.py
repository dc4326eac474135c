"""Keeping what was decoded last, within a bound that all layers of a process share."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, ClassVar

import torch

#: Bytes of decoded weights that all layers of a process may keep between calls (BITSMOE_CACHE_MB, default 256).
#: Every layer has an equal share of it. A layer sees the same experts again from one token to the next, but between two
#: visits all other layers have their turn: in one common list every entry would be dropped before it is needed again.
CACHE_BYTES = int(float(os.environ.get("BITSMOE_CACHE_MB", "256")) * 2**20)


class DecodedCache:
    """The decoded tensors that one layer used last, within the layer's share of `CACHE_BYTES`.

    Threads that run one model may use it at the same time.

    Attributes:
        whole: keep everything, beyond any share, until the next `clear`.
    """

    _filled: ClassVar["weakref.WeakSet[DecodedCache]"] = weakref.WeakSet()
    _lock = threading.RLock()

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, tuple[torch.Tensor, ...]] = OrderedDict()
        self.nbytes = 0
        self.whole = False

    @torch.compiler.disable
    def get(self, key: Hashable) -> tuple[torch.Tensor, ...] | None:
        """The entry of ``key``, which thereby becomes the most recent one; None where there is none."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            return entry

    @torch.compiler.disable
    def put(self, key: Hashable, entry: tuple[torch.Tensor, ...]) -> None:
        """Keep copies of ``entry`` if the layer's share has room for it; the oldest entries make room.

        Copies, because an entry may be a view that would keep the tensors of many experts alive.
        """
        size = sum(t.nbytes for t in entry)
        with self._lock:
            if self not in self._filled:
                self._filled.add(self)
                for layer in self._filled:  # whose shares this one's is taken from
                    layer._shrink(0)
            if key in self._entries:  # another thread was faster
                return
            self._shrink(size)
            if self._fits(size):
                self._entries[key] = tuple(t.clone() for t in entry)
                self.nbytes += size

    def _fits(self, size: int) -> bool:
        return self.whole or self.nbytes + size <= CACHE_BYTES // len(self._filled)

    def _shrink(self, size: int) -> None:
        """Drop the oldest entries until so many bytes more fit, or none is left."""
        while self._entries and not self._fits(size):
            _, old = self._entries.popitem(last=False)
            self.nbytes -= sum(t.nbytes for t in old)

    def clear(self) -> None:
        """Drop everything and give the share back."""
        with self._lock:
            self.whole = False
            self._entries.clear()
            self._filled.discard(self)
            self.nbytes = 0

    # copies and pickles of a module start with nothing decoded

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodedCache":
        return DecodedCache()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return DecodedCache, ()
