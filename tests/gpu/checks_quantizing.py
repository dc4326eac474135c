"""Whole layers quantized on the emulated GPU: the same as on the CPU, by code that leaves no tensor behind."""

from typing import Any

import pytest
import torch
from emulated import GPU, emulated_gpu

from bitsmoe_modifier.method import rounded
from bitsmoe_modifier.method.candidates import plan_layer
from bitsmoe_modifier.method.design import moved
from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.method.layer import DenseExperts, QuantizerSettings
from bitsmoe_modifier.method.quantize import quantize_layer
from bitsmoe_modifier.method.statistics import RoutedTokens

E, H, I, ROWS, LENGTH = 3, 32, 32, 8, 30

CASES: dict[str, dict[str, Any]] = {
    "scalar": {"codes": "scalar", "refine_passes": 1, "solver": "lagrangian", "output_basis": "none"},
    "open": {"codes": "scalar", "error_feedback": False, "compensation": False, "input_basis": "none"},
    "trellis": {
        "codes": "trellis",
        "metric": True,
        "bias": True,
        "dtype": torch.bfloat16,
        "input_basis": "none",
    },
    "truncated": {"codes": "trellis", "bits": 2.2, "basis_bits": 16, "input_basis": "spectral", "output_basis": "none"},
    "ungated": {"codes": "trellis", "ungated": True, "output_basis": "spectral", "input_basis": "none"},
    "super-experts": {"codes": "scalar", "dense": (1,), "bits": 11.0, "input_basis": "none", "metric": True},
    "few-rows": {"codes": "trellis", "rows": 1, "dense": "auto"},
}


def layer(bias: bool, ungated: bool, dtype: torch.dtype, rows: int) -> tuple[DenseExperts, tuple[torch.Tensor, ...]]:
    """Experts, and what the router gave: inputs, ids, weights, loss weights."""
    gen = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    gate_up = randn(E, 2 * I, H) / H**0.5
    if ungated:
        gate_up[:, I:] = 0
    biases = (randn(E, 2 * I).to(dtype), randn(E, H).to(dtype)) if bias else (None, None)
    gating = Gating("relu2", up_shift=1.0) if ungated else Gating()
    experts = DenseExperts(gate_up.to(dtype), (randn(E, H, I) / I**0.5).to(dtype), gating, *biases, ungated=ungated)
    x = randn(rows * LENGTH * (ROWS // rows), H) @ (torch.linalg.qr(randn(H, H))[0] * torch.logspace(0.6, -1, H)).T
    ids = torch.rand(len(x), E, generator=gen).argsort(1)[:, :2]
    p = torch.rand(len(x), 2, generator=gen) + 0.1
    return experts, (x.to(dtype), ids, p / p.sum(1, keepdim=True), torch.rand(len(x), generator=gen))


def quantized(case: dict[str, Any], device: torch.device) -> Any:
    """(packed tensors, report) of a layer that is quantized on a device."""
    case = dict(case)
    rows, dense = case.pop("rows", ROWS), case.pop("dense", ())
    experts, (x, ids, p, loss) = layer(
        case.pop("bias", False), case.pop("ungated", False), case.pop("dtype", torch.float32), rows
    )
    metric = torch.diag(torch.linspace(0.5, 2, H)).to(device) if case.pop("metric", False) else None
    experts = moved(experts, device)
    settings = QuantizerSettings(**{"bits": 3.0, "block_size": 16, "group_size": 16, "refine_passes": 0, **case})
    tokens = RoutedTokens.from_router(x.to(device), ids.to(device), p.to(device), E, loss.to(device), rows)
    plan = plan_layer(experts, tokens, settings, metric=metric, dense_ids=dense)
    design = moved(moved(plan, "cpu").choose(settings.bits * experts.elements), device)  # as calibration keeps them
    return quantize_layer(experts, tokens, design, settings, metric)


def test_experts_are_decoded_alike_in_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the three at once, and one by one, as on the CPU."""
    expected, _ = quantized(CASES["trellis"], torch.device("cpu"))
    for experts in (1, 2):
        monkeypatch.setattr(rounded, "_DECODED_AT_ONCE", experts * 2 * I * H)
        with emulated_gpu():
            packed, _ = quantized(CASES["trellis"], GPU)
        assert {n: t.tolist() for n, t in packed.items()} == {n: t.tolist() for n, t in expected.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_quantized_as_on_the_cpu(name: str) -> None:
    expected, report = quantized(CASES[name], torch.device("cpu"))
    with emulated_gpu():
        packed, there = quantized(CASES[name], GPU)
    assert {n: t.tolist() for n, t in packed.items()} == {n: t.tolist() for n, t in expected.items()}
    # sums over tokens, in another order than the compiled ones of the CPU
    assert there.relative_output_error == pytest.approx(report.relative_output_error, 1e-4)
    assert there.unseen_output_error == pytest.approx(report.unseen_output_error, 1e-4)
    assert (there.width_counts, there.warnings) == (report.width_counts, report.warnings)
