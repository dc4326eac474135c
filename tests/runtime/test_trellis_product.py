"""Products with matrices in trellis codes against the decoded ones, on all widths, chains and proportions."""

import pytest
import torch

from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.native import native_library
from bitsmoe_modifier.runtime import experts as experts_module
from bitsmoe_modifier.runtime import trellis_product as module
from bitsmoe_modifier.runtime.experts import BitsMoEExperts
from bitsmoe_modifier.runtime.trellis_product import index_tiles, is_available, trellis_product
from bitsmoe_modifier.storage.chains import index_side
from bitsmoe_modifier.storage.factors import decode_factor
from bitsmoe_modifier.storage.layout import ExpertsLayout
from bitsmoe_modifier.storage.planes import WIDTHS
from helpers import random_layer

pytestmark = pytest.mark.skipif(native_library(module._SOURCE) is None, reason="no C++ compiler here")

SIZES = {
    "small blocks": {"block_size": 16, "group_size": 48, "intermediate": 48, "hidden": 96, "stripes": 1},
    "small groups": {"block_size": 64, "group_size": 16, "intermediate": 80, "hidden": 256, "stripes": 2},
    "recipe's blocks": {"block_size": 128, "group_size": 128, "intermediate": 256, "hidden": 256, "stripes": 1},
    "wide": {"block_size": 256, "group_size": 32, "intermediate": 64, "hidden": 512, "stripes": 1},
}


#: Every width alone in small blocks, where the sequences' eighths are no whole words; mixtures everywhere.
CASES = [("small blocks", (b,)) for b in WIDTHS] + [
    (sizes, widths) for sizes in SIZES for widths in (WIDTHS, (0, 2, 2))
]


@pytest.mark.parametrize(("sizes", "widths"), CASES, ids=str)
@pytest.mark.parametrize("side", ["in", "out"])
def test_equals_the_decoded_matrices(side: str, sizes: str, widths: tuple[int, ...]) -> None:
    layer = random_layer(num_experts=4, widths=widths, **SIZES[sizes])
    packed, layout = layer.packed, ExpertsLayout.from_tensor(layer.packed.layout)
    codes, steps, all_widths = (getattr(packed, f"{name}_{side}") for name in ("codes", "steps", "widths"))
    all_widths = all_widths.flatten(0, -2)
    index = index_side(all_widths, layout, side)
    matrices = decode_factor(codes, steps, all_widths, index, layout, side).double()
    chosen = [3, 0, 3]  # one of them twice
    matrices = matrices.view(4, -1, matrices.shape[2])[chosen]
    v = torch.randn(3, matrices.shape[2], generator=torch.Generator().manual_seed(0))
    found = trellis_product(codes, steps, index_tiles(all_widths, layout, side), layout, side, chosen, v)
    expected = (matrices @ v.double()[:, :, None])[:, :, 0]
    scale = (matrices.abs() @ v.double().abs()[:, :, None])[:, :, 0]
    assert bool(((found - expected).abs() <= (matrices.shape[2] + 4) * 2**-24 * scale).all())


def test_threads_change_nothing() -> None:
    layer = random_layer(num_experts=4, **SIZES["small blocks"])
    packed, layout = layer.packed, ExpertsLayout.from_tensor(layer.packed.layout)
    tiles = index_tiles(packed.widths_out, layout, "out")
    arguments = packed.codes_out, packed.steps_out, tiles, layout, "out", [0, 1, 2, 3], torch.randn(4, 48)
    alone = trellis_product(*arguments)
    torch.set_num_threads(3)
    try:
        assert torch.equal(trellis_product(*arguments), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoding_step_decodes_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(num_experts=4, stripes=1, bias=True, dense=(1,))
    experts = BitsMoEExperts(layer.packed, Gating())
    gen = torch.Generator().manual_seed(1)
    x, ids = torch.randn(2, 64, generator=gen).to(dtype), torch.tensor([[0, 1], [3, 0]])
    p = torch.rand(2, 2, generator=gen)
    with torch.no_grad():
        want = experts(x.repeat(40, 1), ids.repeat(40, 1), p.repeat(40, 1))[:2]  # so many are decoded
        experts.keep_decoded(False)
        monkeypatch.setattr(experts_module, "decode_factor", lambda *_: pytest.fail("decoded"))
        found = experts(x, ids, p)
    assert found.dtype == dtype
    error = (found.float() - want.float()).norm() / want.float().norm()
    assert float(error) <= 10 * torch.finfo(dtype).eps


def test_what_the_product_is_not_for() -> None:
    assert not is_available(torch.zeros(1, dtype=torch.float64))
    assert not is_available(torch.zeros(1, requires_grad=True))
    layer = random_layer(stripes=1)
    layout = ExpertsLayout.from_tensor(layer.packed.layout)
    tiles = index_tiles(layer.packed.widths_out, layout, "out")
    steps = layer.packed.steps_out.half()
    with pytest.raises(ValueError, match="bytes and float32"):
        trellis_product(layer.packed.codes_out, steps, tiles, layout, "out", [0], torch.zeros(1, 48))
