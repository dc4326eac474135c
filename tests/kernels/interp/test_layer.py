"""`moe_forward` against the plain layer, over everything a layer can be.

Bound: h, h·step, z, the combined t and y are each rounded once to the activation dtype, by at most eps relatively; on
random operands a rounding error passes the next sum no larger than the signal does. Five roundings, doubled for the
gate's slope: 10 eps.
"""

import dataclasses

import pytest
import torch
from bitsmoe_kernels import moe_forward, prepare, tuned, unsupported
from bitsmoe_kernels.forward import plan
from bitsmoe_kernels.prepare import line_spans
from bitsmoe_kernels.reference import moe_reference
from bitsmoe_kernels.synthetic import random_experts
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backend import COMPILED, DEVICE, seeded

from bitsmoe_modifier.errors import CheckpointError
from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.storage.layout import ExpertsLayout
from bitsmoe_modifier.storage.planes import WIDTHS
from helpers import random_layer


def check(layout, widths, ids, dtype=torch.bfloat16, gating=None, seed=0, packed=None):
    packed = packed or random_experts(layout, widths, seed, DEVICE)
    gating = gating or Gating()
    g = seeded(seed)
    x = torch.randn(ids.shape[0], layout.hidden_size, generator=g).to(dtype)
    p = torch.rand(ids.shape, generator=g)
    want = moe_reference(x, ids, p, packed, gating)
    got = moe_forward(x, ids, p, prepare(packed), gating)
    assert got.dtype == dtype
    assert got.shape == want.shape
    error = (got.float() - want).norm()
    assert error <= 10 * torch.finfo(dtype).eps * want.norm() + 1e-30, f"relative error {error / want.norm():.3g}"
    return x, p, packed, got


#: float32 has no compiled kernel.
DTYPES = [torch.float16, torch.bfloat16] + [torch.float32] * (not COMPILED)
BASES = [(0, 0), (4, 0), (4, 8), (16, 16), (8, 4)]


@pytest.mark.parametrize("bases", BASES, ids=lambda b: f"bases{b[0]}-{b[1]}")
def test_bases_and_truncation(bases):
    ranks = [64 if bits == 0 else 32 for bits in bases]
    layout = ExpertsLayout(3, 64, 32, *ranks, 16, 32, *bases, 32)
    check(layout, (0, 2, 4), torch.tensor([[0, 2], [2, 1]]), seed=bases[0])


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_random_layers(data):
    block, group = data.draw(st.sampled_from([(16, 32), (32, 32)]))
    hidden, experts = block * data.draw(st.integers(2, 3)), data.draw(st.integers(1, 5))
    bases = data.draw(st.sampled_from([(0, 0), (16, 0), (0, 16)]))
    layout = ExpertsLayout(
        experts, hidden, group * data.draw(st.integers(1, 3)), hidden, hidden, block, group, *bases, 32,
        num_dense=data.draw(st.integers(0, 1)), has_bias=data.draw(st.integers(0, 1)),
    )  # fmt: skip
    tokens, k = data.draw(st.sampled_from([1, 3, 17])), data.draw(st.integers(1, 3))
    ids = torch.randint(-1, experts + 1, (tokens, k), generator=seeded(tokens))
    dtype = data.draw(st.sampled_from(DTYPES))
    check(layout, data.draw(st.sampled_from([WIDTHS, (0, 2, 4, 6)])), ids, dtype, seed=k)


SMALL = ExpertsLayout(2, 32, 32, 32, 32, 16, 32, 0, 0, 32)


def test_prefill_of_80_tokens_equals_decode(monkeypatch):
    ids = torch.randint(0, 2, (80, 1), generator=seeded(0))
    *_, decoded = check(SMALL, (2, 4), ids, torch.float16)
    monkeypatch.setattr("bitsmoe_kernels.forward.DECODE_PAIRS", 0)  # sums the experts in a kernel of its own
    *_, sorted_ = check(SMALL, (2, 4), ids, torch.float16)
    # the tile width changes nothing but the order of equal sums: both accumulate a row's terms in the same order
    torch.testing.assert_close(decoded, sorted_, rtol=2e-3, atol=2e-3)


