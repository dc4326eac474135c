"""Packed experts that run on the emulated GPU, in plain PyTorch, with everything that they keep between calls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import GPU, GPUTensor, emulated_gpu

from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.runtime.experts import BitsMoEExperts
from bitsmoe_modifier.storage.packed import check_content, check_structure
from helpers import load, logits, pack_randomly, random_layer, save, tiny_model

E = 4
LAYERS: dict[str, dict[str, Any]] = {
    "scalar": {},
    "scalar-dense-bias": {"dense": (1, 3), "bias": True, "basis_bits": (16, 8)},
    "scalar-no-bases": {"basis_bits": (0, 0)},
    "trellis": {"stripes": 2},
    "trellis-dense-bias": {"stripes": 1, "dense": (2,), "bias": True, "basis_bits": (0, 16)},
    "truncated": {"rank_in": 48, "stripes": 3},
}


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids (one of them of another rank's expert), weights."""
    gen = torch.Generator().manual_seed(0)
    ids = torch.rand(tokens, E, generator=gen).argsort(1)[:, :2]
    ids[-1, 0] = E
    return torch.randn(tokens, 64, generator=gen), ids, torch.rand(tokens, 2, generator=gen)


def apart(made: torch.Tensor, known: torch.Tensor) -> float:
    """Relative difference."""
    return float((made.cpu() - known).norm() / known.norm())


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_runs_as_on_the_cpu(name: str) -> None:
    module = BitsMoEExperts(random_layer(E, **LAYERS[name]).packed, Gating())
    module.keep_decoded(True)  # else the CPU multiplies from the codes
    call = routing(9)
    expected = [module(call[0].to(dtype), *call[1:]) for dtype in (torch.float32, torch.bfloat16)]
    weights = module.dense_weights()
    with emulated_gpu():
        module.to(GPU)
        there = [part.to(GPU) for part in call]
        for _ in range(2):  # decoded, and from what was kept
            for known in expected:
                made = module(there[0].to(known.dtype), *there[1:])
                assert isinstance(made, GPUTensor)
                assert apart(made, known) < 1e-6
        with torch.inference_mode():
            assert apart(module(*there), expected[0]) < 1e-6
        for made, known in zip(module.dense_weights(), weights, strict=True):
            assert torch.equal(made.cpu(), known)
        check_structure(dict(module.packed.items()), name)
        check_content(module.packed, name)
        assert dict(module.packed.sealed().items())["checksums"].tolist() == module.packed.checksums.tolist()
        module.to("cpu")  # what was decoded there is of no use here
        assert apart(module(*call), expected[0]) < 1e-6


def test_gradients_reach_the_inputs() -> None:
    """Of a layer that calibration has packed, in the survey of the next."""
    module, call = BitsMoEExperts(random_layer(E, stripes=2).packed, Gating()), routing(9)
    module.keep_decoded(True)
    x = call[0].clone().requires_grad_()
    module(x, *call[1:]).square().sum().backward()
    with emulated_gpu():
        module.to(GPU)
        y = call[0].to(GPU).requires_grad_()
        module(y, call[1].to(GPU), call[2].to(GPU)).square().sum().backward()
        assert apart(y.grad, x.grad) < 1e-6


def test_rows_that_the_caller_has_sorted() -> None:
    module, rows = BitsMoEExperts(random_layer(E).packed, Gating()), torch.zeros(E * 3, 64)
    rows[[0, 4, 5, 11]] = routing(4)[0]
    module.keep_decoded(True)
    expected = module(rows)
    with emulated_gpu():
        assert apart(module.to(GPU)(rows.to(GPU)), expected) < 1e-6


WHOLE = {"": "emulated:0"}
PARTS = dict.fromkeys(("lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb"), "emulated:0") | {
    "model.layers.0": "emulated:0",
    "model.layers.1": "cpu",
}


@pytest.mark.parametrize(("stripes", "device_map"), [(0, None), (2, WHOLE), (2, PARTS)])
def test_a_checkpoint_is_loaded_and_generates(stripes: int, device_map: dict[str, str] | None, tmp_path: Path) -> None:
    """Moved after loading, loaded to the GPU, or one layer waiting in main memory."""
    dense = tiny_model("qwen3_moe")
    pack_randomly(dense, stripes=stripes)
    save(dense, tmp_path)
    known, ids = load(tmp_path), torch.arange(40).reshape(2, 20) * 7 % 128
    expected, words = logits(known), known.generate(ids, max_new_tokens=3, do_sample=False)
    with emulated_gpu():
        model = load(tmp_path).to(GPU) if device_map is None else load(tmp_path, device_map=device_map)
        with torch.no_grad():
            assert apart(model(input_ids=ids.to(GPU)).logits, expected) < 1e-5
        if device_map is not PARTS:  # accelerate's hooks make parameters by their class, a second time in vain
            assert model.generate(ids.to(GPU), max_new_tokens=3, do_sample=False).tolist() == words.tolist()
