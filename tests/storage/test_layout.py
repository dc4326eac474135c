"""The stored layout of a layer: byte order against a slow walk of its description, the header, and damage."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from test_planes import DIGITS, random_codes, write_planes

from bitsmoe_modifier.errors import CheckpointError
from bitsmoe_modifier.storage.factors import decode_basis, decode_factor, pack_basis, pack_factor
from bitsmoe_modifier.storage.layout import BASIS_BITS, FORMAT_VERSION, ExpertsLayout, index_units
from bitsmoe_modifier.storage.packed import TENSOR_NAMES, PackedExperts, check_content, check_structure
from bitsmoe_modifier.storage.planes import WIDTHS
from bitsmoe_modifier.storage.steps import step_values, storable_steps
from helpers import random_layer, with_tensors

SIZES = {
    "square": {"num_experts": 3, "hidden": 64, "intermediate": 48, "block_size": 16, "group_size": 16},
    "one-unit": {"num_experts": 1, "hidden": 24, "intermediate": 8, "block_size": 24, "group_size": 8},
    "one-group": {"num_experts": 2, "hidden": 40, "intermediate": 40, "block_size": 8, "group_size": 40},
    "many-units": {"num_experts": 2, "hidden": 136, "intermediate": 24, "block_size": 8, "group_size": 8},
    "wide-blocks": {"num_experts": 2, "hidden": 128, "intermediate": 128, "block_size": 128, "group_size": 64},
    "truncated": {"num_experts": 2, "hidden": 64, "intermediate": 32, "rank_in": 48, "rank_out": 16, "group_size": 32},
}
WIDTH_SETS = {"all": WIDTHS, "zero": (0,), "single": (3,), "sparse": (0, 0, 0, 8), "default": (0, 2, 4, 6)}


def make_layout(
    num_experts: int, hidden: int, intermediate: int, *, block_size: int = 16, group_size: int, **ranks: int
) -> ExpertsLayout:
    return ExpertsLayout(
        num_experts=num_experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        rank_in=ranks.get("rank_in", hidden),
        rank_out=ranks.get("rank_out", hidden),
        block_size=block_size,
        group_size=group_size,
        basis_in_bits=16,
        basis_out_bits=16,
        basis_group_size=8,
    )


def draw_widths(layout: ExpertsLayout, side: str, among: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """``[E, 2, units]`` or ``[E, units]``."""
    shape = (layout.num_experts, 2, layout.units_in) if side == "in" else (layout.num_experts, layout.units_out)
    chosen = torch.randint(len(among), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(among, dtype=torch.uint8)[chosen]


def draw_factor(
    layout: ExpertsLayout, widths: torch.Tensor, side: str, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and steps as `pack_factor` takes them, codes below 2**width of their unit."""
    n, length, groups = layout.num_experts, layout.intermediate_size, layout.groups
    gen = torch.Generator().manual_seed(seed)
    of_direction = widths.repeat_interleave(layout.block_size, -1).to(torch.int64)
    if side == "in":
        of_element, shape = of_direction[:, :, None].expand(-1, -1, length, -1), (n, 2, groups, layout.rank_in)
    else:
        of_element, shape = of_direction[:, :, None].expand(-1, -1, length), (n, groups, layout.rank_out)
    codes = (torch.rand(of_element.shape, generator=gen) * (1 << of_element)).to(torch.uint8)
    return codes, storable_steps(0.5 + torch.rand(shape, generator=gen))


def widest_first(widths: list[int]) -> list[int]:
    """Units in payload order."""
    return sorted(range(len(widths)), key=lambda u: (-widths[u], u))


def walk(layout: ExpertsLayout, widths: torch.Tensor, side: str):
    """(matrix, group, unit, width) in the payload order that the docstring of `layout` describes."""
    for matrix, row in enumerate(widths.reshape(-1, widths.shape[-1]).tolist()):
        if side == "in":
            for group in range(layout.groups):
                for unit in widest_first(row):
                    yield matrix, group, unit, row[unit]
        else:
            for unit in widest_first(row):
                for group in range(layout.groups):
                    yield matrix, group, unit, row[unit]


