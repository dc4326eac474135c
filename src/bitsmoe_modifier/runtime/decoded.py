"""Keeping what was decoded last, within a bound that all layers of a process share."""

import os
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

    Attributes:
        whole: keep everything, beyond any share, until the next `clear`.
    """

    _filled: ClassVar["weakref.WeakSet[DecodedCache]"] = weakref.WeakSet()

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, tuple[torch.Tensor, ...]] = OrderedDict()
        self.nbytes = 0
        self.whole = False

    def get(self, key: Hashable) -> tuple[torch.Tensor, ...] | None:
        """The entry of ``key``, which thereby becomes the most recent one; None where there is none."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Hashable, entry: tuple[torch.Tensor, ...]) -> None:
        """Keep copies of ``entry``, a new one, if the layer's share has room for it; the oldest entries make room.

        Copies, because an entry may be a view that would keep the tensors of many experts alive.
        """
        self._filled.add(self)
        share, size = CACHE_BYTES // len(self._filled), sum(t.nbytes for t in entry)
        if self.whole:
            share = self.nbytes + size
        while self._entries and self.nbytes + size > share:
            _, old = self._entries.popitem(last=False)
            self.nbytes -= sum(t.nbytes for t in old)
        if size <= share:
            self._entries[key] = tuple(t.clone() for t in entry)
            self.nbytes += size

    def clear(self) -> None:
        """Drop everything and give the share back."""
        self.whole = False
        self._entries.clear()
        self._filled.discard(self)
        self.nbytes = 0

    # copies and pickles of a module start with nothing decoded

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodedCache":
        return DecodedCache()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return DecodedCache, ()
