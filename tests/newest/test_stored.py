"""Checkpoints that an earlier release wrote, in whatever environment runs this: `make test` and `make test-newest`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bitsmoe_modifier  # noqa: F401 - registers the loader
from helpers import load, logits
from helpers import packed_modules as packed

STORED = Path(__file__).parent / "stored"
#: how many layers of each have experts packed by us; the attention of the first and layer 1's experts of the second
#: are packed by stock formats
PACKED = {"packed": 2, "beside_linears": 1, "stock": 0}

_LOAD = """
import json, sys, torch
if sys.argv[2] == "with":
    import bitsmoe_modifier
from transformers import AutoModelForCausalLM
from helpers import logits
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
found = type(model.hf_quantizer), type(model.config.quantization_config)
print(json.dumps([logits(model).flatten().tolist(), *(f"{c.__module__}.{c.__qualname__}" for c in found)]))
"""


@pytest.mark.parametrize("name", PACKED)
def test_gives_the_logits_it_gave_when_it_was_made(name: str) -> None:
    # its experts stay bfloat16 in a float32 model, and a product of theirs is rounded to the other side on some CPUs
    model = load(STORED / name, dtype=torch.float32 if PACKED[name] else torch.float64)
    assert len(packed(model)) == PACKED[name]
    made = load_file(STORED / f"{name}.logits")["logits"]
    # other machines' kernels add in another order
    torch.testing.assert_close(logits(model).float(), made, rtol=1e-4, atol=1e-4 * float(made.abs().max()))


def test_others_load_as_without_us() -> None:
    """A stock W4A16 checkpoint, in two fresh processes: the same classes, and every bit of the logits."""
    found = {}
    for importing in ("with", "without"):
        command = [sys.executable, "-c", _LOAD, str(STORED / "stock"), importing]
        done = subprocess.run(command, cwd=STORED.parents[1], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[importing] = json.loads(done.stdout.splitlines()[-1])
    assert found["with"] == found["without"]
    assert found["with"][1].startswith("transformers.")


def test_saved_again_it_is_the_same(tmp_path: Path) -> None:
    model = load(STORED / "packed", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert len(packed(again)) == 2
