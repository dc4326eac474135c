"""Every kernel against its oracle, element by element.

Bounds. Let ``eps`` be the spacing of the activation dtype at 1 (one rounding costs at most eps/2; the interpreter
truncates bf16, which costs eps). A product ``sum_k w_k x_k`` of n terms whose second operand was rounded once,
accumulated in float32 in any order and rounded once at the end, is off by at most ``(eps + n 2**-23) sum_k |w_k x_k| +
eps |result|``. The sum of absolute values is computed from the oracle's operands, so the bound is a proof, not a
habit. The decoded digits are exact.
"""

import pytest
import torch
import triton
import triton.language as tl
from bitsmoe_kernels import launch as launch_sizes
from bitsmoe_kernels import prepare
from bitsmoe_kernels.activation import gating_arguments
from bitsmoe_kernels.ahead import FETCHED_PAIRS, fetch, fits_ahead
from bitsmoe_kernels.basis import basis, basis_and_route, basis_reference
from bitsmoe_kernels.combine import combine, combine_reference
from bitsmoe_kernels.down import down_reference
from bitsmoe_kernels.gate_up import gate_up_reference
from bitsmoe_kernels.launch import (
    capability,
    down_splits,
    down_tile,
    even_splits,
    expected_tiles,
    gate_up_tile,
    swaps,
)
from bitsmoe_kernels.prepare import line_spans
from bitsmoe_kernels.products import down, gate_up
from bitsmoe_kernels.reference import decode_expert_factors
from bitsmoe_kernels.routing import route, tiles_reference
from bitsmoe_kernels.synthetic import random_experts
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backend import COMPILED, DEVICE, seeded

from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.storage.factors import decode_basis
from bitsmoe_modifier.storage.layout import ExpertsLayout
from bitsmoe_modifier.storage.planes import WIDTHS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
if COMPILED:
    del DTYPES["fp32"]  # has no compiled kernel
EXAMPLES = settings(max_examples=6, deadline=None, derandomize=True, database=None)