def test_a_layer_without_any_code_returns_zeros():
    *_, y = check(SMALL, (0,), torch.tensor([[0, 1]]))
    assert not y.any()


#: Whole words in every segment, in some, and rows of which several weights share a word.
TRELLIS = {"128": (128, 128, 1), "64": (64, 64, 2), "32 and 64": (32, 64, 1), "16 and 32": (16, 32, 3)}


@pytest.mark.parametrize("sizes", TRELLIS.values(), ids=TRELLIS)
@settings(max_examples=2, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_layers_of_trellis_codes(sizes, data):
    block, group, stripes = sizes
    hidden, experts = block * data.draw(st.sampled_from([1] if block > 64 else [2, 5])), data.draw(st.integers(1, 2))
    bases = data.draw(st.sampled_from([(0, 0), (16, 16)]))
    layout = ExpertsLayout(
        experts, hidden, group * data.draw(st.integers(1, 1 if block > 64 else 2)), hidden, hidden, block, group,
        *bases, 32, num_dense=data.draw(st.integers(0, 1)), has_bias=data.draw(st.integers(0, 1)), codes=1,
        stripes=stripes,
    )  # fmt: skip
    tokens, k = data.draw(st.sampled_from([1, 3, 17])), data.draw(st.integers(1, 3))
    ids = torch.randint(-1, experts + 1, (tokens, k), generator=seeded(tokens))
    check(layout, data.draw(st.sampled_from([WIDTHS, (0, 2, 4, 6), (1, 3)])), ids, data.draw(st.sampled_from(DTYPES)))


def test_prefill_of_trellis_codes(monkeypatch):
    layout = ExpertsLayout(2, 64, 64, 64, 64, 32, 64, 0, 0, 32, codes=1, stripes=1)
    monkeypatch.setattr("bitsmoe_kernels.forward.DECODE_PAIRS", 0)  # sums the experts in a kernel of its own
    check(layout, (0, 2, 3, 4), torch.randint(0, 2, (80, 1), generator=seeded(0)), torch.bfloat16)


@pytest.mark.parametrize(("widths", "tile", "rows"), [((0, 2, 6), 32, 64), ((1, 2), 16, 128)], ids=["halves", "whole"])
def test_prefill_of_trellis_codes_in_blocks_of_128(monkeypatch, widths, tile, rows):
    layout = ExpertsLayout(1, 256, 128, 256, 256, 128, 128, 0, 0, 32, codes=1, stripes=1)
    monkeypatch.setattr("bitsmoe_kernels.forward.DECODE_PAIRS", 0)
    _, _, packed, _ = check(layout, widths, torch.zeros(33, 1, dtype=torch.int64))
    step = plan(33, 1, prepare(packed))
    assert (step.tile, step.bn, step.br) == (tile, rows, rows)


def test_trellis_codes_that_only_the_plain_path_decodes():
    with torch.device("cpu"):  # where its generators are
        layer = random_layer(intermediate=48, group_size=48, stripes=1, basis_bits=(0, 0))
    assert unsupported(layer.layout) == "group_size 48 has no kernel (known: 32, 64, 128)"
    assert unsupported(dataclasses.replace(layer.layout, group_size=32, intermediate_size=64)) == ""
    with pytest.raises(CheckpointError, match=r"group_size 48 has no kernel .* use the plain path"):
        prepare(layer.packed)


def test_no_expert_chosen_returns_zeros():
    *_, y = check(SMALL, (2,), torch.tensor([[-1, 2], [5, -7]]))
    assert not y.any()


def test_no_token():
    packed = random_experts(SMALL, (2,), device=DEVICE)
    ids = torch.empty(0, 2, dtype=torch.int64)
    y = moe_forward(torch.empty(0, 32), ids, torch.empty(0, 2), prepare(packed), Gating())
    assert y.shape == (0, 32)


def test_non_contiguous_input_and_other_dtypes_of_ids_and_weights():
    ids = torch.tensor([[0, 1], [1, 0]])
    x, p, packed, want = check(SMALL, (2, 4), ids)
    experts = prepare(packed)
    strided = torch.stack([x, -x], 2)[:, :, 0]
    assert not strided.is_contiguous()
    got = moe_forward(strided, ids.T.contiguous().T.to(torch.int32), p.T.contiguous().T, experts, Gating())
    assert torch.equal(got, want)
    rounded = moe_forward(x, ids, p.to(torch.bfloat16), experts, Gating())
    torch.testing.assert_close(rounded, want, rtol=0.02, atol=0.02)


def test_launches_of_a_decoding_step(monkeypatch):
    """Three, and one more for an output basis."""
    if COMPILED:
        from triton.runtime.jit import JITFunction as Launched

        method = "run"
    else:
        from triton.runtime.interpreter import GridExecutor as Launched

        method = "__call__"
    count, call = [], getattr(Launched, method)

    def counted(self, *arguments, **named):
        count.append(getattr(self, "fn", self).__name__)
        return call(self, *arguments, **named)

    monkeypatch.setattr(Launched, method, counted)
    for bases, launches in (((0, 0), 3), ((16, 0), 3), ((16, 16), 4)):
        count.clear()
        check(ExpertsLayout(3, 32, 32, 32, 32, 16, 32, *bases, 32), (2, 4), torch.tensor([[0, 2]]))
        assert len(count) == launches, count


@pytest.mark.parametrize(("tokens", "splits"), [(1, None), (1, 2), (9, None), (9, 2), (300, None)])
def test_a_captured_graph_gives_what_launches_one_by_one_give(tokens, splits):
    if not COMPILED:
        pytest.skip("the interpreter has no CUDA graphs")
    layout = ExpertsLayout(4, 128, 128, 128, 128, 64, 64, 4, 16, 64, num_dense=1, has_bias=1)
    ids = torch.randint(-1, 4, (tokens, 2), generator=seeded(0))
    with tuned.forcing(tuned.Sizes(splits=splits)):
        x, p, packed, eager = check(layout, (0, 2, 4, 6), ids)
        experts, graph = prepare(packed), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = moe_forward(x, ids, p, experts, Gating())
    for _ in range(2):
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, eager)


