"""The look at the kernels that a quantization takes before it relies on them (`calibration.gpu_check`)."""

import os

import pytest
import torch
from kernel_backend import DEVICE, seeded
from loguru import logger

from bitsmoe_modifier.calibration import gpu_check
from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.runtime import experts as runtime_experts
from bitsmoe_modifier.runtime.experts import BitsMoEExperts
from helpers import random_layer


@pytest.fixture(autouse=True)
def warnings(monkeypatch: pytest.MonkeyPatch):
    """The kernels are wanted here until a check turns them off; what is warned about."""
    monkeypatch.setenv("BITSMOE_FORCE_PLAIN", "0")
    monkeypatch.setattr(BitsMoEExperts, "kernels_trusted", True)
    monkeypatch.setattr(gpu_check, "kernels_wanted", lambda _: True)
    found: list[str] = []
    sink = logger.add(found.append, level="WARNING", format="{message}")
    yield found
    logger.remove(sink)


def test_sound_kernels_are_used(warnings: list[str]) -> None:
    assert gpu_check.check_rounding(DEVICE)
    assert (os.environ["BITSMOE_FORCE_PLAIN"], warnings) == ("0", [])


FUNCTIONS = {"rounding": "_rounded", "trellis encoder": "_encoded", "trellis rounding": "_rounded_in_trellis"}


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("rounding.round_block", "rounding"),
        ("trellis_encoder.encode", "trellis encoder"),
        ("trellis_rounding.round_groups", "trellis rounding"),
        ("trellis_rounding.round_chains", "trellis rounding"),
    ],
)
@pytest.mark.parametrize("fault", ["fails", "zeros", "nan"])
def test_others_are_not(
    kernel: str, name: str, fault: str, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(target: torch.Tensor, *_: object) -> object:
        if fault == "fails":
            raise RuntimeError("PassManager::run failed")
        wrong = torch.full_like(target, float("nan") if fault == "nan" else 0.0)
        return (wrong,) * 3 if "rounding" in name else wrong if fault == "nan" else wrong.to(torch.uint8)

    for other, function in FUNCTIONS.items():
        if other != name:  # is sound, and takes its time
            monkeypatch.setattr(gpu_check, function, lambda _: 0.0)
    monkeypatch.setattr(f"bitsmoe_kernels.{kernel}", faulty)
    assert not gpu_check.check_rounding(DEVICE)
    assert os.environ["BITSMOE_FORCE_PLAIN"] == "1"
    (said,) = warnings
    assert f"the {name} kernel is not to be trusted" in said


@pytest.mark.parametrize("stripes", [0, 2])
def test_product_of_a_layer(stripes: int, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_experts, "kernels_wanted", lambda _: True)
    with torch.device("cpu"):  # where its generators are
        layer = random_layer(intermediate=64, group_size=32, basis_bits=(0, 0), stripes=stripes)
    experts = BitsMoEExperts(layer.packed.to(DEVICE), Gating())
    hidden, number = experts.spec.hidden_size, experts.spec.num_experts
    x = torch.randn(90, hidden, generator=seeded(0)).to(torch.bfloat16)
    inputs = x, torch.randint(number, (90, 2), generator=seeded(1)), torch.rand(90, 2, generator=seeded(2))
    assert gpu_check.check_product(experts, inputs)
    assert not warnings
    monkeypatch.setattr("bitsmoe_kernels.moe_forward", lambda *some: 2 * experts.forward_plain(*some[:3]))
    assert not gpu_check.check_product(experts, inputs)
    assert "it differs from PyTorch by 1" in warnings[0]
    assert not gpu_check.check_product(experts, inputs), "and is not asked again"
    assert torch.equal(experts(*inputs), experts.forward_plain(*inputs))
    assert os.environ["BITSMOE_FORCE_PLAIN"] == "0", "the encoder of trellis codes goes on"
    assert len(warnings) == 1
