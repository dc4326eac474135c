"""Layers in trellis codes: the same steps as for scalar ones, with less error."""

import dataclasses

import pytest
import torch
from test_quantize import CLAMPED, check_budget, make_layer, settings

from bitsmoe_modifier.method import layer as layer_module
from bitsmoe_modifier.method import sides
from bitsmoe_modifier.method.costs import side_costs
from bitsmoe_modifier.method.trellis import ChainTrellis, GroupTrellis, chain_error, group_error
from bitsmoe_modifier.storage.chains import chains_of
from bitsmoe_modifier.storage.packed import check_content, check_structure
from trellis_reader import read_factors

KINDS = {
    "plain": ({}, {}),
    "no bases": ({}, {"input_basis": "none", "output_basis": "none"}),
    "both bases": ({}, {"input_basis": "spectral", "output_basis": "spectral"}),
    "no feedback": ({}, {"error_feedback": False}),
    "no refinement": ({}, {"refine_passes": 0}),
    "no compensation": ({}, {"compensation": False}),
    "few tokens": ({"tokens": 20}, {}),
    "idle experts, biases": ({"idle": 3, "bias": True, "gating": CLAMPED, "width": 64}, {"group_size": 64}),
    "bfloat16": ({"dtype": torch.bfloat16}, {}),
    "all widths": ({}, {"widths": (0, 1, 2, 3, 4, 6, 8), "bits": 5.0}),
    "one width": ({}, {"widths": (2,), "bits": 3.8}),
    "longer groups": ({"width": 96}, {"group_size": 48}),
}