@pytest.mark.parametrize("bases", [(0, 0), (16, 0)], ids=["plain", "basis"])
def test_weights_fetched_ahead_change_nothing(bases):
    layout = ExpertsLayout(3, 32, 32, 32, 32, 16, 32, *bases, 32)
    ids = torch.tensor([[0, 2], [-1, 1]])
    x, p, packed, want = check(layout, (0, 2, 4), ids)
    experts = prepare(packed)
    spans = line_spans(experts.side_in, experts.side_out, experts.layout)
    fetching = dataclasses.replace(experts, spans=spans, cache=10**9)
    assert plan(*ids.shape, fetching).ahead
    assert not plan(*ids.shape, dataclasses.replace(fetching, cache=0)).ahead
    assert torch.equal(moe_forward(x, ids, p, fetching, Gating()), want)


def test_repeated_runs_are_bit_equal():
    ids = torch.randint(0, 2, (9, 2), generator=seeded(0))
    x, p, packed, first = check(SMALL, (2, 4), ids)
    assert torch.equal(first, moe_forward(x, ids, p, prepare(packed), Gating()))


@pytest.mark.parametrize("codes", [0, 1], ids=["scalar", "trellis"])
def test_a_layer_whose_groups_are_shared_by_programs(codes):
    """3 groups in parts of 2 and 1; units of width 0, ids of another rank, a token none of whose experts is here."""
    layout = ExpertsLayout(3, 32, 96, 32, 32, 16, 32, 0, 0, 32, codes=codes, stripes=codes)
    ids = torch.tensor([[0, 2], [-1, 1], [3, -1]])
    with tuned.forcing(tuned.Sizes(splits=2)):
        x, p, packed, first = check(layout, (0, 2, 4), ids)
        assert plan(*ids.shape, prepare(packed)).splits == 2
        assert torch.equal(first, moe_forward(x, ids, p, prepare(packed), Gating()))