# --------------------------------------------------------------------------------------------- payload order


@pytest.mark.parametrize("version", [1, FORMAT_VERSION])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("among", WIDTH_SETS)
@pytest.mark.parametrize("sizes", SIZES)
def test_payload_equals_the_slow_walk(sizes: str, among: str, side: str, version: int) -> None:
    layout = dataclasses.replace(make_layout(**SIZES[sizes]), version=version)
    widths = draw_widths(layout, side, WIDTH_SETS[among])
    codes, steps = draw_factor(layout, widths, side)
    payload, stored_steps = pack_factor(codes, steps, widths, layout, side)

    bs, gs = layout.block_size, layout.group_size
    expected, expected_steps = bytearray(), []
    for matrix, group, unit, width in walk(layout, widths, side):
        columns, directions = slice(group * gs, (group + 1) * gs), slice(unit * bs, (unit + 1) * bs)
        if side == "in":
            tile = codes.flatten(0, 1)[matrix][columns, directions]  # a row per column of the group, along directions
            step = steps.flatten(0, 1)[matrix][group, directions]
        else:
            tile = codes[matrix][directions, columns]  # a row per direction, along the columns of the group
            step = steps[matrix][group, directions]
        expected += write_planes(tile.tolist(), width)
        expected_steps += step.tolist() if width else []
    assert bytes(payload.tolist()) == bytes(expected)
    assert stored_steps.dtype == layout.step_dtype
    assert step_values(stored_steps).tolist() == expected_steps


