"""Cutting a stored layer for tensor and expert parallel ranks."""

import pytest
import torch

from bitsmoe_modifier.errors import CheckpointError
from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.runtime.experts import BitsMoEExperts
from bitsmoe_modifier.storage.chains import index_side
from bitsmoe_modifier.storage.factors import decode_factor
from bitsmoe_modifier.storage.layout import ExpertsLayout
from bitsmoe_modifier.storage.packed import PackedExperts, check_structure
from bitsmoe_modifier.storage.sharding import shard
from helpers import RandomLayer, random_layer

LAYERS = {
    "all widths": {},
    "one width": {"widths": (2,)},
    "absent units": {"widths": (0, 0, 4)},
    "nothing stored": {"widths": (0,)},
    "fewer directions": {"rank_in": 32, "rank_out": 48},
    "no bases": {"basis_bits": (0, 0)},
    "super experts": {"dense": (1, 4)},
    "biases": {"bias": True},
    "super experts with biases": {"dense": (0, 5), "bias": True},
    "wide groups": {"group_size": 32, "block_size": 8},
    "trellis": {"stripes": 1},
    "trellis in stripes": {"stripes": 3, "widths": (0, 2, 3), "dense": (1, 4), "bias": True},
}
SIZES = {"num_experts": 6, "hidden": 64, "intermediate": 192}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def layer(request: pytest.FixtureRequest) -> RandomLayer:
    return random_layer(**{**SIZES, **request.param})


def factors(packed: PackedExperts) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[E, 2, I, R]`` and F ``[E, R', I]``."""
    layout = ExpertsLayout.from_tensor(packed.layout)
    a, f = (
        decode_factor(codes, steps, widths, index_side(widths, layout, side), layout, side)
        for side, codes, steps, widths in (
            ("in", packed.codes_in, packed.steps_in, packed.widths_in.flatten(0, 1)),
            ("out", packed.codes_out, packed.steps_out, packed.widths_out),
        )
    )
    return a.unflatten(0, (-1, 2)), f


def output(packed: PackedExperts, x: torch.Tensor, ids: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return BitsMoEExperts(packed, Gating()).forward_plain(x, ids, p)


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_shard_decodes_to_a_range_of_columns(layer: RandomLayer, tp_size: int) -> None:
    a, f = layer.a.unflatten(1, (2, -1)), layer.f
    for rank in range(tp_size):
        part = shard(layer.packed, rank, tp_size)
        columns = slice(192 // tp_size * rank, 192 // tp_size * (rank + 1))
        part_a, part_f = factors(part)
        assert torch.equal(part_a, a[:, :, columns])
        assert torch.equal(part_f, f[:, :, columns])


@pytest.mark.parametrize("experts", [[0, 1, 2], [5], [4, 1], [0, 1, 2, 3, 4, 5]], ids=str)
def test_shard_decodes_to_the_chosen_experts(layer: RandomLayer, experts: list[int]) -> None:
    part_a, part_f = factors(shard(layer.packed, experts=experts))
    assert torch.equal(part_a, layer.a.unflatten(1, (2, -1))[experts])
    assert torch.equal(part_f, layer.f[experts])


@pytest.mark.parametrize(("tp_size", "experts"), [(2, None), (3, None), (1, [3, 0]), (2, [1, 5])], ids=str)
def test_shard_has_a_valid_structure(layer: RandomLayer, tp_size: int, experts: list[int] | None) -> None:
    for rank in range(tp_size):
        sealed = shard(layer.packed, rank, tp_size, experts).sealed()
        check_structure(dict(sealed.items()), "shard")


@pytest.mark.parametrize("tp_size", [2, 3])
def test_outputs_of_the_ranks_add_up(layer: RandomLayer, tp_size: int) -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = torch.randint(6, (7, 2), generator=torch.Generator().manual_seed(2))
    p = torch.rand(7, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parts = sum(output(shard(layer.packed, rank, tp_size), x, ids, p) for rank in range(tp_size))
    # float64 sums of some hundred terms in another order
    torch.testing.assert_close(parts, output(layer.packed, x, ids, p), rtol=1e-11, atol=1e-11)


def test_outputs_of_expert_parallel_ranks_add_up(layer: RandomLayer) -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = torch.randint(6, (7, 2), generator=torch.Generator().manual_seed(2))
    p = torch.rand(7, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    total = torch.zeros(7, 64, dtype=torch.float64)
    for experts in ([0, 2, 4], [5, 3, 1]):
        local = torch.full((6,), -1)
        local[experts] = torch.arange(3)
        total += output(shard(layer.packed, experts=experts), x, local[ids], p)
    torch.testing.assert_close(total, output(layer.packed, x, ids, p), rtol=1e-11, atol=1e-11)


def test_shards_hold_the_bytes_once_but_for_the_bases() -> None:
    whole = random_layer(**SIZES).packed
    parts = [shard(whole, rank, 2) for rank in range(2)]
    for name in ("codes_in", "codes_out", "steps_in", "steps_out"):
        assert sum(getattr(part, name).nbytes for part in parts) == getattr(whole, name).nbytes
    for part in parts:
        assert torch.equal(part.basis_in, whole.basis_in)
        assert torch.equal(part.basis_out_step, whole.basis_out_step)
        assert part.checksums is None


@pytest.mark.parametrize("tp_size", [5, 8, 24])
def test_refuses_to_cut_within_a_group(tp_size: int) -> None:
    with pytest.raises(CheckpointError, match=rf"{tp_size} tensor-parallel ranks .* divides 12"):
        shard(random_layer(**SIZES).packed, 0, tp_size)


@pytest.mark.parametrize("experts", [[6], [-1, 0], [2, 2], []], ids=str)
def test_refuses_experts_that_are_not_there(experts: list[int]) -> None:
    with pytest.raises(CheckpointError, match="not distinct experts of the layer's 6"):
        shard(random_layer(**SIZES).packed, experts=experts)


def test_refuses_a_rank_outside_of_the_group() -> None:
    with pytest.raises(CheckpointError, match="no rank 2 of 2"):
        shard(random_layer(**SIZES).packed, 2, 2)