@pytest.mark.parametrize("bases", [(0, 0), (16, 16)], ids=["plain", "bases"])
def test_compiles_without_graph_breaks(bases):
    layout = ExpertsLayout(2, 32, 32, 32, 32, 16, 32, *bases, 32, num_dense=1, has_bias=1)
    ids = torch.tensor([[0, 1]])
    dtype = DTYPES[-1]
    x, p, packed, want = check(layout, (2,), ids, dtype)
    experts, gating = prepare(packed), Gating()
    step = torch.compile(lambda x, ids, p: moe_forward(x, ids, p, experts, gating), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(x, ids, p), want, rtol=max(1e-5, 10 * torch.finfo(dtype).eps), atol=1e-6)


def test_one_compiled_function_serves_layers_of_different_sizes():
    """Whose codes' sizes are symbols from the second layer on, and tokens' number from the second call of one."""
    step, gating, dtype = torch.compile(moe_forward, backend="aot_eager", fullgraph=True), Gating(), DTYPES[-1]
    for tokens, widths in ((2, (2,)), (2, (2, 4)), (3, (4,)), (4, (4,))):
        ids = torch.arange(2 * tokens).view(tokens, 2) % 3
        x, p, packed, want = check(SMALL, widths, ids, dtype)
        assert torch.equal(step(x, ids, p, prepare(packed), gating), want)


def test_operators_describe_their_results():
    """The fake implementations agree with the real ones: what torch.compile and export rely on."""
    ids = torch.tensor([[0, 1]])
    packed = random_experts(SMALL, (2,), device=DEVICE)
    side_in, side_out = prepare(packed).side_in, prepare(packed).side_out
    ops = torch.ops.bitsmoe
    tests = ("test_schema", "test_faketensor")
    dtype = DTYPES[-1]
    weight = torch.randn(32, 32).to(torch.bfloat16)
    torch.library.opcheck(ops.basis.default, (torch.randn(2, 32).to(dtype), weight, None, 16, 32), test_utils=tests)
    torch.library.opcheck(ops.route.default, (ids, 2, 8, 3, []), test_utils=tests)
    routing = (ids, 2, 8, 3, [])
    torch.library.opcheck(
        ops.basis_and_route.default, (torch.randn(1, 32).to(dtype), weight, None, 16, 32, *routing), test_utils=tests
    )
    tiles, pairs, arrivals = ops.route(ids, 2, 8, 10, [])
    h = torch.randn(1, 32).to(dtype)
    sizes, gate = (2, 16, 32, 32, 8, 32, 4, True), ("silu", None, 1.0, 0.0)
    arguments = (h, tiles, pairs, arrivals, side_in.factor, None, [2], side_in.gain, False, *sizes, *gate)
    torch.library.opcheck(ops.gate_up.default, arguments, test_utils=tests)
    z, weights = torch.randn(2, 32).to(dtype), torch.rand(1, 2)
    last = ([2], False, 16, 32, 8, 16, 0, dtype)
    for total in ((None, None, None, None), (ids, weights, None, None)):
        arguments = (z, tiles, pairs, torch.zeros_like(arrivals), side_out.factor, *total, *last)
        torch.library.opcheck(ops.down.default, arguments, test_utils=tests)
    rows = (torch.randn(2, 32), ids, torch.rand(1, 2), None, None, 2, 32, torch.float16)
    torch.library.opcheck(ops.combine.default, rows, test_utils=tests)
