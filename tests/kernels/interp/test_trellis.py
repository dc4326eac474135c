"""The kernels of trellis codes against their oracles, element by element; test_operations has the bounds.

Decoded values are exact. The products' operands are float16 (float32 in the interpreter) whatever the activations are.
"""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from bitsmoe_kernels import prepare
from bitsmoe_kernels.activation import gating_arguments
from bitsmoe_kernels.combine import combine_reference
from bitsmoe_kernels.launch import interpreting
from bitsmoe_kernels.products import down, gate_up
from bitsmoe_kernels.reference import decode_expert_factors
from bitsmoe_kernels.routing import route
from bitsmoe_kernels.trellis_codes import tile_values
from bitsmoe_kernels.trellis_down import trellis_down_reference
from bitsmoe_kernels.trellis_gate_up import trellis_gate_up_reference
from hypothesis import given
from hypothesis import strategies as st
from kernel_backend import DEVICE, seeded
from test_operations import (
    DTYPES,
    EXAMPLES,
    GATINGS,
    SHARED_IDS,
    assert_within,
    layer_of,
    product_bound,
    routings,
)

from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.storage.planes import WIDTHS
from bitsmoe_modifier.storage.trellis import CODES, trellis_values, unpack_windows


@triton.jit
def _decode_kernel(
    codes,
    out,
    units,
    number,
    b: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    JOINED: tl.constexpr,
    PACK: tl.constexpr,
):
    """One unit of a tile: out ``[ROWS, K]``, the columns in two parts."""
    part = tl.arange(0, 2)[:, None]
    pair = part * (K // 4) + tl.arange(0, K // 4)[None, :]
    values = tile_values(codes, pair, units, number, b, ROWS, JOINED, PACK)
    column = part * (K // 2) + tl.arange(0, K // 2)[None, :]
    tl.store(out + column[:, None, :] + (tl.arange(0, ROWS) * K)[None, :, None], values)


@pytest.mark.parametrize("units", [1, 2, 3])
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("width", CODES)
def test_tiles_are_decoded_exactly(width, rows, units):
    columns = 64
    size = units * rows * columns * width // 8
    packed = torch.randint(256, (1, size), generator=seeded(width + rows), dtype=torch.uint8)
    want = trellis_values(unpack_windows(packed, width, units * rows, columns), width)[0]
    for number in range(units):
        out = torch.full((rows, columns), torch.nan, dtype=torch.float16)
        _decode_kernel[(1,)](
            packed.view(torch.uint16), out, units, number, width, rows, columns, units > 1, 0 if interpreting() else 2
        )
        assert torch.equal(out.float(), want[number * rows : (number + 1) * rows])


@st.composite
def sides(draw):
    """(experts, I, R, block, group), and stripes."""
    block, group = draw(st.sampled_from([(16, 32), (32, 32), (64, 64), (32, 64)]))
    sizes = draw(st.integers(1, 3)), group * draw(st.integers(1, 2)), block * draw(st.integers(1, 5)), block, group
    return sizes, draw(st.integers(1, 3))


def check_gate_up(layout, packed, ids, h, gating, parts, tile):
    a, _ = decode_expert_factors(packed)
    side, k = prepare(packed).side_in, ids.shape[1]
    tiles, pairs, arrivals = route(ids, layout.num_experts, tile, len(ids) * k * layout.groups, [])
    got = gate_up(
        h, tiles, pairs, arrivals, side.factor, packed.in_bias, list(side.widths), side.gain, True, k,
        layout.block_size, layout.group_size, layout.intermediate_size, tile, layout.group_size, parts, False,
        *gating_arguments(gating),
    )  # fmt: skip
    want = trellis_gate_up_reference(h, ids, a, packed.in_bias, gating)
    # an operand below float16's normal numbers is off by half of the smallest one, before the gain is taken away
    small = 2.0**-25 / side.gain if got.dtype == torch.float16 else 0.0
    for p, e in enumerate(ids.flatten().tolist()):
        if not 0 <= e < layout.num_experts:
            continue
        bias = 0 if packed.in_bias is None else packed.in_bias[e].float().view(2, -1)
        units = 4.0 * layout.rank_in * small  # a value is below 4 units of its step
        error = torch.stack([product_bound(h[p // k, None], a[e, m], got.dtype)[0] + units for m in range(2)])
        value = (a[e] @ h[p // k].float() + bias).abs() + error
        error += 2.0**-22 * value
        bound = (1.13 * error[0] * (value[1] + gating.up_shift) + value[0] * error[1]) / 16
        assert_within(got[p], want[p], bound + 2.0**-20 * want[p].abs() + 1e-7)


@EXAMPLES
@given(st.data())
def test_gate_up_equals_its_oracle(data):
    sizes, stripes = data.draw(sides())
    widths = data.draw(st.sampled_from([WIDTHS, (0,), (0, 2, 4, 6), (1,)]))
    layout, packed = layer_of(sizes, widths, 1, codes=1, stripes=stripes)
    tokens = data.draw(st.sampled_from([1, 2, 9]))
    ids = data.draw(routings(sizes[0], tokens))
    h = torch.randn(tokens, layout.rank_in, generator=seeded(0)).to(data.draw(st.sampled_from(list(DTYPES.values()))))
    parts = data.draw(st.sampled_from([1, 2, 4, 8]))
    check_gate_up(layout, packed, ids, h, Gating(), parts, data.draw(st.sampled_from([8, 16])))


@pytest.mark.parametrize("gating", [GATINGS["gelu"], GATINGS["gpt-oss"]], ids=["gelu", "gpt-oss"])
def test_gates_and_biases(gating):
    layout, packed = layer_of((2, 32, 32, 16, 32), (2, 4), 3, has_bias=1, codes=1, stripes=1)
    h = torch.randn(2, 32, generator=seeded(1)).to(torch.bfloat16)
    check_gate_up(layout, packed, torch.tensor([[1], [0]]), h, gating, 4, 8)


@pytest.mark.parametrize("width", CODES)
def test_each_width_in_blocks_of_128(width):
    layout, packed = layer_of((1, 128, 128, 128, 128), (width,), width, codes=1, stripes=1)
    ids = torch.zeros(1, 1, dtype=torch.int32)
    h = torch.randn(1, 128, generator=seeded(2)).to(torch.float16)
    check_gate_up(layout, packed, ids, h, Gating(), 1, 8)
    check_down(layout, packed, ids, h, 8, 8, 1)


def check_down(layout, packed, ids, z, tile, warps, splits):
    """`down` element by element, and with the sum over a token's experts, a bias and a base."""
    _, f = decode_expert_factors(packed)
    side, (tokens, k) = prepare(packed).side_out, ids.shape
    tiles, pairs, arrivals = route(ids, layout.num_experts, tile, tokens * layout.units_out, [])
    sizes = layout.block_size, layout.group_size, tile, layout.block_size
    last = list(side.widths), True, *sizes, warps, torch.float32
    given = z / 16  # exact: a power of two
    got = down(given, tiles, pairs, arrivals[:0], side.factor, None, None, None, None, *last)
    want = trellis_down_reference(z / 16, ids, f)
    bounds = torch.zeros_like(want)
    for p, e in enumerate(ids.flatten().tolist()):
        if 0 <= e < layout.num_experts:  # operands are exact here: only the float32 sums round
            bounds[p] = product_bound(z[p, None], f[e], torch.float32)[0]
            assert_within(got[p], want[p], bounds[p])
    g = seeded(tokens)
    weights = torch.rand(tokens, k, generator=g)
    bias = torch.randn(layout.num_experts, layout.rank_out, generator=g)
    base = torch.randn(tokens, layout.rank_out, generator=g)
    y = down(given, tiles, pairs, arrivals, side.factor, ids, weights, bias, base, *last, 0, splits)
    total = combine_reference(want, ids, weights, bias, base, layout.num_experts, layout.rank_out)
    bound = combine_reference(bounds, ids, weights, None, None, layout.num_experts, layout.rank_out)
    sizes = combine_reference(want.abs(), ids, weights, bias.abs(), base.abs(), layout.num_experts, layout.rank_out)
    assert_within(y, total, bound + (2 * k + 2) * 2.0**-23 * sizes)


@EXAMPLES
@given(st.data())
def test_down_equals_its_oracle(data):
    sizes, stripes = data.draw(sides())
    widths = data.draw(st.sampled_from([WIDTHS, (0,), (0, 2, 4, 6), (1, 1, 3)]))
    layout, packed = layer_of(sizes, widths, 2, codes=1, stripes=stripes)
    tokens = data.draw(st.sampled_from([1, 2, 9]))
    ids = data.draw(routings(sizes[0], tokens))
    # a sixteenth of these is a normal float16 number or zero
    z = torch.randint(-2048, 2048, (ids.numel(), layout.intermediate_size), generator=seeded(0)).to(torch.float16) / 64
    tile, warps, splits = (data.draw(st.sampled_from(values)) for values in ([8, 16], [2, 8], [1, 2]))
    check_down(layout, packed, ids, z, tile, warps, splits)


@pytest.mark.parametrize("splits", [2, 3, 7])
def test_groups_are_shared_by_programs(splits):
    """5 groups: parts of 3 and 2, of 2, 2 and 1, of one each; units of width 0 among them, chains of two units."""
    layout, packed = layer_of((2, 160, 64, 16, 32), (0, 2, 6, 2), 4, codes=1, stripes=1)
    z = torch.randint(-2048, 2048, (SHARED_IDS.numel(), 160), generator=seeded(3)).to(torch.float16) / 64
    check_down(layout, packed, SHARED_IDS.to(DEVICE), z, 8, 2, splits)


def test_z_beyond_the_range_is_infinite_and_not_wrong():
    _, packed = layer_of((1, 32, 32, 16, 32), (2,), 5, has_bias=1, codes=1, stripes=1)
    packed = dataclasses.replace(packed, in_bias=torch.full_like(packed.in_bias, 3000.0))
    side = prepare(packed).side_in
    tiles, pairs, arrivals = route(torch.tensor([[0]]), 1, 8, 0, [])
    h = torch.zeros(1, 32, dtype=torch.bfloat16)
    z = gate_up(
        h, tiles, pairs, arrivals, side.factor, packed.in_bias, [2], side.gain, True, 1, 16, 32, 32, 8, 32, 1, False,
        *gating_arguments(Gating()),
    )  # fmt: skip
    assert torch.isinf(z).all()  # 9 million


def test_operators_describe_their_results():
    _, packed = layer_of((2, 32, 32, 16, 32), (2,), 0, codes=1, stripes=1)
    experts, tests = prepare(packed), ("test_schema", "test_faketensor")
    side_in, side_out, ids = experts.side_in, experts.side_out, torch.tensor([[0, 1]])
    tiles, pairs, arrivals = route(ids, 2, 8, 4, [])
    ops, h = torch.ops.bitsmoe, torch.randn(1, 32).to(torch.bfloat16)
    sizes, gate = (2, 16, 32, 32, 8, 32, 4, False), ("silu", None, 1.0, 0.0)
    arguments = (h, tiles, pairs, arrivals, side_in.factor, None, [2], side_in.gain, True, *sizes, *gate)
    torch.library.opcheck(ops.gate_up.default, arguments, test_utils=tests)
    z, weights = torch.randn(2, 32).half(), torch.rand(1, 2)
    last = ([2], True, 16, 32, 8, 16, 2, torch.bfloat16)
    for total in ((None, None, None, None), (ids, weights, None, None)):
        arguments = (z, tiles, pairs, torch.zeros_like(arrivals), side_out.factor, *total, *last)
        torch.library.opcheck(ops.down.default, arguments, test_utils=tests)