@pytest.mark.parametrize("group_major", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_index_equals_a_walk(seed: int, group_major: bool) -> None:
    gen = torch.Generator().manual_seed(seed)
    matrices, units, groups = (int(torch.randint(1, 7, (), generator=gen)) for _ in range(3))
    widths = torch.tensor(WIDTHS)[torch.randint(len(WIDTHS), (matrices, units), generator=gen)].to(torch.uint8)
    index = index_units(widths, groups, group_major)
    codes = torch.full((matrices, groups, units), -7)
    steps = torch.full((matrices, groups, units), -1)
    quanta = rows = 0
    for matrix, row in enumerate(widths.tolist()):
        order = widest_first(row)
        pairs = [(g, u) for g in range(groups) for u in order]
        if not group_major:
            pairs = [(g, u) for u in order for g in range(groups)]
        for group, unit in pairs:
            codes[matrix, group, unit] = quanta
            quanta += row[unit]
            if row[unit]:
                steps[matrix, group, unit] = rows
                rows += 1
    kept = widths[:, None].expand_as(codes) > 0
    assert torch.equal(index.code_offset[kept], codes[kept])
    assert torch.equal(index.step_offset, steps)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("among", WIDTH_SETS)
@pytest.mark.parametrize("sizes", SIZES)
def test_factor_round_trip(sizes: str, among: str, side: str) -> None:
    """Exact: products of an integer below 256 and an fp16 step fit into float32."""
    layout = make_layout(**SIZES[sizes])
    widths = draw_widths(layout, side, WIDTH_SETS[among], seed=1)
    codes, steps = draw_factor(layout, widths, side, seed=1)
    payload, stored_steps = pack_factor(codes, steps, widths, layout, side)
    flat = widths.reshape(-1, widths.shape[-1])
    index = index_units(flat, layout.groups, group_major=side == "in")
    decoded = decode_factor(payload, stored_steps, flat, index, layout, side)

    level = (2.0 ** widths.repeat_interleave(layout.block_size, -1).double()) - 1
    if side == "in":
        expected = (2 * codes.double() - level[:, :, None]) * steps.double().repeat_interleave(layout.group_size, 2)
        expected = expected.flatten(0, 1)
    else:
        column_steps = steps.double().transpose(1, 2).repeat_interleave(layout.group_size, 2)
        expected = (2 * codes.double() - level[:, :, None]) * column_steps
    assert torch.equal(decoded.double(), expected)
    # any subset of matrices, in any order, decodes to the same rows
    some = torch.arange(len(flat)).flip(0)[::2]
    part = dataclasses.replace(index, code_offset=index.code_offset[some], step_offset=index.step_offset[some])
    assert torch.equal(decode_factor(payload, stored_steps, flat[some], part, layout, side), decoded[some])


def test_expert_shards_are_slices() -> None:
    """The payload of experts 1..2 of 3 is one slice: what expert parallelism reads."""
    layout = make_layout(**SIZES["square"])
    for side in ("in", "out"):
        widths = draw_widths(layout, side, WIDTHS)
        codes, steps = draw_factor(layout, widths, side)
        payload, stored_steps = pack_factor(codes, steps, widths, layout, side)
        part = dataclasses.replace(layout, num_experts=2)
        tail, tail_steps = pack_factor(codes[1:], steps[1:], widths[1:], part, side)
        assert torch.equal(payload[len(payload) - len(tail) :], tail)
        assert torch.equal(stored_steps[len(stored_steps) - len(tail_steps) :], tail_steps)


# ---------------------------------------------------------------------------------------------------- bases


@pytest.mark.parametrize("columns", [8, 24, 40, 128, 136])
@pytest.mark.parametrize("bits", [4, 8])
def test_basis_round_trip(bits: int, columns: int) -> None:
    for rows, group in ((1, 8), (5, columns), (33, 8)):
        codes = random_codes(bits, rows, columns, seed=rows)
        step = (0.5 + torch.rand(rows, columns // group, generator=torch.Generator().manual_seed(1))).half()
        stored = pack_basis(codes, bits, group)
        assert stored.shape == (rows, columns * bits // 8)
        expected = (2 * codes.double() - (2**bits - 1)) * step.double().repeat_interleave(group, 1)
        decoded = decode_basis(stored, step, bits, group)
        assert decoded.dtype == torch.float32
        assert torch.equal(decoded.double(), expected), "integers below 256 times fp16 are exact in float32"


def test_basis_bytes() -> None:
    """8 bits as they are; 4 bits as one plane per group of a row."""
    codes = random_codes(8, 3, 32)
    assert torch.equal(pack_basis(codes, 8, 16), codes)
    codes = random_codes(4, 3, 32)
    expected = [b"".join(write_planes([row[g : g + 16]], 4) for g in (0, 16)) for row in codes.tolist()]
    assert [bytes(row) for row in pack_basis(codes, 4, 16).tolist()] == expected


def test_sixteen_bit_basis_is_itself() -> None:
    basis = torch.randn(5, 16).bfloat16()
    assert torch.equal(decode_basis(basis, None, 16, 8), basis.float())


# ---------------------------------------------------------------------------------------------------- header


@pytest.mark.parametrize("version", [1, FORMAT_VERSION])
@pytest.mark.parametrize("sizes", SIZES)
def test_header_round_trip(sizes: str, version: int) -> None:
    layout = dataclasses.replace(make_layout(**SIZES[sizes]), version=version)
    header = layout.to_tensor()
    assert header.dtype == torch.int32
    assert header.shape == (16,)
    assert int(header[0]) == layout.version
    assert ExpertsLayout.from_tensor(header) == layout


def test_every_field_is_stored() -> None:
    layout = make_layout(**SIZES["truncated"])
    for field, value in (("num_dense", 2), ("has_bias", 1), ("basis_group_size", 16), ("basis_out_bits", 4)):
        changed = dataclasses.replace(layout, **{field: value})
        assert ExpertsLayout.from_tensor(changed.to_tensor()) == changed != layout


def test_newer_version_is_refused() -> None:
    header = make_layout(**SIZES["square"]).to_tensor()
    header[0] = FORMAT_VERSION + 1
    with pytest.raises(CheckpointError, match=rf"layout.* version {FORMAT_VERSION + 1}.*upgrade bitsmoe-modifier"):
        ExpertsLayout.from_tensor(header)


@pytest.mark.parametrize(
    ("position", "value"), [(0, 0), (0, -1), (1, 0), (2, -64), (3, 47), (6, 12), (7, 20), (8, 5), (10, 0), (15, 2)]
)
def test_damaged_header_is_refused(position: int, value: int) -> None:
    header = make_layout(**SIZES["square"]).to_tensor()
    header[position] = value
    with pytest.raises(CheckpointError, match="layout"):
        ExpertsLayout.from_tensor(header)


@pytest.mark.parametrize(
    "header", [torch.zeros(16), torch.zeros(15, dtype=torch.int32), torch.zeros(1, 16, dtype=torch.int32)]
)
def test_other_tensors_are_no_header(header: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="layout is"):
        ExpertsLayout.from_tensor(header)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block_size": 12}, "block_size"),
        ({"block_size": 48}, "rank_in"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 32}, "intermediate_size"),
        ({"rank_in": 80}, "more directions"),
        ({"rank_out": 32, "basis_out_bits": 0}, "basis_out_bits"),
        ({"basis_in_bits": 5}, "basis_in_bits"),
        ({"basis_in_bits": 4, "basis_group_size": 24}, "basis_group_size"),
        ({"num_dense": 4}, "num_dense"),
        ({"has_bias": 2}, "has_bias"),
        ({"hidden_size": 2**31}, "hidden_size"),
    ],
)
def test_impossible_sizes_are_named(change: dict[str, int], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        dataclasses.replace(make_layout(**SIZES["square"]), **change)


# ----------------------------------------------------------------------------------------------------- sizes

_EVERYTHING = {"dense": (1,), "bias": True, "basis_bits": (8, 4)}


@pytest.mark.parametrize("bases", [(i, o) for i in BASIS_BITS for o in BASIS_BITS], ids=str)
def test_shapes_are_those_of_the_tensors(bases: tuple[int, int]) -> None:
    packed = random_layer(basis_bits=bases, dense=(0, 2), bias=True).packed
    layout = check_structure(dict(packed.items()), "experts")
    specs = layout.shapes(packed.widths_in, packed.widths_out)
    assert list(specs) == [name for name, _ in packed.items()], "storage order: the checksums count on it"
    for name, tensor in packed.items():
        assert specs[name][1] == tuple(tensor.shape), name
    check_content(packed, "experts")


def test_bytes_are_counted() -> None:
    packed = random_layer(**_EVERYTHING).packed
    counted = sum(tensor.numel() * tensor.element_size() for _, tensor in packed.items())
    assert packed.nbytes == counted
    assert packed.bits_per_weight == 8 * counted / (3 * 4 * 48 * 64)


# ---------------------------------------------------------------------------------------------------- damage


def names_of(layer: PackedExperts) -> list[str]:
    return [name for name, _ in layer.items()]


EVERYTHING = random_layer(**_EVERYTHING).packed


def structure(changes: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    tensors = {**dict(EVERYTHING.items()), **changes}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def test_all_tensors_are_under_test() -> None:
    assert set(names_of(EVERYTHING)) == set(TENSOR_NAMES)


@pytest.mark.parametrize("name", names_of(EVERYTHING))
def test_missing_tensor_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"layer\.7\.experts\.{name}: missing; the checkpoint is damaged"):
        check_structure(structure({name: None}), "layer.7.experts")


@pytest.mark.parametrize("name", names_of(EVERYTHING))
def test_truncated_tensor_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"experts\.{name}\b"):
        check_structure(structure({name: getattr(EVERYTHING, name)[:-1]}), "experts")


@pytest.mark.parametrize("name", names_of(EVERYTHING))
def test_other_dtype_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"experts\.{name}\b"):
        check_structure(structure({name: getattr(EVERYTHING, name).to(torch.int16)}), "experts")


