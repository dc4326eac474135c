"""The encoder of trellis codes: of all windows that a sequence may have, those of least weighted squared error.

`encode_plain` is Viterbi's algorithm in PyTorch, on any device, readable, and the oracle of the tests. `encode` runs
the same as a Triton kernel on a GPU (`bitsmoe_kernels.trellis_encoder`) and in C++ on the CPU where a compiler is
(`native_viterbi`); so it does for weights on a GPU without the kernels, for PyTorch's operations, several for each
weight of a sequence, take longer there than a CPU's core.

A sequence is circular (storage/trellis.py), which Viterbi's algorithm is not: a free run over its end and its beginning
decides the bits that both share, and the run proper is held to them. This is what makes an encoded sequence only nearly
optimal; given those bits it is.
"""

from dataclasses import dataclass, field

import torch

from ..devices import kernels_usable, kernels_wanted
from ..storage.trellis import WINDOW_BITS, window_values
from . import native_viterbi

#: Weights of the end and of the beginning that the free run goes through, by width.
PRELUDE = {1: 24, 2: 16, 3: 12, 4: 8, 6: 4, 8: 0}
_WINDOWS = 1 << WINDOW_BITS


@dataclass(frozen=True)
class SequenceParts:
    """`Sequences` on a GPU, for its kernel: the places, and by width (width, begins, lengths int32, the longest)."""

    place: torch.Tensor
    by_width: list[tuple[int, torch.Tensor, torch.Tensor, int]]


@dataclass(frozen=True)
class Sequences:
    """Where the weights of many sequences lie in one flat tensor. All on the CPU.

    Attributes:
        begin: int64 ``[S + 1]``: sequence s has places ``begin[s]`` to ``begin[s + 1]``.
        place: int64: index of each weight, sequence after sequence, in the order of the stream.
        width: int32 ``[S]``: bits per weight, > 0.
    """

    begin: torch.Tensor
    place: torch.Tensor
    width: torch.Tensor
    _parts: dict[torch.device, SequenceParts] = field(default_factory=dict, compare=False, repr=False)

    def on(self, device: torch.device) -> SequenceParts:
        """What a kernel needs, copied to its GPU once."""
        if device not in self._parts:
            lengths, by_width = self.begin.diff().to(torch.int32), []
            for width in self.width.unique().tolist():
                chosen = self.width == width
                own = lengths[chosen]
                by_width.append((width, self.begin[:-1][chosen].to(device), own.to(device), int(own.max())))
            self._parts[device] = SequenceParts(self.place.to(device), by_width)
        return self._parts[device]

    @classmethod
    def rows(cls, width: torch.Tensor, order: torch.Tensor) -> "Sequences":
        """Each row of a tensor ``[S, T]`` a sequence, its weights in the given order of columns."""
        count, length = len(width), len(order)
        begin = torch.arange(count + 1, device="cpu") * length  # whatever the default device is
        return cls(begin, (begin[:-1, None] + order.cpu()).flatten(), width.to("cpu", torch.int32))


def encode(target: torch.Tensor, gain: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Windows that minimize ``Σ (target - gain · value)²`` over each sequence, nearly.

    Args:
        target, gain: float32, contiguous, any shape.
        sequences: places in their flattened form.

    Returns:
        uint8 of the shape of ``target``; 0 outside of all sequences.
    """
    if kernels_wanted(target):
        from bitsmoe_kernels.trellis_encoder import encode as encode_on_gpu

        return encode_on_gpu(target, gain, sequences, PRELUDE)
    library = native_viterbi.library() if len(sequences.width) else None
    if library is None:
        return encode_plain(target, gain, sequences)
    places = sequences.begin, sequences.place, sequences.width
    return native_viterbi.encode(library, target.cpu(), gain.cpu(), *places, PRELUDE).to(target.device)


def encoder_found() -> bool:
    """Whether `encode` is fast on this machine: its kernel can run, or a compiler is there."""
    return kernels_usable() or native_viterbi.library() is not None


def encode_plain(target: torch.Tensor, gain: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """`encode` in PyTorch: sequences of equal width and length at once, weight after weight."""
    windows = torch.zeros(target.numel(), dtype=torch.uint8, device=target.device)
    lengths = sequences.begin.diff()
    kinds = torch.stack([sequences.width.long(), lengths], 1)
    for width, length in kinds.unique(dim=0).tolist():
        chosen = ((sequences.width == width) & (lengths == length)).nonzero()[:, 0]
        place = sequences.place[sequences.begin[chosen, None] + torch.arange(length, device="cpu")].to(target.device)
        windows[place] = _encode_rows(target.flatten()[place], gain.flatten()[place], width)
    return windows.view(target.shape)


def _encode_rows(target: torch.Tensor, gain: torch.Tensor, width: int) -> torch.Tensor:
    """Windows uint8 ``[S, T]`` of rows that are sequences."""
    count, length = target.shape
    states = _WINDOWS >> width
    closing = torch.zeros(count, dtype=torch.int64, device=target.device)
    free = torch.zeros(count, states, dtype=torch.float32, device=target.device)
    if width < WINDOW_BITS:
        span = min(PRELUDE[width], length)
        around = torch.arange(length - span, length + span, device=target.device) % length
        costs, branches = run(target[:, around], gain[:, around], width, free)
        closing = trace(branches, costs.argmin(1), width)[1][:, span]
    held = torch.full_like(free, 1e30).scatter_(1, closing[:, None], 0.0)
    return trace(run(target, gain, width, held)[1], closing, width)[0]


def run(
    target: torch.Tensor, gain: torch.Tensor, width: int, costs: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Viterbi's forward pass.

    A state is the ``8 - width`` bits that a window shares with the one before it; after weight t, those that window t
    shares with the next.

    Args:
        target, gain: ``[S, T]``.
        width: bits per weight.
        costs: ``[S, 2**(8 - width)]`` of the states before the first weight.

    Returns:
        (costs of the states after the last weight; for every weight the lowest ``width`` bits of the best window that
        ends in each state, uint8 ``[S, states]``).
    """
    values, branches = window_values(width, target.device), []
    for u, g in zip(target.T, gain.T, strict=True):
        # window w is the lower bits of the state before it, and its upper bits are the state after it
        reached = costs.repeat(1, 1 << width) + (u[:, None] - g[:, None] * values).square()
        costs, branch = reached.view(len(costs), -1, 1 << width).min(2)
        branches.append(branch.to(torch.uint8))
    return costs, branches


def trace(branches: list[torch.Tensor], state: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Follow the best paths back from the states ``[S]`` after the last weight.

    Returns:
        (windows uint8 ``[S, T]``, states int64 before each weight ``[S, T]``).
    """
    windows, before = [], []
    for branch in reversed(branches):
        window = state << width | branch.gather(1, state[:, None])[:, 0].long()
        state = window & ((_WINDOWS >> width) - 1)
        windows.append(window.to(torch.uint8))
        before.append(state)
    return torch.stack(windows[::-1], 1), torch.stack(before[::-1], 1)