def product_bound(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bound above without its last term, for ``x [T, K] @ w.T``, w ``[N, K]``."""
    terms = torch.finfo(dtype).eps + x.shape[1] * 2.0**-23
    return terms * (x.float().abs() @ w.float().abs().T) + 1e-30


def assert_within(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> None:
    excess = (got.float() - want).abs() - bound - torch.finfo(got.dtype).eps * want.abs()
    assert bool((excess <= 0).all()), f"largest excess over the bound {excess.max():.3g}, or NaN"


@st.composite
def sides(draw):
    """(experts, I, R, block, group) of awkward proportions, kept small: the interpreter runs about 10⁴ operations a
    second."""
    block, group = draw(st.sampled_from([(16, 32), (32, 32), (64, 64), (32, 64)]))
    return draw(st.integers(1, 4)), group * draw(st.integers(1, 2)), block * draw(st.integers(1, 4)), block, group


@st.composite
def routings(draw, experts: int, tokens: int):
    """ids ``[T, k]`` int64: any ids, one for all, repeated ones, and some outside ``[0, E)``."""
    k = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["any", "one", "outside"]))
    if kind == "one":
        return torch.full((tokens, k), draw(st.integers(0, experts - 1)))
    low, high = (0, experts - 1) if kind == "any" else (-1, experts)
    size = tokens * k
    return torch.tensor(draw(st.lists(st.integers(low, high), min_size=size, max_size=size))).view(tokens, k)


def layer_of(sizes, widths, seed, **more):
    experts, inner, rank, block, group = sizes
    layout = ExpertsLayout(experts, rank, inner, rank, rank, block, group, 0, 0, 32, **more)
    return layout, random_experts(layout, widths, seed, DEVICE)


def swapped(z: torch.Tensor) -> torch.Tensor:
    """The middle two of every four columns exchanged."""
    return z.unflatten(-1, (-1, 2, 2)).transpose(-1, -2).flatten(-3)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("tokens", "n", "k", "group"), [(1, 48, 96, 32), (9, 16, 128, 128), (70, 24, 64, 64)])
def test_basis_equals_its_oracle(bits, dtype, tokens, n, k, group):
    g = seeded(bits + tokens)
    x = torch.randn(tokens, k, generator=g).to(dtype)
    if bits == 16:
        weight, step = torch.randn(n, k, generator=g).to(torch.bfloat16), None
    else:
        weight = torch.randint(256, (n, k * bits // 8), generator=g).to(torch.uint8)
        step = (torch.rand(n, k // group, generator=g) + 0.5).to(torch.float16) / (1 << bits)
    w = decode_basis(weight, step, bits, group)
    got = basis(x, weight, step, bits, group)
    assert got.dtype == dtype
    assert_within(got, basis_reference(x, weight, step, bits, group), product_bound(x, w, dtype))


GATINGS = {
    "silu": Gating(),
    "gelu": Gating("gelu"),
    "gelu_tanh": Gating("gelu_tanh"),
    "relu": Gating("relu"),
    "step3p7": Gating("silu", limit=0.7, late_limit=True),
    "nemotron_h": Gating("relu2", up_shift=1.0),
    "clamped": Gating("silu", limit=0.7),
    "gpt-oss": Gating("silu", limit=0.7, alpha=1.702, up_shift=1.0),
}


def check_gate_up(layout, packed, ids, h, gating, parts, tile, swap=True):
    a, _ = decode_expert_factors(packed)
    side = prepare(packed).side_in
    bn = min(128, layout.group_size)
    counters = len(ids) * ids.shape[1] * layout.intermediate_size // bn
    tiles, pairs, arrivals = route(ids, layout.num_experts, tile, counters, [])
    got = gate_up(
        h, tiles, pairs, arrivals, side.factor, packed.in_bias, list(side.widths), side.gain, False, ids.shape[1],
        layout.block_size, layout.group_size, layout.intermediate_size, tile, bn, parts, swap,
        *gating_arguments(gating),
    )  # fmt: skip
    got = swapped(got) if swap else got
    want = gate_up_reference(h, ids, a, packed.in_bias, gating)
    k = ids.shape[1]
    for p, e in enumerate(ids.flatten().tolist()):
        if not 0 <= e < layout.num_experts:
            continue
        bias = 0 if packed.in_bias is None else packed.in_bias[e].float().view(2, -1)
        error = torch.stack([product_bound(h[p // k, None], a[e, m], h.dtype)[0] for m in range(2)])
        value = (a[e] @ h[p // k].float() + bias).abs() + error
        error += 2.0**-22 * value  # adding the bias, and the float32 functions of the gate
        # |act(g)| <= |g| and |act'(g)| <= 1.13 for all of them; clamping shrinks both errors
        bound = 1.13 * error[0] * (value[1] + gating.up_shift) + value[0] * error[1] + 2.0**-20 * want[p].abs()
        assert_within(got[p], want[p], bound + 1e-7)


@EXAMPLES
@given(st.data())
def test_gate_up_equals_its_oracle(data):
    sizes = data.draw(sides())
    layout, packed = layer_of(sizes, data.draw(st.sampled_from([WIDTHS, (0,), (0, 2, 4, 6), (1,)])), 1)
    tokens = data.draw(st.sampled_from([1, 2, 9]))
    ids = data.draw(routings(sizes[0], tokens))
    dtype = data.draw(st.sampled_from(list(DTYPES.values())))
    h = torch.randn(tokens, layout.rank_in, generator=seeded(0)).to(dtype)
    parts = data.draw(st.sampled_from([1, 2, 4, 8]))
    check_gate_up(
        layout, packed, ids, h, Gating(), parts, data.draw(st.sampled_from([8, 16])), data.draw(st.booleans())
    )


@pytest.mark.parametrize("parts", [1, 4], ids=["fused", "shared"])
@pytest.mark.parametrize("gating", GATINGS.values(), ids=GATINGS)
def test_gates_and_biases(gating, parts):
    layout, packed = layer_of((2, 32, 32, 16, 32), (2, 4), 3, has_bias=1)
    h = torch.randn(2, 32, generator=seeded(1)).to(torch.bfloat16)
    check_gate_up(layout, packed, torch.tensor([[1], [0]]), h, gating, parts, 8)


@pytest.mark.parametrize("width", [b for b in WIDTHS if b])
def test_each_width_in_blocks_of_128(width):
    layout, packed = layer_of((1, 128, 128, 128, 128), (width,), width)
    ids = torch.zeros(1, 1, dtype=torch.int32)
    h = torch.randn(1, 128, generator=seeded(2)).to(torch.float16)
    check_gate_up(layout, packed, ids, h, Gating(), 1, 8)
    check_down(layout, packed, ids, h, 8, 1)


def check_down(layout, packed, ids, z, tile, splits):
    """`down` element by element, and with the sum over a token's experts, a bias and a base."""
    _, f = decode_expert_factors(packed)
    side = prepare(packed).side_out
    br = down_tile(ids.numel(), layout.rank_out, layout.block_size)
    tokens, k = ids.shape
    tiles, pairs, arrivals = route(ids, layout.num_experts, tile, tokens * layout.rank_out // br, [])
    last = list(side.widths), False, layout.block_size, layout.group_size, tile, br, 0, z.dtype
    given = swapped(z) if swaps(tile, br, capability(z.device)) else z
    got = down(given, tiles, pairs, arrivals[:0], side.factor, None, None, None, None, *last)
    want = down_reference(z, ids, f)
    assert got.dtype == z.dtype
    bounds = torch.zeros_like(want)
    for p, e in enumerate(ids.flatten().tolist()):
        if 0 <= e < layout.num_experts:  # operands are exact here: only the float32 sums round
            bounds[p] = product_bound(z[p, None], f[e], torch.float32)[0]
            assert_within(got[p], want[p], bounds[p])
    g = seeded(tokens)
    weights = torch.rand(tokens, k, generator=g).to(z.device)
    bias = torch.randn(layout.num_experts, layout.rank_out, generator=g).to(z.device, z.dtype)
    base = torch.randn(tokens, layout.rank_out, generator=g).to(z.device)
    y = down(given, tiles, pairs, arrivals, side.factor, ids, weights, bias, base, *last, 0, splits)
    assert y.dtype == z.dtype
    total = combine_reference(want, ids, weights, bias, base, layout.num_experts, layout.rank_out)
    bound = combine_reference(bounds, ids, weights, None, None, layout.num_experts, layout.rank_out)
    sizes = combine_reference(want.abs(), ids, weights, bias.abs(), base.abs(), layout.num_experts, layout.rank_out)
    assert_within(y, total, bound + (2 * k + 2) * 2.0**-23 * sizes)


@EXAMPLES
@given(st.data())
def test_down_equals_its_oracle(data):
    sizes = data.draw(sides())
    layout, packed = layer_of(sizes, data.draw(st.sampled_from([WIDTHS, (0,), (0, 2, 4, 6), (1,)])), 2)
    tokens = data.draw(st.sampled_from([1, 2, 9]))
    ids = data.draw(routings(sizes[0], tokens))
    dtype = data.draw(st.sampled_from(list(DTYPES.values())))
    z = torch.randn(ids.numel(), layout.intermediate_size, generator=seeded(0)).to(dtype)
    check_down(layout, packed, ids, z, data.draw(st.sampled_from([8, 16])), data.draw(st.sampled_from([1, 2])))


#: Of 2 experts: one token with both, one with the same twice and none of this rank's, one without any.
SHARED_IDS = torch.tensor([[0, 1, 2], [1, -1, 1], [2, -1, 5]])


@pytest.mark.parametrize("splits", [2, 3, 4, 7])
def test_groups_are_shared_by_programs(splits):
    """5 groups: parts of 3 and 2, of 2, 2 and 1 (for 3 and for 4), of one each; units of width 0 among them."""
    layout, packed = layer_of((2, 160, 48, 16, 32), (0, 2, 6), 4)
    z = torch.randn(SHARED_IDS.numel(), 160, generator=seeded(3)).to(torch.bfloat16)
    check_down(layout, packed, SHARED_IDS.to(DEVICE), z, 8, splits)


@pytest.mark.parametrize(
    ("tokens", "parts", "splits"),
    [(1, 10, 6), (2, 6, 3), (4, 4, 2), (8, 4, 1), (16, 4, 1), (64, 4, 1)],
)
def test_tiles_and_groups_are_shared_where_programs_are_few(tokens, parts, splits):
    """A layer of Qwen3-30B-A3B with trellis codes, whose programs of down have two warps."""
    tiles, units, groups = expected_tiles(8 * tokens, 128, 8), 2048 // 128, 768 // 128
    assert gate_up_tile(tiles, 768, 128, units, True) == (128, parts)
    assert gate_up_tile(tiles, 768, 128, 1, True) == (128, 2)
    assert down_splits(tiles, units, groups, 128 * 128, 2) == splits
    assert down_splits(tiles, units, groups, 128 * 128, 2, processors=15) == 1
    assert down_splits(tiles, units, 1, 128 * 128, 2) == 1


@pytest.mark.parametrize(("processors", "parts"), [(40, 4), (108, 8), (128, 10), (132, 10), (148, 12)])
def test_programs_of_a_tile_follow_the_multiprocessors(processors, parts):
    """Of gate_up, at one token of such a layer."""
    assert gate_up_tile(8, 768, 128, 16, True, processors) == (128, parts)


@pytest.mark.parametrize(
    ("tiles", "units", "parts"),
    [(8, 16, 8), (8, 3, 4), (8, 1, 2), (4, 16, 16), (51, 16, 4), (81, 16, 4), (126, 16, 2), (132, 16, 1)],
)
def test_programs_of_a_tile_of_scalar_codes(tiles, units, parts, monkeypatch):
    monkeypatch.setattr(launch_sizes, "PROGRAMS_WANTED", 1056)
    monkeypatch.setattr(launch_sizes, "SCALAR_PROGRAMS", 16)
    assert gate_up_tile(tiles, 768, 128, units, False, 132) == (128, parts)
    assert gate_up_tile(tiles, 768, 128, units, False, 20) == (128, min(parts, 4 if tiles < 10 else 2))


@pytest.mark.parametrize(
    ("splits", "groups", "even"), [(1, 6, 1), (4, 6, 3), (5, 6, 3), (6, 6, 6), (9, 6, 6), (3, 5, 3)]
)
def test_no_program_is_without_groups(splits, groups, even):
    assert even_splits(splits, groups) == even


@pytest.mark.parametrize("parts", ["experts", "bias", "both on a base"])
def test_combine_equals_its_oracle(parts):
    g = seeded(0)
    tokens, k, n, experts = 5, 3, 70, 4
    ids = torch.randint(-1, experts + 1, (tokens, k), generator=g)
    p = torch.rand(tokens, k, generator=g)
    t = None if parts == "bias" else torch.randn(tokens * k, n, generator=g)
    if t is not None:
        t[(ids.flatten() < 0) | (ids.flatten() >= experts)] = torch.nan  # never written, must never be read
    bias = None if parts == "experts" else torch.randn(experts, n, generator=g)
    base = torch.randn(tokens, n, generator=g) if parts == "both on a base" else None
    got = combine(t, ids, p, bias, base, experts, n, torch.float32)
    torch.testing.assert_close(got, combine_reference(t, ids, p, bias, base, experts, n), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beside", ["alone", "with a basis"])
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_routing_gives_each_pair_to_one_tile(beside, data):
    experts, tokens = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
    ids = data.draw(routings(experts, tokens))
    tile, counters = data.draw(st.sampled_from([8, 16])), data.draw(st.sampled_from([0, 1, 300]))
    if beside == "alone":
        tiles, pairs, arrivals = route(ids, experts, tile, counters, [])
    else:
        x, weight = torch.ones(tokens, 64), torch.eye(64).to(torch.bfloat16)
        h, tiles, pairs, arrivals = basis_and_route(x, weight, None, 16, 64, ids, experts, tile, counters, [])
        assert torch.equal(h, x)
    found = [(e, pairs[begin:end].tolist()) for e, begin, end in tiles.tolist() if e >= 0]
    assert found == tiles_reference(ids, experts, tile)
    assert not arrivals.any()


def test_routing_of_many_pairs():
    """More than one chunk of pairs, more experts than a warp has threads, and one expert with most of them."""
    g = seeded(0)
    ids = torch.where(torch.rand(700, 4, generator=g) < 0.6, 17, torch.randint(-1, 41, (700, 4), generator=g))
    tiles, pairs, _ = route(ids, 40, 64, 0, [])
    found = [(e, pairs[begin:end].tolist()) for e, begin, end in tiles.tolist() if e >= 0]
    assert found == tiles_reference(ids, 40, 64)


@triton.jit
def mark_kernel(
    ids, spans, codes_in, steps_in, head_in, order_in, codes_out, steps_out, head_out, order_out, P, E,
    PAIRS: tl.constexpr,
):  # fmt: skip
    fetch(
        ids, spans, codes_in, steps_in, head_in, order_in, codes_out, steps_out, head_out, order_out,
        tl.program_id(0), tl.num_programs(0), P, E, PAIRS, True,
    )  # fmt: skip


@pytest.mark.parametrize("codes", [0, 1], ids=["scalar", "trellis"])
@pytest.mark.parametrize("programs", [1, 5])
def test_what_is_fetched_ahead_is_what_the_chosen_experts_hold(programs, codes):
    layout, packed = layer_of((4, 128, 192, 64, 64), (0, 1, 4, 8), 5, codes=codes, stripes=codes)
    prepared, ids = prepare(packed), torch.tensor([[2, -1], [0, 4], [2, 2]])
    if codes:  # an expert's first chain and its steps lie where its head says
        first = prepared.side_out.order[:, 0][prepared.side_out.order[:, 0, 1] > 0]
        held = prepared.side_out.head[:, :2][prepared.side_out.order[:, 0, 1] > 0]
        assert torch.equal(first[:, [2, 5]], held)
    sides = prepared.side_in, prepared.side_out
    payloads = [payload for side in sides for payload in side.factor]
    marks = [torch.zeros(-(-payload.nbytes // 128) * 128, dtype=torch.uint8) for payload in payloads]
    spans = line_spans(*sides, layout)
    mark_kernel[(programs,)](ids, spans, *marks, ids.numel(), layout.num_experts, FETCHED_PAIRS)
    for side, found in zip(sides, (marks[:4], marks[4:]), strict=True):
        per = len(side.head) // layout.num_experts
        rows = [table.nbytes // layout.num_experts for table in (side.head, side.order)]
        begins = [
            *(
                (side.head[::per, i].long() * unit).tolist()
                for i, unit in ((0, layout.quantum), (1, 2 * layout.block_size))
            ),
            *([e * row for e in range(layout.num_experts)] for row in rows),
        ]
        for mark, payload, first in zip(found, side.factor, begins, strict=True):
            starts = [*first, payload.nbytes]
            want = torch.zeros_like(mark)
            for e in (0, 2):
                begin, end = starts[e], starts[e + 1]
                if end > begin:
                    want[begin // 128 * 128 : end : 128] = 1
            assert torch.equal(mark, want)
            assert int(want.sum()) > 0
        assert all(int(mark.sum()) < len(mark) // 128 for mark in found[:2])


@pytest.mark.parametrize(
    ("pairs", "budget", "fetched"),
    [(8, 1600, True), (8, 1599, False), (16, 3200, True), (17, 10**6, False), (0, 1, False)],
)
def test_small_steps_are_fetched_ahead(pairs, budget, fetched):
    assert fits_ahead(pairs, experts=4, payload_bytes=800, budget=budget) is fetched
