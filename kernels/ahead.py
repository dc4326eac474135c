"""Weights on their way before the kernel that reads them begins.

Where one step reads no more than a part of the second cache (few tokens, small experts), the programs that write the
tiles of pairs also ask for every line of the chosen experts' codes and steps, and of the tables that say where these
lie: they then arrive while the first launch still multiplies, and the two launches after it read the cache. Nothing
waits for such a request, and no result depends on it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import interpreting

#: Bytes of a request.
LINE = tl.constexpr(128)

#: Pairs of a step that may have their experts fetched.
FETCHED_PAIRS = 16


@triton.jit
def _request(address, here):
    """Ask for the lines at ``address`` (int64) where ``here``: they come into the second cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l,r",
        [address, here.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _fetch_payload(payload_ptr, spans, chosen, share, SHARES, WIDE: tl.constexpr, MARK: tl.constexpr):
    """This program's share of the lines of one payload; spans: pointers to the chosen experts' first line and end."""
    first = tl.load(spans, mask=chosen, other=0)
    lines = tl.load(spans + 1, mask=chosen, other=0) - first
    for start in tl.range(share * WIDE, tl.max(lines, 0), SHARES * WIDE):
        line = start + tl.arange(0, WIDE)
        place = (first[:, None] + line[None, :]).to(tl.int64) * LINE
        here = line[None, :] < lines[:, None]
        if MARK:
            tl.store(payload_ptr + place, 1, mask=here)
        else:
            _request(payload_ptr.to(tl.int64) + place, here)


@triton.jit
def fetch(
    ids_ptr, spans_ptr, codes_in_ptr, steps_in_ptr, head_in_ptr, order_in_ptr,
    codes_out_ptr, steps_out_ptr, head_out_ptr, order_out_ptr, share, SHARES, P, E,
    PAIRS: tl.constexpr, MARK: tl.constexpr = False,
):  # fmt: skip
    """Ask for the lines of all chosen experts that are this program's, of SHARES that share them.

    spans int32 [E, 8, 2] (`prepare.line_spans`). PAIRS: a power of two, P at least. MARK: write ones instead, for a
    test.
    """
    q = tl.arange(0, PAIRS)
    e = tl.load(ids_ptr + q, mask=q < P, other=-1).to(tl.int32)
    chosen = (e >= 0) & (e < E)
    spans = spans_ptr + tl.where(chosen, e, 0) * 16
    _fetch_payload(head_in_ptr, spans + 4, chosen, share, SHARES, 1, MARK)  # what is needed first
    _fetch_payload(order_in_ptr, spans + 6, chosen, share, SHARES, 1, MARK)
    _fetch_payload(codes_in_ptr, spans, chosen, share, SHARES, 64, MARK)
    _fetch_payload(steps_in_ptr, spans + 2, chosen, share, SHARES, 8, MARK)
    _fetch_payload(head_out_ptr, spans + 12, chosen, share, SHARES, 1, MARK)
    _fetch_payload(order_out_ptr, spans + 14, chosen, share, SHARES, 1, MARK)
    _fetch_payload(codes_out_ptr, spans + 8, chosen, share, SHARES, 64, MARK)
    _fetch_payload(steps_out_ptr, spans + 10, chosen, share, SHARES, 8, MARK)


def fits_ahead(pairs: int, experts: int, payload_bytes: int, budget: int) -> bool:
    """Whether the experts of a step are fetched ahead.

    Args:
        pairs: of the step.
        experts: of the layer.
        payload_bytes: of all of them.
        budget: bytes of the second cache that a step may take (`prepare.PreparedExperts`).
    """
    return 0 < pairs <= FETCHED_PAIRS and pairs * payload_bytes <= budget * experts


def arguments(ahead: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """What a kernel that fetches takes of (spans, eight payloads), or of nothing."""
    return [*ahead] if ahead else [None] * 9


def constants(ahead: Sequence[torch.Tensor]) -> dict[str, object]:
    """The constants of `fetch`; ``ahead`` as in `arguments`.

    The interpreter has no cache, and knows no assembly.
    """
    return {"AHEAD": bool(ahead) and not interpreting(), "PAIRS": FETCHED_PAIRS}
