"""Products with packed matrices against the decoded ones, in float64: every width, side and proportion."""

import pytest
import torch

from bitsmoe_modifier.runtime import native_product
from bitsmoe_modifier.runtime.native_product import fastest_product, is_compiled
from bitsmoe_modifier.runtime.packed_product import index_planes, packed_product
from bitsmoe_modifier.storage.factors import decode_factor
from bitsmoe_modifier.storage.layout import ExpertsLayout, index_units
from bitsmoe_modifier.storage.planes import WIDTHS
from helpers import random_layer

SIZES = {
    "small blocks": {"block_size": 16, "group_size": 48, "intermediate": 48, "hidden": 64},
    "small groups": {"block_size": 64, "group_size": 16, "intermediate": 80, "hidden": 128},
    "shortest rows": {"block_size": 8, "group_size": 8, "intermediate": 24, "hidden": 48},
}


@pytest.mark.parametrize("widths", [*[(b,) for b in WIDTHS], WIDTHS], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("side", ["in", "out"])
def test_equals_the_decoded_matrices(side: str, sizes: str, widths: tuple[int, ...]) -> None:
    layer = random_layer(num_experts=5, widths=widths, **SIZES[sizes])
    packed, layout = layer.packed, ExpertsLayout.from_tensor(layer.packed.layout)
    codes, steps, all_widths = (getattr(packed, f"{name}_{side}") for name in ("codes", "steps", "widths"))
    all_widths = all_widths.flatten(0, -2)
    index = index_units(all_widths, layout.groups, group_major=side == "in")
    matrices = decode_factor(codes, steps, all_widths, index, layout, side, torch.float64)
    experts = [3, 0, 3, 4]  # one of them twice
    matrices = matrices.view(5, -1, matrices.shape[2])[experts]
    v = torch.randn(4, matrices.shape[2], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = packed_product(codes, steps, index_planes(all_widths, index, layout, side), layout, side, experts, v)
    expected = (matrices @ v[:, :, None])[:, :, 0]
    scale = (matrices.abs() @ v.abs()[:, :, None])[:, :, 0]  # what rounding is relative to
    # a term is rounded twice and added up to `n` times; the steps' products are exact in the oracle alone
    assert bool(((found - expected).abs() <= (matrices.shape[2] + 4) * 2**-53 * scale).all())


COMPILED_SIZES = {
    **SIZES,
    "recipe's blocks": {"block_size": 128, "group_size": 128, "intermediate": 256, "hidden": 256},
    "uneven": {"block_size": 64, "group_size": 32, "intermediate": 96, "hidden": 128},
    "wide": {"block_size": 256, "group_size": 24, "intermediate": 72, "hidden": 512},
}


@pytest.mark.parametrize("widths", [*[(b,) for b in WIDTHS], WIDTHS], ids=str)
@pytest.mark.parametrize("sizes", COMPILED_SIZES)
@pytest.mark.parametrize("side", ["in", "out"])
def test_compiled_product_equals_its_oracle(side: str, sizes: str, widths: tuple[int, ...]) -> None:
    """In float32, on every size that rows of planes may have; the oracle runs in float64."""
    layer = random_layer(num_experts=4, widths=widths, **COMPILED_SIZES[sizes])
    packed, layout = layer.packed, ExpertsLayout.from_tensor(layer.packed.layout)
    codes, steps, all_widths = (getattr(packed, f"{name}_{side}") for name in ("codes", "steps", "widths"))
    all_widths = all_widths.flatten(0, -2)
    index = index_units(all_widths, layout.groups, group_major=side == "in")
    planes, experts = index_planes(all_widths, index, layout, side), [3, 0, 3]
    columns = layout.rank_in if side == "in" else layout.intermediate_size
    v = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    if not is_compiled(v):
        pytest.skip("no C++ compiler")
    matrices = decode_factor(codes, steps, all_widths, index, layout, side, torch.float64)
    matrices = matrices.view(4, -1, columns)[experts]
    expected = (matrices @ v.double()[:, :, None])[:, :, 0]
    scale = (matrices.abs() @ v.double().abs()[:, :, None])[:, :, 0]
    found = fastest_product(codes, steps, planes, layout, side, experts, v)
    assert found.dtype == torch.float32
    assert bool(((found - expected).abs() <= (columns + 4) * 2**-24 * scale).all())
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(fastest_product(codes, steps, planes, layout, side, experts, v), found)
    finally:
        torch.set_num_threads(threads)


def test_no_compiled_product_where_it_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, other types of numbers, and machines without a compiler take the product in PyTorch."""
    assert not is_compiled(torch.randn(2, dtype=torch.float64))
    assert not is_compiled(torch.randn(2, dtype=torch.bfloat16))
    assert not is_compiled(torch.randn(2, requires_grad=True))
    monkeypatch.setattr(native_product, "native_library", lambda source: None)
    assert not is_compiled(torch.randn(2))
