"""Factors written out in 16 bits, the products with them, and whole layers that take this way."""

import pytest
import torch
from bitsmoe_kernels import forward, launch, moe_forward, prepare
from bitsmoe_kernels.activation import gating_arguments
from bitsmoe_kernels.decoded import decode_factor
from bitsmoe_kernels.grouped import grouped_down, grouped_gate_up
from bitsmoe_kernels.reference import decode_expert_factors, moe_reference
from bitsmoe_kernels.routing import route
from bitsmoe_kernels.synthetic import random_experts
from bitsmoe_kernels.trellis_down import trellis_down_reference
from bitsmoe_kernels.trellis_gate_up import trellis_gate_up_reference
from kernel_backend import COMPILED, DEVICE, seeded

from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.storage.layout import ExpertsLayout
from bitsmoe_modifier.storage.planes import WIDTHS

#: (block, group, family, stripes): planes of whole slices and of short rows, chains of one unit and of several.
SIZES = {
    "scalar 128": (128, 128, 0, 1),
    "scalar 16 and 32": (16, 32, 0, 1),
    "trellis 128": (128, 128, 1, 1),
    "trellis 64": (64, 64, 1, 2),
    "trellis 32 and 64": (32, 64, 1, 1),
    "trellis 16 and 32": (16, 32, 1, 3),
}
DTYPES = [torch.float16, torch.bfloat16] + [torch.float32] * (not COMPILED)