@pytest.mark.parametrize("name", ["codes_in", "codes_out", "steps_in", "steps_out", "basis_in", "dense_in"])
def test_sizes_from_headers_are_checked_without_data(name: str) -> None:
    """Large tensors arrive as (dtype, shape) of a safetensors header."""
    headers: dict[str, object] = {n: (t.dtype, tuple(t.shape)) for n, t in EVERYTHING.items()}
    headers |= {n: getattr(EVERYTHING, n) for n in ("layout", "widths_in", "widths_out")}
    check_structure(headers, "experts")
    dtype, shape = headers[name]
    headers[name] = (dtype, (shape[0] + 1, *shape[1:]))
    with pytest.raises(CheckpointError, match=rf"experts\.{name}: is .*the layout and widths imply"):
        check_structure(headers, "experts")


def test_unexpected_tensor_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"experts\.zero_points: does not belong"):
        check_structure(structure({"zero_points": torch.zeros(1)}), "experts")


@pytest.mark.parametrize("name", ["widths_in", "widths_out"])
def test_unknown_width_is_named(name: str) -> None:
    widths = getattr(EVERYTHING, name).clone()
    widths.view(-1)[3] = 5
    with pytest.raises(CheckpointError, match=rf"experts\.{name}: holds the widths \[5\]"):
        check_structure(structure({name: widths}), "experts")


