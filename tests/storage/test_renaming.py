"""Tensors get other names, and keep every byte."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitsmoe_modifier.storage.renaming import rename_tensors

TENSORS = {
    "model.a.weight": torch.arange(12, dtype=torch.int32).reshape(3, 4),
    "model.a.scale": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "model.nothing": torch.empty(0, 3),
    "model.byte": torch.tensor([7], dtype=torch.uint8),
}


@pytest.mark.parametrize("name", ["b", "a.much.longer.name.than.there.was.room.for.in.the.header", "ein.längerer.Name"])
def test_tensors_keep_their_bytes(name: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file, {"format": "pt", "note": "kept"})
    rename_tensors(file, {"model.a.weight": f"{name}.weight", "model.byte": f"{name}.byte", "not there": "x"})
    found = load_file(file)
    expected = {key.replace("model.a.weight", f"{name}.weight"): tensor for key, tensor in TENSORS.items()}
    expected[f"{name}.byte"] = expected.pop("model.byte")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "kept"}
    assert list(tmp_path.iterdir()) == [file]


def test_names_may_be_exchanged(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, file)
    rename_tensors(file, {"a": "b", "b": "a"})
    assert {key: len(tensor) for key, tensor in load_file(file).items()} == {"a": 3, "b": 2}


def test_a_file_without_them_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    before = file.stat().st_mtime_ns, file.read_bytes()
    rename_tensors(file, {"not there": "x"})
    assert (file.stat().st_mtime_ns, file.read_bytes()) == before
