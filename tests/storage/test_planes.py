"""Digit planes: bytes against a slow writer made from the description of the format, and round trips."""

import pytest
import torch

from bitsmoe_modifier.storage.planes import WIDTHS, code_values, digits, levels, pack_codes, unpack_codes

STORED = [width for width in WIDTHS if width]
REDUCTIONS = [8, 24, 40, 128, 136]
#: The binary digits of every width, most significant first, as docs/format.md lists them.
DIGITS = {0: (), 1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (4, 4)}


def random_codes(width: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1 << width, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def write_planes(rows: list[list[int]], width: int) -> bytes:
    """The bytes of one entry ``[m][n]``, bit by bit: element e of a plane of f bits is digit e // L of byte e % L."""
    out = bytearray()
    below = width
    for f in DIGITS[width]:
        below -= f
        for row in rows:
            plane = [0] * (len(row) * f // 8)
            for e, code in enumerate(row):
                digit = (code >> below) % 2**f
                plane[e % len(plane)] += digit * 2 ** (f * (e // len(plane)))
            out += bytes(plane)
    return bytes(out)


@pytest.mark.parametrize("width", WIDTHS)
def test_digits_add_up_to_the_width(width: int) -> None:
    assert digits(width) == DIGITS[width]
    assert sum(digits(width)) == width


@pytest.mark.parametrize("width", [-1, 5, 7, 9, 16])
def test_other_widths_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"width {width} is not storable"):
        digits(width)


@pytest.mark.parametrize("n", REDUCTIONS)
@pytest.mark.parametrize("width", STORED)
def test_round_trip(width: int, n: int) -> None:
    for m in range(1, 34):
        codes = random_codes(width, 3, m, n, seed=m)
        packed = pack_codes(codes, width)
        assert packed.dtype == torch.uint8
        assert packed.shape == (3, width * m * n // 8), "no bit is wasted"
        assert torch.equal(unpack_codes(packed, width, m, n), codes), f"m = {m}"


@pytest.mark.parametrize("n", REDUCTIONS)
@pytest.mark.parametrize("width", STORED)
def test_bytes_equal_the_slow_writer(width: int, n: int) -> None:
    for m in (1, 2, 7, 33):
        codes = random_codes(width, 2, m, n, seed=100 + m)
        packed = pack_codes(codes, width)
        for entry, stored in zip(codes.tolist(), packed, strict=True):
            assert bytes(stored.tolist()) == write_planes(entry, width), f"m = {m}"


@pytest.mark.parametrize("width", STORED)
@pytest.mark.parametrize("value", ["lowest", "highest"])
def test_extreme_codes(width: int, value: str) -> None:
    """All bits clear or all bits set: nothing leaks into a neighbour."""
    fill = 0 if value == "lowest" else levels(width)
    packed = pack_codes(torch.full((1, 3, 16), fill, dtype=torch.uint8), width)
    assert set(packed.flatten().tolist()) == {0 if value == "lowest" else 255}


@pytest.mark.parametrize("width", STORED)
def test_packing_takes_views(width: int) -> None:
    """Callers cut tiles out of larger tensors; strides must not matter, and the input stays as it was."""
    codes = random_codes(width, 16, 5, 4)
    before = codes.clone()
    view = codes.permute(2, 1, 0)
    assert torch.equal(pack_codes(view, width), pack_codes(view.contiguous(), width))
    packed = pack_codes(random_codes(width, 4, 5, 16), width)
    wide = torch.stack([packed, packed], 2)[:, :, 0]
    assert torch.equal(unpack_codes(wide, width, 5, 16), unpack_codes(packed, width, 5, 16))
    assert torch.equal(codes, before)


@pytest.mark.parametrize("width", STORED)
def test_no_entries(width: int) -> None:
    packed = pack_codes(torch.empty(0, 4, 16, dtype=torch.uint8), width)
    assert packed.shape == (0, width * 8)
    assert unpack_codes(packed, width, 4, 16).shape == (0, 4, 16)


@pytest.mark.parametrize("n", [1, 4, 12, 33])
def test_odd_reduction_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"{n} elements, which is not a multiple of 8"):
        pack_codes(torch.zeros(1, 2, n, dtype=torch.uint8), 2)


@pytest.mark.parametrize("width", STORED)
def test_grid_is_symmetric_and_even(width: int) -> None:
    codes = torch.arange(1 << width, dtype=torch.uint8)
    values = code_values(codes, width)
    assert values.tolist() == [2 * c - (2**width - 1) for c in range(2**width)]
    assert torch.equal(values, -values.flip(0)), "mid-rise: no zero, no preferred sign"
    assert float(values[-1]) == levels(width)
    assert code_values(codes, width, torch.float64).dtype == torch.float64


def test_dropped_units_have_no_level() -> None:
    assert levels(0) == 0
    assert float(code_values(torch.zeros(1, dtype=torch.uint8), 0)) == 0
