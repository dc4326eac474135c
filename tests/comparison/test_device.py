"""Which accelerator a command uses. llm-compressor takes the first that it finds."""

import os

import pytest
import torch

from bitsmoe_modifier.comparison.runner import resolve_device
from bitsmoe_modifier.comparison.runs import use_device
from bitsmoe_modifier.errors import BitsMoEError


@pytest.mark.parametrize(
    ("device", "visible", "left", "used"),
    [
        ("cuda:2", None, "2", "cuda:0"),
        ("cuda:1", "5, 7", "7", "cuda:0"),
        ("cuda:0", None, None, "cuda:0"),
        ("cuda", "3", "3", "cuda"),
        ("cpu", None, "", "cpu"),
    ],
)
def test_the_other_accelerators_are_hidden(
    device: str, visible: str | None, left: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")  # so that what is there now is put back
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert use_device(resolve_device(device)) == torch.device(used)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left


def test_processes_of_torchrun_see_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert use_device("cuda:1") == torch.device("cuda:1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BitsMoEError, match="--device cuda:1 cannot be used: 1 CUDA GPUs are here"):
        resolve_device("cuda:1")