def trellis(**changes: object) -> layer_module.QuantizerSettings:
    return settings(**{"codes": "trellis", **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_stored_tensors_do_what_the_report_says(kind: str) -> None:
    sizes, changes = KINDS[kind]
    layer, s = make_layer(**sizes), trellis(**changes)
    packed, report = layer.run(s)
    layout = check_structure(dict(packed.items()), "experts")
    check_content(packed, "experts")
    assert (layout.version, layout.codes) == (2, 1)
    check_budget(layer, packed, report, s)
    assert layer.relative_error(packed) == pytest.approx(report.relative_output_error, rel=1e-2)
    if "basis" not in kind:
        scalar = layer.run(dataclasses.replace(s, codes="scalar"))[1]
        assert report.relative_output_error < scalar.relative_output_error
        assert report.predicted_distortion < scalar.predicted_distortion


def test_longer_sequences_leave_a_quarter_less() -> None:
    layer = make_layer(num_experts=4, hidden=128, width=128, tokens=1200)
    s = trellis(bits=2.3, group_size=128)
    error = layer.run(s)[1].relative_output_error
    assert error < 0.75 * layer.run(dataclasses.replace(s, codes="scalar"))[1].relative_output_error


def test_another_reader_finds_the_same_factors() -> None:
    """What the report measured is what docs/format.md says of the bytes."""
    layer = make_layer()
    packed, report = layer.run(trellis(input_basis="none", output_basis="none"))
    a, f = read_factors(dict(packed.items()))
    experts = dataclasses.replace(layer.experts, gate_up=a, down=f)
    exact, own = layer.dense_forward(), dataclasses.replace(layer, experts=experts).dense_forward()
    error = float((own - exact).square().sum() / exact.square().sum())
    assert error == pytest.approx(report.relative_output_error, rel=1e-2)


def test_rows_that_absorb_errors_lie_in_stripes() -> None:
    layer = make_layer()
    for changes, stripes in (({}, 4), ({"compensation": False}, 1), ({"error_feedback": False}, 1)):
        packed, _ = layer.run(trellis(output_basis="spectral", **changes))
        assert packed.layout.tolist()[14] == stripes


def test_result_is_the_same_twice_and_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, s = make_layer(), trellis()
    first = layer.run(s)[0]
    torch.set_num_threads(2)
    try:
        again = layer.run(s)[0]
    finally:
        torch.set_num_threads(1)
    assert [n for n, t in first.items() if not torch.equal(t, getattr(again, n))] == []
    monkeypatch.setattr(layer_module, "PART_ELEMENTS", 2 * layer.experts.gate_up[0].numel())
    parts, report = layer.run(s)
    assert torch.equal(parts.widths_in, first.widths_in)
    assert report.relative_output_error == pytest.approx(layer.relative_error(first), rel=0.02)


def test_super_experts_have_no_codes() -> None:
    layer, s = make_layer(dtype=torch.bfloat16), trellis(bits=8.0)
    packed, _ = layer.run(s, dense_ids=(1, 4))
    assert not packed.widths_in[[1, 4]].any()
    assert torch.equal(packed.dense_in, layer.experts.gate_up[[1, 4]])
    assert layer.relative_error(packed) < 0.1


# -------------------------------------------------------------------------------------------------------- columns


def test_refined_columns_of_groups_are_no_worse() -> None:
    gen = torch.Generator().manual_seed(0)
    coder = GroupTrellis()
    level = torch.tensor([0.0, 1, 3, 7, 15, 63])[:, None]
    weight = torch.rand(6, 64, generator=gen) + 0.1
    step = torch.ones(6, 2)
    first, second = (torch.randn(6, 64, generator=gen) for _ in range(2))
    windows, step, value = coder.column(first, step, level, weight)
    assert torch.equal(value, coder.grid(windows, level) * step.repeat_interleave(32, 1))
    assert not value[0].any()
    again, new_step, better = coder.column(second, step, level, weight, windows)
    assert torch.equal(better, coder.grid(again, level) * new_step.repeat_interleave(32, 1))

    def lost(v: torch.Tensor) -> torch.Tensor:
        return (weight * (second - v).square()).view(6, 2, 32).sum(2)

    assert bool((lost(better) <= lost(value) * (1 + 1e-6)).all())


def test_columns_without_feedback_are_those_of_the_coder() -> None:
    """One by one on a CPU, to the last bit."""
    gen = torch.Generator().manual_seed(2)
    level = torch.tensor([0.0, 3, 15])[:, None, None].expand(3, 1, 5)
    w, weight, step = torch.randn(3, 64, 5, generator=gen), torch.rand(3, 64, generator=gen), torch.ones(3, 2, 5)
    codes, steps = sides._columns(GroupTrellis(), w, step, level, weight)
    for at in range(5):
        one = w[:, :, at].contiguous(), step[:, :, at].contiguous(), level[:, :, at], weight
        windows, fitted, _ = GroupTrellis().column(*one)
        assert torch.equal(codes[:, :, at], windows.to(torch.uint8))
        assert torch.equal(steps[:, :, at], fitted)


def test_refined_columns_of_chains_are_no_worse() -> None:
    gen = torch.Generator().manual_seed(1)
    widths = torch.tensor([[0, 1, 2, 2], [6, 6, 6, 6]], dtype=torch.uint8)
    gain = torch.rand(64, generator=gen) + 0.1
    coder = ChainTrellis(widths, 1, None, gain, 16)
    level = (2.0**widths - 1).repeat_interleave(16, 1)
    step = torch.rand(2, 64, generator=gen) + 0.2
    first, second = (torch.randn(2, 64, generator=gen) for _ in range(2))
    windows, kept, value = coder.column(first, step, level, None)
    assert torch.equal(kept, step)
    assert torch.equal(value, coder.grid(windows, level) * step)
    assert not value[0, :16].any()
    again, _, better = coder.column(second, step, level, None, windows)
    for matrix, row in enumerate(widths.tolist()):
        for units in chains_of(row, 1, 16):
            rows = torch.cat([torch.arange(16 * u, 16 * u + 16) for u in units])
            old, new = (float((gain[rows] * (second - v)[matrix, rows].square()).sum()) for v in (value, better))
            assert new <= old * (1 + 1e-6)
    assert torch.equal(better, coder.grid(again, level) * step)


def test_stripes_of_a_matrix_make_its_chains() -> None:
    widths = torch.tensor([[2, 2, 2, 2, 4, 4, 0, 4]], dtype=torch.uint8)
    sequences = [ChainTrellis(widths, 2, stripe, torch.ones(64), 16).sequences for stripe in (0, 1)]
    assert [s.width.tolist() for s in sequences] == [[4, 2], [4, 2]]
    assert [s.begin.diff().tolist() for s in sequences] == [[16, 32], [32, 32]]
    # units 1, 3, 5, 7 are rows 0, 16, 32, 48 of their stripe; the first chain are units 5 and 7
    assert sorted(sequences[1].place[:32].tolist()) == list(range(32, 64))


# ---------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("side", ["group", "chain"])
def test_costs_are_the_errors_of_encoded_factors(side: str) -> None:
    """Of normally distributed weights, as shares of what there is: those of the trellis, not of the grid."""
    gen = torch.Generator().manual_seed(2)
    factors = torch.randn(2, 256, 128, generator=gen)
    ones = torch.ones(2, 256), torch.ones(2, 128)
    costs = side_costs([factors], *ones, (0, 1, 2, 3, 4, 6), 64, 128, trellis=side)
    shares = costs.distortion / costs.distortion[:, :, :1]
    expected = torch.tensor([1, 0.29, 0.078, 0.0208, 0.0058, 0.00044], dtype=torch.float64)
    torch.testing.assert_close(shares, expected.expand_as(shares), rtol=0.08, atol=0)


def test_costs_weigh_rows_and_directions() -> None:
    gen = torch.Generator().manual_seed(3)
    factor, weight = torch.randn(128, 64, generator=gen), torch.rand(128, generator=gen)
    weight[::4] *= 8
    gain = torch.rand(64, generator=gen) + 0.1
    flat = torch.ones(128)
    grouped = [group_error(factor, w, 2, 128).sum() / (w @ factor.square()).sum() for w in (weight, flat)]
    assert float(grouped[0]) < 0.9 * float(grouped[1])
    assert chain_error(factor, weight, gain, 2, 128, 16).shape == (64,)
