"""Products with packed matrices against the decoded ones, in float64: every width, side and proportion."""

import pytest
import torch

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
