"""Which files of a folder are its checkpoint, where two were saved into it."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitsmoe_modifier.errors import CheckpointError
from bitsmoe_modifier.storage.shards import checkpoint_files, drop_older

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write(folder: Path, *names: str, seconds: int = 0) -> None:
    """Files of one tensor each, and an index of the shards, as old as is said."""
    for name in names:
        if name == INDEX:
            weights = {shard: shard for shard in SHARDS}
            (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
        else:
            save_file({name: torch.zeros(1)}, folder / name)
        os.utime(folder / name, (1_700_000_000 + seconds,) * 2)


def test_one_file_or_several(tmp_path: Path) -> None:
    write(tmp_path, SINGLE, "adapter_model.safetensors")
    assert checkpoint_files(tmp_path) == [tmp_path / SINGLE]
    (tmp_path / SINGLE).unlink()
    write(tmp_path, *SHARDS, INDEX)
    assert checkpoint_files(tmp_path) == [tmp_path / name for name in SHARDS]
    drop_older(tmp_path)
    assert checkpoint_files(tmp_path) == [tmp_path / name for name in SHARDS]
    (tmp_path / SHARDS[0]).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARDS[0]}: named by the index but missing"):
        checkpoint_files(tmp_path)


def test_an_index_whose_files_are_gone(tmp_path: Path) -> None:
    """transformers deletes the files of an index when it saves one file, and leaves the index."""
    write(tmp_path, INDEX, seconds=0)
    write(tmp_path, SINGLE, seconds=1)
    assert checkpoint_files(tmp_path) == [tmp_path / SINGLE]
    drop_older(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE]


def test_two_whole_checkpoints(tmp_path: Path) -> None:
    """Of which transformers reads one and vLLM the other."""
    write(tmp_path, SINGLE, seconds=0)
    write(tmp_path, *SHARDS, INDEX, seconds=1)
    with pytest.raises(CheckpointError, match=r"holds two checkpoints, model.safetensors and the files that .* names"):
        checkpoint_files(tmp_path)
    drop_older(tmp_path)
    assert checkpoint_files(tmp_path) == [tmp_path / name for name in SHARDS]
    assert not (tmp_path / SINGLE).exists()


def test_an_index_that_names_the_single_file_too(tmp_path: Path) -> None:
    """As where layers for multi-token prediction are in a file of their own."""
    write(tmp_path, SINGLE, "mtp.safetensors", seconds=0)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE, "b": "mtp.safetensors"}}))
    drop_older(tmp_path)
    assert checkpoint_files(tmp_path) == [tmp_path / SINGLE, tmp_path / "mtp.safetensors"]
