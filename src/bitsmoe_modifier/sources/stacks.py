"""A layer's experts in the source's files: matrices that are decoded when they are asked for, and not kept.

transformers' experts modules hold ``gate_up_proj`` and ``down_proj``, each a tensor ``[E, rows, columns]``, and read
one expert after the other by its index. A `StoredStack` in such a place answers with that expert's decoded matrix, so a
model of any size runs in the memory of one expert.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..storage.shards import Stored
from .decoded import Decoded

#: Weights of a layer up to which packed experts are kept decoded while the calibration rows go on through them, where
#: the source's were not in memory.
KEPT_DECODED = 2 * 10**9
#: of one expert, the stored matrices whose rows follow each other
Pieces = tuple[Stored, ...]


class StoredStack:
    """Stands in for a tensor ``[E, rows, columns]`` of which every expert's matrix is in a file.

    Attributes:
        shape: (E, rows, columns).
        dtype: of what is read; may be set.
    """

    def __init__(self, shape: Sequence[int], pieces: Sequence[Pieces] | Stored, dtype: torch.dtype) -> None:
        """Make a stack.

        Args:
            shape: (E, rows, columns).
            pieces: of every expert; or one tensor of all, of which a row of the first dimension is an expert.
            dtype: of what is read.
        """
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._pieces = pieces

    @property
    def device(self) -> torch.device:
        """Where matrices are read to, unless asked otherwise: the CPU."""
        return torch.device("cpu")

    @property
    def ndim(self) -> int:
        """3."""
        return len(self.shape)

    def numel(self) -> int:
        """Weights."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of a weight as it is read."""
        return self.dtype.itemsize

    def stored(self) -> Iterator[Stored]:
        """Everything that is in the files for it."""
        pieces = [(self._pieces,)] if isinstance(self._pieces, Stored) else self._pieces
        for one in (one for expert in pieces for one in expert):
            yield from (*one.parts, *one.others) if isinstance(one, Decoded) else (one,)

    def read(self, expert: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """One expert's matrix ``[rows, columns]`` in ``dtype``, None for the stack's own."""
        chosen = dtype or self.dtype
        if isinstance(self._pieces, Stored):
            return _read(self._pieces, expert, device, chosen)
        found = [_read(piece, None, device, chosen) for piece in self._pieces[expert]]
        return found[0] if len(found) == 1 else torch.cat(found)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self.read(expert) for expert in range(len(self)))

    def __getitem__(self, index: Any) -> torch.Tensor:
        """As of a tensor: an expert, some of them (a slice, a list, a tensor of ids), or a part of one expert's.

        An expert that a tensor names is read to that tensor's device, which is where the caller computes.
        """
        if isinstance(index, torch.Tensor) and index.ndim == 0:
            return self.read(int(index), index.device)
        return _indexed(self.read, len(self), index, self.shape[1:])


class Turned:
    """A `StoredStack` as `DenseExperts` wants it: rows of gate before rows of up, and read to a device.

    Attributes:
        shape: (E, rows, columns) after turning.
    """

    def __init__(
        self,
        stack: StoredStack,
        turn: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a view.

        Args:
            stack: what is read.
            turn: applied to every expert's matrix.
            device: to read to.
            dtype: None for the stack's own.
        """
        self._stack, self._turn, self._dtype = stack, turn, dtype
        self.device = torch.device(device)
        self.shape = torch.Size((len(stack), *turn(torch.empty(stack.shape[1:], device="meta")).shape))

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read."""
        return self._dtype or self._stack.dtype

    def numel(self) -> int:
        """Weights."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of a weight as it is read."""
        return self.dtype.itemsize

    def read(self, expert: int) -> torch.Tensor:
        """One expert's matrix."""
        return self._turn(self._stack.read(expert, self.device, self._dtype))

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self.read(expert) for expert in range(len(self)))

    def __getitem__(self, index: Any) -> torch.Tensor:
        """As of a tensor."""
        return _indexed(self.read, len(self), index, self.shape[1:])


def _read(stored: Stored, row: int | None, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(stored, Decoded):
        return stored.read(row, dtype, device)
    return stored.read(row).to(device, dtype)


def _indexed(read: Callable[[int], torch.Tensor], count: int, index: Any, shape: torch.Size) -> torch.Tensor:
    if isinstance(index, tuple):
        return _indexed(read, count, index[0], shape)[index[1:]]
    if isinstance(index, slice):
        chosen = list(range(count))[index]
    elif isinstance(index, torch.Tensor) and index.ndim == 1:
        chosen = index.tolist()
    elif isinstance(index, list):
        chosen = index
    else:
        return read(range(count)[int(index)])
    first = read(chosen[0]) if chosen else torch.empty(shape)
    found = first.new_empty(len(chosen), *shape)
    for place, expert in enumerate(chosen):
        found[place] = first if place == 0 else read(expert)
    return found


def stored_parameters(module: nn.Module) -> dict[str, StoredStack]:
    """The stacks that stand in for parameters of a module, by name."""
    return {name: value for name, value in vars(module).items() if isinstance(value, StoredStack)}


def read_parameters(module: nn.Module) -> nn.Module:
    """Put what the stacks stand for in their places, as ordinary parameters."""
    for name, stack in stored_parameters(module).items():
        delattr(module, name)
        setattr(module, name, nn.Parameter(stack[:], requires_grad=False))
    return module
