"""Viterbi's algorithm for trellis codes, a program of one warp per sequence: `method.viterbi.encode` on a GPU.

The costs of all states lie in the registers of the warp; what it remembers of each weight, the branch that won in each
state, goes to memory, from which the best path is traced back. A free run over the end and the beginning of the
sequence comes first and fixes the bits that both share. The oracle is `method.viterbi.encode_plain`.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from bitsmoe_modifier.method.viterbi import Sequences
from bitsmoe_modifier.storage.trellis import window_values

from .launch import Launch
from .launcher import run

#: Bytes of branches that one launch remembers at most.
_SCRATCH = 1 << 28


@triton.jit
def _run(costs, u, g, branches, first, count, length, values, STATES: tl.constexpr, BRANCHES: tl.constexpr):
    """The forward pass over ``count`` weights from ``first`` on, round the end: the costs ``[STATES]`` after it.

    u, g, branches: pointers. values: ``[STATES, BRANCHES]``, of the windows by the state after them.
    """
    state = tl.arange(0, STATES)
    at = first
    target, gain = tl.load(u + at), tl.load(g + at)
    for n in tl.range(count):
        # of the next weight, which the compiler would not load before this one's branches are stored
        at = tl.where(at + 1 == length, 0, at + 1)
        next_target, next_gain = tl.load(u + at), tl.load(g + at)
        # window w is the lower bits of the state before it, and its upper bits are the state after it
        before = tl.reshape(tl.broadcast_to(costs[None, :], [BRANCHES, STATES]), [STATES, BRANCHES])
        rest = target - gain * values
        costs, branch = tl.min(before + rest * rest, 1, return_indices=True)
        tl.store(branches + n * STATES + state, branch.to(tl.uint8))
        target, gain = next_target, next_gain
    return costs


@triton.jit
def _trace(state, out, branches, count, last, B: tl.constexpr, STATES: tl.constexpr, WRITE: tl.constexpr):
    """Follow the best path back from ``state`` after weight ``count - 1`` to the state before weight ``last``."""
    tl.debug_barrier()  # a thread reads what others stored
    for n in tl.range(count - last):
        at = count - 1 - n
        window = state << B | tl.load(branches + at * STATES + state).to(tl.int32)
        if WRITE:
            tl.store(out + at, window.to(tl.uint8))
        state = window & (STATES - 1)
    tl.debug_barrier()  # and stores there again
    return state


@triton.jit
def encode_sequence(u, g, out, branches, length, values_ptr, B: tl.constexpr, PRELUDE: tl.constexpr):
    """Windows uint8 at out, of the targets and gains float32 of one sequence, in the order of the stream; pointers.

    values float32 [256]. branches uint8: ``max(length, 2 min(PRELUDE, length)) * 2**(8 - B)`` of its own.
    """
    STATES: tl.constexpr = 256 >> B
    BRANCHES: tl.constexpr = 1 << B
    values = tl.load(values_ptr + tl.arange(0, STATES)[:, None] * BRANCHES + tl.arange(0, BRANCHES)[None, :])
    state = tl.arange(0, STATES)
    closing = 0
    if STATES > 1:
        span = tl.minimum(PRELUDE, length)
        free = tl.zeros((STATES,), tl.float32)
        costs = _run(free, u, g, branches, (length - span) % length, 2 * span, length, values, STATES, BRANCHES)
        closing = _trace(tl.argmin(costs, 0), out, branches, 2 * span, span, B, STATES, False)
    held = tl.where(state == closing, 0.0, 1e30)
    _run(held, u, g, branches, 0, length, length, values, STATES, BRANCHES)
    _trace(closing, out, branches, length, 0, B, STATES, True)


@triton.jit(do_not_specialize=["steps"])
def encode_kernel(
    u_ptr, g_ptr, begin_ptr, length_ptr, values_ptr, branches_ptr, out_ptr, steps,
    B: tl.constexpr, PRELUDE: tl.constexpr,
):  # fmt: skip
    """Program (sequence): windows uint8 at out, from targets and gains float32 in the order of the stream.

    begin int64, length int32: of each sequence. values float32 [256]. branches uint8 [sequences, steps, states].
    """
    s = tl.program_id(0)
    begin, length = tl.load(begin_ptr + s), tl.load(length_ptr + s)
    branches = branches_ptr + s.to(tl.int64) * steps * (256 >> B)
    encode_sequence(u_ptr + begin, g_ptr + begin, out_ptr + begin, branches, length, values_ptr, B, PRELUDE)


def encode(target: torch.Tensor, gain: torch.Tensor, sequences: Sequences, preludes: Mapping[int, int]) -> torch.Tensor:
    """`method.viterbi.encode`: windows uint8 of the shape of ``target``, 0 outside of all sequences.

    Args:
        target, gain: float32, contiguous, any shape, on the GPU.
        sequences: places in their flattened form.
        preludes: weights of the end and of the beginning that the free run goes through, by width.
    """
    parts, device = sequences.on(target.device), target.device
    u, g = target.flatten()[parts.place], gain.flatten()[parts.place]
    found = torch.empty(len(parts.place), dtype=torch.uint8, device=device)
    for width, begin, length, longest in parts.by_width:
        steps, states = max(longest, 2 * min(preludes[width], longest)), 256 >> width
        values = window_values(width, device)
        batch = min(len(begin), max(1, _SCRATCH // (steps * states)))
        branches = torch.empty(batch * steps * states, dtype=torch.uint8, device=device)
        for some, lengths in zip(begin.split(batch), length.split(batch), strict=True):
            run(
                encode_kernel,
                (len(some),),
                (u, g, some, lengths, values, branches, found, steps),
                Launch(warps=1, stages=1, pack=0),
                device,
                {"B": width, "PRELUDE": preludes[width]},
            )
    windows = torch.zeros(target.numel(), dtype=torch.uint8, device=device)
    windows[parts.place] = found
    return windows.view(target.shape)
