"""Trellis codes as they are stored, against a reader that knows docs/format.md alone."""

import pytest
import torch

from bitsmoe_modifier.errors import CheckpointError
from bitsmoe_modifier.storage import chains as storage_chains
from bitsmoe_modifier.storage import native_trellis
from bitsmoe_modifier.storage.chains import chains_of, index_side
from bitsmoe_modifier.storage.factors import decode_factor, pack_factor
from bitsmoe_modifier.storage.layout import ExpertsLayout
from bitsmoe_modifier.storage.packed import check_content, check_structure
from bitsmoe_modifier.storage.steps import step_values
from bitsmoe_modifier.storage.trellis import CODES, pack_windows, sequence_order, unpack_windows, window_values
from helpers import random_layer
from trellis_reader import VALUES, chains, read_tile

LAYERS = {
    "all widths": {"stripes": 1},
    "stripes": {"stripes": 4, "hidden": 128},
    "more stripes than units": {"stripes": 9},
    "long chains": {"stripes": 1, "hidden": 192, "widths": (2, 2, 2, 3)},
    "one unit a chain": {"stripes": 2, "hidden": 256, "block_size": 128, "intermediate": 32, "widths": (0, 1, 6)},
    "wide groups": {"stripes": 1, "group_size": 48},
    "nothing stored": {"stripes": 1, "widths": (0,)},
    "super experts and biases": {"stripes": 2, "dense": (1,), "bias": True, "basis_bits": (0, 16)},
}


@pytest.mark.parametrize("width", CODES)
def test_values_are_those_of_the_format(width: int) -> None:
    values = window_values(width)
    assert values.tolist() == VALUES[width]
    assert torch.equal(values, values.half().float())
    assert len(values.unique()) == 256
    assert torch.equal(values.sort().values, -values.sort().values.flip(0))


def test_a_thread_of_a_tensor_core_holds_consecutive_weights() -> None:
    order = sequence_order(128)
    assert order[:5].tolist() == [0, 8, 16, 24, 32]
    assert order[16:18].tolist() == [1, 9]
    assert sorted(order.tolist()) == list(range(128))


