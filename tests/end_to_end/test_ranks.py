"""Two gloo processes quantize together: one process's checkpoint up to the order of sums, and no hang when one ends."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantize_once import FIELDS
from safetensors.torch import load_file

from bitsmoe_modifier.comparison.runs import stored_dtype
from bitsmoe_modifier.storage.packed import PackedExperts
from helpers import experts_names, load, packed_modules
from tiny_text import save_tiny, write_text

Checkpoint = Callable[..., Path]

LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


def run(processes: int, source: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    out.mkdir()
    return torchrun(processes, str(Path(__file__).parent / "ranks.py"), str(source), str(out), *options)


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=540)


def tensors(out: Path, rank: int, name: str) -> PackedExperts:
    stored = load_file(out / f"rank{rank}.safetensors")
    return PackedExperts(**{key.rpartition(".")[2]: t for key, t in stored.items() if key.startswith(f"{name}.")})


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_two_ranks_give_the_checkpoint_of_one(scope: str, dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Up to what float32 sums of another order can move: steps by a rounding, a code in a thousand by one."""
    source = dense_checkpoint("qwen3_moe")
    for processes in (1, 2):
        done = run(processes, source, tmp_path / str(processes), "none", scope)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in LAYERS:
        one, two, other = (tensors(tmp_path / str(n), rank, name) for n, rank in ((1, 0), (2, 0), (2, 1)))
        assert torch.equal(two.checksums, other.checksums), "every process has the same"
        assert torch.equal(one.layout, two.layout)
        assert torch.equal(one.widths_in, two.widths_in)
        assert torch.equal(one.widths_out, two.widths_out)
        for leaf in ("codes_in", "codes_out"):
            differing = (getattr(one, leaf) != getattr(two, leaf)).float().mean()
            assert float(differing) < 4e-3, "a byte holds up to eight codes"
    saved = packed_modules(load(tmp_path / "2" / "saved"))
    for name in LAYERS:
        assert torch.equal(saved[name].checksums, tensors(tmp_path / "2", 0, name).checksums)


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    """The first process speaks and writes for all, wherever weights wait; what two cannot share is refused."""
    source, text = tmp_path / "model", tmp_path / "text.txt"
    save_tiny(source)
    write_text(text, 3000, seed=0)
    recipe = tmp_path / "recipe.yaml"
    fields = "".join(f"      {name}: {value}\n" for name, value in FIELDS.items())
    recipe.write_text(f"quant_stage:\n  quant_modifiers:\n    BitsMoEModifier:\n{fields}")
    out = tmp_path / "out"
    command = ["-m", "bitsmoe_modifier", "quantize", "--model", str(source), "--calibration", str(text)]
    command += ["--recipe", str(recipe), "--out", str(out), "--seq-len", "32", "--batch-size", "4"]
    done = torchrun(2, *command, "--samples", "4")
    assert done.returncode != 0
    assert "1 calibration batches are too few for 2 processes" in done.stderr
    assert not out.exists()
    dtype = str(stored_dtype(source)).removeprefix("torch.")
    done = torchrun(2, *command, "--samples", "32", "--dtype", dtype)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("bits per expert weight") == 1
    assert len(packed_modules(load(out))) == len(experts_names(load(source)))
    weights = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out)
    done = torchrun(2, *command, "--samples", "32", "--offload-dir", str(tmp_path / "waiting"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "model.safetensors").read_bytes() == weights
    assert not list((tmp_path / "waiting").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("dies", "Signal 9"),
        ("fails", "out of luck"),
        ("same-rows", "2 processes calibrate with the same rows"),
    ],
)
def test_trouble_ends_all(trouble: str, said: str, dense_checkpoint: Checkpoint, tmp_path: Path) -> None:
    done = run(2, dense_checkpoint("qwen3_moe"), tmp_path / "out", trouble)
    assert done.returncode != 0
    assert said in done.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))