def test_changed_width_no_longer_fits_the_payload() -> None:
    widths = EVERYTHING.widths_in.clone()
    widths.view(-1)[0] = 8 if widths.view(-1)[0] != 8 else 1
    with pytest.raises(CheckpointError, match=r"experts\.codes_in: is .* imply"):
        check_structure(structure({"widths_in": widths}), "experts")


def test_newer_version_names_the_module() -> None:
    header = EVERYTHING.layout.clone()
    header[0] += 1
    with pytest.raises(CheckpointError, match=r"layers\.0\.experts\.layout: .*version 3.*upgrade"):
        check_structure(structure({"layout": header}), "layers.0.experts")


def flip_bit(tensor: torch.Tensor) -> torch.Tensor:
    flipped = tensor.clone()
    flipped.view(torch.uint8).view(-1)[0] ^= 1
    return flipped


def nan_inside(tensor: torch.Tensor) -> torch.Tensor:
    damaged = tensor.clone()
    damaged.view(-1)[-1] = torch.nan
    return damaged


FLOATS = [name for name, tensor in EVERYTHING.items() if tensor.is_floating_point()]


@pytest.mark.parametrize("name", [n for n in names_of(EVERYTHING) if n not in ("checksums", "layout", "dense_ids")])
def test_flipped_bit_is_named(name: str) -> None:
    damaged = with_tensors(EVERYTHING, **{name: flip_bit(getattr(EVERYTHING, name))})
    with pytest.raises(CheckpointError, match=rf"experts\.{name}: the checksum does not match"):
        check_content(damaged, "experts")


@pytest.mark.parametrize("name", FLOATS)
def test_nan_is_named_even_with_a_fitting_checksum(name: str) -> None:
    damaged = with_tensors(EVERYTHING, **{name: nan_inside(getattr(EVERYTHING, name))}).sealed()
    with pytest.raises(CheckpointError, match=rf"experts\.{name}: holds NaN or infinity"):
        check_content(damaged, "experts")


@pytest.mark.parametrize("ids", [[1, 1], [0, 4], [-1, 2]], ids=["twice", "beyond", "negative"])
def test_dense_ids_must_be_experts(ids: list[int]) -> None:
    packed = random_layer(dense=(1, 2)).packed
    damaged = with_tensors(packed, dense_ids=torch.tensor(ids, dtype=torch.int32)).sealed()
    with pytest.raises(CheckpointError, match=r"experts\.dense_ids: .* are not distinct experts of 4"):
        check_content(damaged, "experts")


@pytest.mark.parametrize("transform", [PackedExperts.sealed, lambda packed: packed.to("cpu")], ids=["sealed", "moved"])
def test_undamaged_content_passes(transform: Callable[[PackedExperts], PackedExperts]) -> None:
    again = transform(EVERYTHING)
    check_structure(dict(again.items()), "experts")
    check_content(again, "experts")
    assert torch.equal(again.checksums, EVERYTHING.checksums)


def test_digit_table_covers_every_width() -> None:
    assert set(DIGITS) == set(WIDTHS)