@pytest.mark.parametrize("width", CODES)
@pytest.mark.parametrize(("rows", "columns"), [(16, 2), (48, 4), (128, 6)])
def test_any_bytes_are_streams(width: int, rows: int, columns: int) -> None:
    gen = torch.Generator().manual_seed(width)
    packed = torch.randint(256, (3, width * rows * columns // 8), generator=gen).to(torch.uint8)
    windows = unpack_windows(packed, width, rows, columns)
    assert torch.equal(pack_windows(windows, width), packed)
    for tile, stored in zip(windows, packed, strict=True):
        expected = torch.from_numpy(read_tile(stored.numpy().tobytes(), width, rows, columns))
        assert torch.equal(window_values(width)[tile.long()], expected)


def test_windows_that_disagree_are_refused() -> None:
    windows = unpack_windows(torch.zeros(1, 8, dtype=torch.uint8), 2, 16, 2)
    windows[0, 3, 1] ^= 1
    with pytest.raises(ValueError, match="disagree on the bits"):
        pack_windows(windows, 2)


@pytest.mark.parametrize(("rows", "columns"), [(24, 2), (16, 3)])
def test_streams_of_half_words_are_refused(rows: int, columns: int) -> None:
    with pytest.raises(ValueError, match="multiples of 16, columns come in pairs"):
        pack_windows(torch.zeros(1, rows, columns, dtype=torch.uint8), 2)


@pytest.mark.parametrize("seed", range(5))
def test_chains_are_those_of_the_format(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    for stripes in (1, 2, 4, 40):
        for block_size in (16, 32, 64, 128, 256):
            widths = torch.tensor([0, 1, 2, 2, 2, 6])[torch.randint(6, (24,), generator=gen)].tolist()
            found = chains_of(widths, stripes, block_size)
            assert found == chains(widths, stripes, block_size)
            assert sorted(u for chain in found for u in chain) == [u for u, w in enumerate(widths) if w]
            assert all(len(chain) == 1 or len(chain) * block_size <= 128 for chain in found)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
@pytest.mark.parametrize("sizes", LAYERS.values(), ids=LAYERS)
def test_factors_decode_to_what_another_reader_finds(
    sizes: dict[str, object], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native_trellis, "library", lambda: None)
    elif native_trellis.library() is None:
        pytest.skip("no C++ compiler here")
    layer = random_layer(num_experts=3, **sizes)
    packed, layout = layer.packed, layer.layout
    assert layout.version == 2
    check_content(packed, "layer")
    check_structure(dict(packed.items()), "layer")
    for side, expected in (("in", layer.a), ("out", layer.f)):
        widths, steps = getattr(packed, f"widths_{side}"), getattr(packed, f"steps_{side}")
        flat = widths.reshape(-1, widths.shape[-1])
        index = index_side(flat, layout, side)
        codes = getattr(packed, f"codes_{side}")
        got = decode_factor(codes, steps, flat, index, layout, side)
        assert torch.equal(got.view(expected.shape), expected)
        some = torch.tensor([len(flat) - 1, 0])
        chosen = type(index)(index.code_offset[some], index.step_offset[some])
        assert torch.equal(decode_factor(codes, steps, flat[some], chosen, layout, side), got[some])


@pytest.mark.parametrize("batch", [1, 1 << 25])
@pytest.mark.parametrize("sizes", LAYERS.values(), ids=LAYERS)
def test_packing_gives_back_the_bytes(sizes: dict[str, object], batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and steps taken out of a payload tile by tile, in elementwise order, and packed again."""
    monkeypatch.setattr(storage_chains, "_BATCH_WEIGHTS", batch)
    layer = random_layer(num_experts=2, **sizes)
    layout, bs, gs = layer.layout, layer.layout.block_size, layer.layout.group_size
    for side in ("in", "out"):
        widths = getattr(layer.packed, f"widths_{side}")
        codes, steps = getattr(layer.packed, f"codes_{side}"), getattr(layer.packed, f"steps_{side}").view(-1, bs)
        flat = widths.reshape(-1, widths.shape[-1])
        index = index_side(flat, layout, side)
        rank, length = flat.shape[1] * bs, layout.intermediate_size
        windows = torch.zeros(len(flat), length, rank, dtype=torch.uint8)
        spread = torch.ones(len(flat), layout.groups, rank)
        for matrix, row in enumerate(flat.tolist()):
            own = [[u] for u, w in enumerate(row) if w] if side == "in" else chains(row, layout.stripes, bs)
            for units in own:
                rows = torch.cat([torch.arange(u * bs, u * bs + bs) for u in units])
                size = row[units[0]] * len(units) * layout.quantum
                for g in range(layout.groups):
                    start = int(index.code_offset[matrix, g, units[0]]) * layout.quantum
                    stored, columns = codes[None, start : start + size], slice(g * gs, g * gs + gs)
                    if side == "in":
                        windows[matrix, columns, rows] = unpack_windows(stored, row[units[0]], gs, bs)[0]
                    else:
                        windows[matrix, columns, rows] = unpack_windows(stored, row[units[0]], len(rows), gs)[0].T
                    spread[matrix, g, rows] = step_values(steps[index.step_offset[matrix, g, units]].flatten())
        if side == "in":
            elementwise, scales = windows.unflatten(0, (-1, 2)), spread.unflatten(0, (-1, 2))
        else:
            elementwise, scales = windows.transpose(1, 2), spread
        packed = pack_factor(elementwise, scales, widths, layout, side)
        assert torch.equal(packed[0], codes)
        assert torch.equal(packed[1], steps.flatten())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": torch.tensor([0, 17])}, "outside of the payload"),
        ({"offset": torch.tensor([0, -8])}, "outside of the payload"),
        ({"place": torch.arange(32).view(2, 16) * 4 + 1}, "outside of its result"),
        ({"offset": torch.tensor([0])}, "belong together"),
        ({"scale": torch.ones(2, 4)}, "belong together"),
        ({"scale": torch.ones(2, 16, dtype=torch.float64)}, "dtypes"),
        ({"columns": 3}, "belong together"),
    ],
    ids=str,
)
def test_the_compiled_decoder_believes_nothing(changes: dict[str, object], message: str) -> None:
    library = native_trellis.library()
    if library is None:
        pytest.skip("no C++ compiler here")
    arguments = {
        "payload": torch.zeros(32, dtype=torch.uint8),
        "offset": torch.tensor([0, 16]),
        "width": 2,
        "scale": torch.ones(2, 16),
        "by_row": True,
        "place": torch.arange(32).view(2, 16) * 4,
        "columns": 4,
        "out": torch.zeros(32, 4),
    }
    native_trellis.decode_tiles(library, **arguments)
    with pytest.raises(ValueError, match=message):
        native_trellis.decode_tiles(library, **{**arguments, **changes})


HEADERS = {
    "unknown family": {13: 2},
    "version 1 with trellis codes": {0: 1},
    "version 0": {0: 0},
    "no stripes": {14: 0},
    "stripes of scalar codes": {0: 1, 13: 0},
    "blocks of 8": {6: 8},
    "groups of 24": {7: 24},
    "neither gated nor ungated": {15: 2},
}


@pytest.mark.parametrize("changes", HEADERS.values(), ids=HEADERS)
def test_headers_that_no_writer_makes_are_refused(changes: dict[int, int]) -> None:
    header = random_layer(stripes=1).packed.layout.clone()
    for place, number in changes.items():
        header[place] = number
    with pytest.raises(CheckpointError, match="layout"):
        ExpertsLayout.from_tensor(header)
