"""Import of the BitsMoE authors' layout, against checkpoints that an independent encoder writes bit by bit."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitsmoe_modifier import CheckpointError
from bitsmoe_modifier.checkpoints.authors import decode_matrix
from bitsmoe_modifier.checkpoints.authors_bases import decode_marlin, tile_order
from bitsmoe_modifier.cli import main
from helpers import load, tiny_model
from tiny_text import save_tiny


def encode(codes: np.ndarray, widths: list[int], scale: np.ndarray, s: np.ndarray) -> dict[str, torch.Tensor]:
    """Buffers of one matrix, written with plain integers.

    Args:
        codes: what is multiplied by scale and s, ``[rank, columns]``.
        widths: bits of every direction, 0 drops it; from 1, the codes must fit.
        scale: ``[rank, tiles]``; s: ``[rank]``; both float16.
    """
    rank, columns = codes.shape
    tiles = -(-columns // 128)
    words: list[int] = []
    order: list[int] = []
    slab_meta, tile_meta, scales = [], [], []
    for bits in sorted({w for w in widths if w}, reverse=True):
        members = [r for r in range(rank) if widths[r] == bits]
        for first in range(0, len(members), 64):
            slab = members[first : first + 64]
            slab_meta.append([bits, len(slab), len(order), len(tile_meta)])
            order += slab
            for tile in range(tiles):
                tile_meta.append([len(words), len(scales), min(128, columns - 128 * tile)])
                scales += [1.0 if bits == 16 else float(scale[r, tile]) for r in slab]
                for stage in range(0, len(slab), 16):
                    for micro in range(4):
                        for r in slab[stage : stage + 16]:
                            left = 128 * tile + 32 * micro
                            part = [codes[r, c] if c < columns else 0 for c in range(left, left + 32)]
                            words += halves(part) if bits == 16 else planes(part, bits)
    return {
        "payload": torch.tensor(words, dtype=torch.int64).to(torch.uint32),
        "rank_idx": torch.tensor(order, dtype=torch.int32),
        "slab_meta": torch.tensor(slab_meta, dtype=torch.int16),
        "tile_meta": torch.tensor(tile_meta, dtype=torch.int32),
        "scale": torch.tensor(scales).half(),
        "s": torch.tensor([float(s[r]) for r in order]).half(),
    }


def planes(values: list[float], bits: int) -> list[int]:
    """A word per bit: bit ``lane`` of word ``plane`` is bit ``plane`` of the lane's code."""
    unsigned = [(int(v) + 1) // 2 if bits == 1 else int(v) + 2 ** (bits - 1) for v in values]
    return [sum(((u >> plane) & 1) << lane for lane, u in enumerate(unsigned)) for plane in range(bits)]


def halves(values: list[float]) -> list[int]:
    """Two float16 to a word, the first one in its low half."""
    raw = [struct.unpack("<H", struct.pack("<e", float(v)))[0] for v in values]
    return [low | high << 16 for low, high in zip(raw[0::2], raw[1::2], strict=True)]


def random_matrix(
    rank: int, columns: int, widths: list[int], seed: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Buffers and the float64 matrix that they stand for."""
    draw = np.random.default_rng(seed)
    codes = np.zeros((rank, columns))
    for r, bits in enumerate(widths):
        if bits == 1:
            codes[r] = draw.choice([-1, 1], columns)
        elif bits == 16:
            codes[r] = draw.standard_normal(columns).astype(np.float16)
        elif bits:
            codes[r] = draw.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), columns)
    tiles = -(-columns // 128)
    scale = (0.01 + draw.random((rank, tiles))).astype(np.float16).astype(float)
    s = (0.1 + draw.random(rank)).astype(np.float16).astype(float)
    factor = np.where(np.array(widths)[:, None] == 16, 1.0, scale.repeat(128, 1)[:, :columns]) * s[:, None] * codes
    return encode(codes, widths, scale, s), torch.from_numpy(factor)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize(("rank", "columns"), [(16, 128), (70, 160), (5, 32)])
def test_every_width_and_awkward_shapes(bits, rank, columns):
    parts, expected = random_matrix(rank, columns, [bits] * rank, seed=bits)
    # float32 products of numbers that float32 holds: one rounding each
    torch.testing.assert_close(decode_matrix(parts, rank, "m").double(), expected, rtol=2e-7, atol=0)


def test_mixed_and_dropped_directions():
    widths = [4, 0, 2, 1, 2, 8, 0, 3] * 12
    parts, expected = random_matrix(96, 96, widths, seed=1)
    torch.testing.assert_close(decode_matrix(parts, 96, "m").double(), expected, rtol=2e-7, atol=0)


def marlin(weight: np.ndarray, scales: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales in Marlin order, byte by byte, as the lanes of a warp find them.

    Args:
        weight: integers −128 … 127, ``[K, N]``; scales: float16 ``[K/128, N]``.
    """
    rows, columns = weight.shape
    words = np.zeros((rows // 16, 4 * columns), np.uint32)
    for r in range(rows):
        for c in range(columns):
            lane = 4 * (c % 8) + (r % 8) // 2
            code = ((c % 64) // 16) * 8 + (c % 16 >= 8) * 4 + (r % 16 >= 8) * 2 + r % 2
            byte = {0: 0, 1: 2, 2: 1, 3: 3}[code % 4]
            word = (c // 64) * 256 + lane * 8 + code // 4
            words[r // 16, word] |= np.uint32((int(weight[r, c]) + 128) << 8 * byte)
    moved = np.zeros_like(scales)
    for c in range(columns):
        if len(scales) > 1:
            moved[:, c // 64 * 64 + (c % 8) * 8 + c % 64 // 8] = scales[:, c]
        else:
            moved[:, c // 32 * 32 + (c % 8 // 2) * 8 + (c % 32 // 8) * 2 + c % 2] = scales[:, c]
    return torch.from_numpy(words.view(np.int32)), torch.from_numpy(moved)


def random_basis(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and scales of a basis of 8 bits, and the float64 matrix ``[K, N]`` that they stand for."""
    draw = np.random.default_rng(seed)
    weight = draw.integers(-128, 128, (rows, columns))
    scales = (0.001 + draw.random((rows // 128, columns)) / 500).astype(np.float16)
    codes, moved = marlin(weight, scales)
    return codes, moved, torch.from_numpy(weight * scales.astype(float).repeat(128, 0))


@pytest.mark.parametrize(("rows", "columns"), [(128, 64), (256, 192), (384, 64)])
def test_bases_in_marlin_order(rows: int, columns: int) -> None:
    codes, scales, expected = random_basis(rows, columns, seed=rows)
    assert torch.equal(decode_marlin(codes, scales, "b").double(), expected)


def test_the_order_is_the_one_that_is_written_down() -> None:
    """The first bytes of a tile, read off Marlin's description: lane 0 has rows 0, 8, 1, 9 of column 0 first."""
    assert [divmod(int(place), 64) for place in tile_order()[:8]] == [
        (0, 0),
        (8, 0),
        (1, 0),
        (9, 0),
        (0, 8),
        (8, 8),
        (1, 8),
        (9, 8),
    ]
    assert sorted(tile_order()) == list(range(1024))


@pytest.mark.parametrize("change", ["shape", "dtype", "scales"])
def test_bases_of_another_shape_are_named(change: str) -> None:
    codes, scales, _ = random_basis(256, 64, seed=0)
    if change == "shape":
        codes = codes[:-1]
    elif change == "dtype":
        codes = codes.view(torch.uint32)
    else:
        scales = scales[:1]
    with pytest.raises(CheckpointError, match=r"^layer\.3\.basis: "):
        decode_marlin(codes, scales, "layer.3.basis")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny Qwen3-MoE in the authors' layout, one expert of every layer dense; and its dense weights, float64."""
    base = save_tiny(tmp_path_factory.mktemp("base"))
    folder = tmp_path_factory.mktemp("authors")
    model = tiny_model("qwen3_moe")
    tensors, expected = {}, {}
    for name, tensor in model.state_dict().items():
        if ".experts." not in name:
            tensors[name] = tensor.half()
            expected[name] = tensor.half().double()
    gen = torch.Generator().manual_seed(0)
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        bases = {
            "shared_vh_gate_proj": torch.randn(64, 64, generator=gen).half() / 8,
            "shared_vh_up_proj": torch.randn(64, 64, generator=gen).half() / 8,
            "shared_u_down": torch.randn(64, 64, generator=gen).half() / 8,
        }
        tensors.update({f"{mlp}.{name}": basis for name, basis in bases.items()})
        for expert in range(8):
            where = f"{mlp}.experts.{expert}"
            if expert == 3:
                for matrix, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32))):
                    weight = torch.randn(shape, generator=gen).half()
                    tensors[f"{where}.{matrix}_proj.weight"] = weight
                    expected[f"{where}.{matrix}_proj.weight"] = weight.double()
                continue
            for i, (matrix, basis) in enumerate(zip(("gate", "up", "down"), bases.values(), strict=True)):
                widths = [4] * 8 + [2] * 40 + [0] * 16
                parts, factor = random_matrix(64, 32, widths, seed=100 * layer + 10 * expert + i)
                tensors.update({f"{where}.{matrix}_{part}_buffer": tensor for part, tensor in parts.items()})
                tensors[f"{where}.{matrix}_original_rank"] = torch.tensor(64, dtype=torch.int32)
                weight = basis.double() @ factor if matrix == "down" else factor.T @ basis.double()
                expected[f"{where}.{matrix}_proj.weight"] = weight
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsmoe"}}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    return folder, expected


def test_a_checkpoint_becomes_the_dense_model(published, tmp_path):
    folder, expected = published
    assert main(["import", str(folder), "--dtype", "float32", "--out", str(tmp_path / "dense")]) == 0
    model = load(tmp_path / "dense", dtype=torch.float32)
    own = dict(model.named_parameters())
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        gate_up, down = own[f"{experts}.gate_up_proj"].double(), own[f"{experts}.down_proj"].double()
        for e in range(8):
            rows = [expected[f"{experts}.{e}.{m}_proj.weight"] for m in ("gate", "up")]
            # sums of 64 float32 products
            torch.testing.assert_close(gate_up[e], torch.cat(rows), rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(down[e], expected[f"{experts}.{e}.down_proj.weight"], rtol=1e-5, atol=1e-4)
    for name, tensor in expected.items():
        if ".experts." not in name:
            assert torch.equal(own[name].double(), tensor), name


def test_other_checkpoints_are_refused(dense_checkpoint, tmp_path, capsys):
    assert main(["import", str(dense_checkpoint("qwen3_moe")), "--out", str(tmp_path / "out")]) == 2
    assert "not of the BitsMoE authors' layout" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["payload", "rank_idx", "slab_meta"])
def test_damaged_tables_are_named(change):
    from bitsmoe_modifier.errors import CheckpointError

    parts, _ = random_matrix(16, 128, [2] * 16, seed=0)
    if change == "payload":
        parts["payload"] = parts["payload"].view(torch.int32)[:-1].view(torch.uint32)
    elif change == "rank_idx":
        parts["rank_idx"][0] = parts["rank_idx"][1]
    else:
        parts["slab_meta"][0, 0] = 5
    with pytest.raises(CheckpointError, match=r"layer\.3\.gate"):
        decode_matrix(parts, 16, "layer.3.gate")


EMPTY = {
    "payload": torch.empty(0, dtype=torch.uint32),
    "rank_idx": torch.empty(0, dtype=torch.int32),
    "slab_meta": torch.empty(0, 4, dtype=torch.int32),
    "tile_meta": torch.empty(0, 3, dtype=torch.int32),
    "scale": torch.empty(0, dtype=torch.float16),
    "s": torch.empty(0, dtype=torch.float16),
}


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny Qwen3-MoE (H 128, I 32) in the layout since 2026-10, in two files; and its experts' weights, float64.

    Expert 2 of every layer is dropped, expert 5 has no up projection, the last layer has no expert left. The old
    names of the bases are still there, empty.
    """
    base = save_tiny(tmp_path_factory.mktemp("base"))
    folder = tmp_path_factory.mktemp("newest")
    model = tiny_model("qwen3_moe", hidden_size=128, num_hidden_layers=2)
    tensors = {name: t.half() for name, t in model.state_dict().items() if ".experts." not in name}
    expected = {}
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        bases = {}
        for n, name in enumerate(("shared_vh_gate_proj", "shared_vh_up_proj", "shared_u_down")):
            rows, columns = (128, 192) if n < 2 else (256, 128)
            tensors[f"{mlp}.{name}_qweight"], tensors[f"{mlp}.{name}_scales"], basis = random_basis(rows, columns, n)
            tensors[f"{mlp}.{name}"] = torch.empty(0, dtype=torch.float16)
            bases[name] = basis.T
        for expert in range(8):
            where = f"{mlp}.experts.{expert}"
            for i, (matrix, basis) in enumerate(zip(("gate", "up", "down"), bases.values(), strict=True)):
                rank = 256 if matrix == "down" else 192
                parts, factor = random_matrix(rank, 32, [4] * 8 + [1] * 24 + [0] * (rank - 32), seed=10 * expert + i)
                if layer == 1 or expert == 2 or (expert == 5 and matrix == "up"):
                    parts, factor = EMPTY, torch.zeros(rank, 32).double()
                tensors.update({f"{where}.{matrix}_{part}_buffer": tensor for part, tensor in parts.items()})
                tensors[f"{where}.{matrix}_segments"] = torch.empty(0, 3, dtype=torch.int32)
                tensors[f"{where}.{matrix}_original_rank"] = torch.tensor(rank, dtype=torch.int32)
                weight = basis @ factor if matrix == "down" else factor.T @ basis
                expected[f"{where}.{matrix}_proj.weight"] = weight
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((base / "config.json").read_text())
    theirs = {"bitsmoe": True, "bitsmoe_model_type": "qwen3moe", "hidden_size": 128}
    (folder / "config.json").write_text(json.dumps({**config, **theirs}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    return folder, expected


def test_the_newest_layout_becomes_the_dense_model(newest, tmp_path):
    folder, expected = newest
    assert main(["import", str(folder), "--dtype", "float32", "--out", str(tmp_path / "dense")]) == 0
    assert not json.loads((tmp_path / "dense" / "config.json").read_text()).keys() & {"bitsmoe", "bitsmoe_model_type"}
    own = dict(load(tmp_path / "dense", dtype=torch.float32).named_parameters())
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        gate_up, down = own[f"{experts}.gate_up_proj"].double(), own[f"{experts}.down_proj"].double()
        for e in range(8):
            rows = [expected[f"{experts}.{e}.{m}_proj.weight"] for m in ("gate", "up")]
            # sums of 256 float32 products
            torch.testing.assert_close(gate_up[e], torch.cat(rows), rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(down[e], expected[f"{experts}.{e}.down_proj.weight"], rtol=1e-5, atol=1e-4)
        assert not down[2].any()
        assert not gate_up[5, 32:].any()


def test_an_empty_payload_with_a_filled_table_is_damaged(newest, tmp_path, capsys):
    folder, _ = newest
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    key = "model.layers.0.mlp.experts.2.up_s_buffer"
    index = json.loads((damaged / "model.safetensors.index.json").read_text())
    file = damaged / index["weight_map"][key]
    save_file({**load_file(file), key: torch.ones(3).half()}, file)
    assert main(["import", str(damaged), "--out", str(tmp_path / "out")]) == 2
    assert "experts.2.up: an empty payload with a s that is not" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