def layer_of(sizes, experts=3, **more):
    block, group, codes, stripes = sizes
    hidden = block * (1 if block > 64 else 3)
    inner = group * (1 if block > 64 else 2)
    trellis = {"codes": codes, "stripes": stripes} if codes else {}
    return ExpertsLayout(experts, hidden, inner, hidden, hidden, block, group, 0, 0, 32, **trellis, **more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_factors_of_some_experts(sizes, dtype):
    """One rounding to ``dtype``, of a product of a value and a step that float32 holds nearly exactly."""
    layout = layer_of(sizes)
    packed = random_experts(layout, WIDTHS, 1, DEVICE)
    experts = prepare(packed)
    sides = (experts.side_in, layout.rank_in), (experts.side_out, layout.rank_out)
    for output, (side, rank), factors in zip((False, True), sides, decode_expert_factors(packed), strict=True):
        arguments = rank, layout.intermediate_size, layout.block_size, layout.group_size, 1, 2, dtype
        got = decode_factor(side.factor, list(side.widths), side.gain, bool(layout.codes), output, *arguments)
        want = factors[1:3]
        assert got.shape == want.shape
        assert got.dtype == dtype
        wanted = want * side.gain
        smallest = torch.finfo(dtype).smallest_normal
        bound = wanted.abs().clamp_min(smallest) * torch.finfo(dtype).eps + 1e-6 * wanted.abs()
        assert ((got.float() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize(("inner", "rank"), [(96, 48), (128, 64)])
def test_products(dtype, tile, inner, rank):
    """Both operands are exact in ``dtype``: float32 sums, and one rounding of the result."""
    g, experts, k = seeded(tile), 4, 2
    h = torch.randn(150, rank, generator=g).to(dtype)
    ids = torch.randint(-1, experts + 1, (150, k), generator=g)
    ids[:90] = 2  # several tiles of one expert
    w_in = (torch.randn(experts, 2, inner, rank, generator=g) / rank**0.5).to(dtype)
    w_out = (torch.randn(experts, rank, inner, generator=g) / inner**0.5).to(dtype)
    bias, gating = torch.randn(experts, 2 * inner, generator=g).to(dtype), Gating()
    tiles, pairs, _ = route(ids, experts, tile, 0, [])
    z, t = torch.full((300, inner), 7.0, dtype=dtype), torch.full((300, rank), 7.0, dtype=dtype)
    for first, count in ((0, 3), (3, 1)):
        part_in, part_out = w_in[first : first + count], w_out[first : first + count]
        grouped_gate_up(z, h, tiles, pairs, part_in, bias, first, 0.5, tile, k, *gating_arguments(gating))
        grouped_down(t, z, tiles, pairs, part_out, first, 2.0, tile)
    here = ((ids >= 0) & (ids < experts)).flatten()
    wanted_z = trellis_gate_up_reference(h, ids, w_in.float() * 0.5, bias, gating)
    wanted_t = trellis_down_reference(z.float(), ids, w_out.float() * 2)
    for got, want, terms in ((z, wanted_z, rank), (t, wanted_t, inner)):
        assert (got[~here] == 7).all()
        error = (got.float() - want)[here].norm() / want[here].norm()
        assert error <= torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [(SIZES["scalar 16 and 32"], torch.bfloat16), (SIZES["trellis 64"], torch.float16)],
    ids=["scalar", "trellis"],
)
def test_layers(monkeypatch, sizes, dtype):
    """The bound of test_layer.py, and one rounding more, of the factors."""
    monkeypatch.setattr(forward, "DECODE_PAIRS", 0)
    monkeypatch.setattr(launch, "WRITTEN_PAIRS", {True: 0, False: 0})
    layout = layer_of(sizes, experts=5, num_dense=1, has_bias=1)
    monkeypatch.setattr(launch, "WRITTEN_BYTES", 2 * 4 * layout.intermediate_size * layout.rank_in)
    packed, g = random_experts(layout, (0, 2, 4, 6), 2, DEVICE), seeded(2)
    x = torch.randn(70, layout.hidden_size, generator=g).to(dtype)
    ids, p = torch.randint(-1, 6, (70, 2), generator=g), torch.rand(70, 2, generator=g)
    experts = prepare(packed)
    assert forward.plan(70, 2, experts).written == 2
    want = moe_reference(x, ids, p, packed, Gating())
    runs = [moe_forward(x, ids, p, experts, Gating()) for _ in range(2)]
    assert torch.equal(*runs)
    assert (runs[0].float() - want).norm() <= 12 * torch.finfo(dtype).eps * want.norm()


def test_when_factors_are_written_out():
    expert = 2**20
    assert launch.written_experts(128 * 55, 128, expert, True) == 0
    assert launch.written_experts(128 * 56, 128, expert, True) == 128
    assert launch.written_experts(128 * 56, 128, expert, False) == 0
    assert launch.written_experts(128 * 208, 128, expert, False) == 128
    assert launch.written_experts(128 * 56, 128, 2**21 + 1, True) == 64  # in two equal parts
    assert launch.written_experts(4 * 56, 4, 2**29, True) == 1


def test_operators_describe_their_results():
    layout = layer_of(SIZES["scalar 16 and 32"])
    side, tests = prepare(random_experts(layout, (2,), 0, DEVICE)).side_in, ("test_schema", "test_faketensor")
    arguments = [2], side.gain, False, False, layout.rank_in, layout.intermediate_size, 16, 32, 1, 2, torch.float16
    torch.library.opcheck(torch.ops.bitsmoe.decode_factor.default, (side.factor, *arguments), test_utils=tests)
    tiles, pairs, _ = route(torch.tensor([[0, 1]]), 2, 64, 0, [])
    h, z, t = torch.randn(1, 32).half(), torch.zeros(2, 64).half(), torch.zeros(2, 32).half()
    w_in, w_out, gate = torch.randn(2, 2, 64, 32).half(), torch.randn(2, 32, 64).half(), ("silu", None, 1.0, 0.0)
    arguments = z, h, tiles, pairs, w_in, None, 0, 1.0, 64, 2, *gate
    torch.library.opcheck(torch.ops.bitsmoe.grouped_gate_up.default, arguments, test_utils=tests)
    arguments = t, z, tiles, pairs, w_out, 0, 1.0, 64
    torch.library.opcheck(torch.ops.bitsmoe.grouped_down.default, arguments, test_utils=tests)
