"""Which accelerator a command uses. llm-compressor takes the first that it finds."""

import os

import pytest
import torch

from bitsmoe_modifier.comparison import device as devices
from bitsmoe_modifier.comparison.device import resolve_device, use_device
from bitsmoe_modifier.errors import BitsMoEError


@pytest.fixture(autouse=True)
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own that has not used CUDA, on a machine with three GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that what is there now is put back
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(devices, "_hidden_for", "")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch.cuda.device_count() > 0)
    monkeypatch.setattr(torch.cuda, "device_count", _visible)


def _visible() -> int:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2")
    return len(shown.split(",")) if shown else 0


@pytest.mark.parametrize(
    ("device", "visible", "left", "used"),
    [
        ("cuda:2", None, "2", "cuda:0"),
        ("cuda:1", "5, 7", "7", "cuda:0"),
        ("cuda:0", None, None, "cuda:0"),
        ("cuda", "3", "3", "cuda"),
        ("auto", "3", "3", "cuda"),
        ("cpu", None, "", "cpu"),
    ],
)
def test_the_other_accelerators_are_hidden(
    device: str, visible: str | None, left: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert use_device(resolve_device(device)) == torch.device(used)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left


def test_processes_of_torchrun_see_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert use_device("cuda:1") == torch.device("cuda:1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(BitsMoEError, match="--device cuda:3 cannot be used: 3 CUDA GPUs are here"):
        resolve_device("cuda:3")


# ------------------------------------------------------------------------------------ several runs of one process


def test_the_same_device_again() -> None:
    for _ in range(2):
        assert use_device(resolve_device("cuda:2")) == torch.device("cuda:0")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert use_device(resolve_device("cuda")) == torch.device("cuda")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"


@pytest.mark.parametrize(("first", "then"), [("cuda:1", "cuda:0"), ("cuda:1", "cuda:2"), ("cpu", "cuda")])
def test_another_device_says_what_hid_it(first: str, then: str) -> None:
    use_device(resolve_device(first))
    said = f"--device {then} cannot be used: an earlier run of this process took {first} and hid all others"
    with pytest.raises(BitsMoEError, match=said):
        resolve_device(then)


def test_auto_says_why_it_is_the_cpu_this_time(capsys: pytest.CaptureFixture[str]) -> None:
    use_device(resolve_device("cpu"))
    assert resolve_device("auto") == "cpu"
    assert "on the CPU: an earlier run of this process has hidden its GPUs; start a new" in capsys.readouterr().err


def test_what_cuda_has_found_cannot_be_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(BitsMoEError, match=r"--device cuda:1 cannot be used: .* has used CUDA already"):
        use_device(resolve_device("cuda:1"))
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert use_device(resolve_device("cpu")) == torch.device("cpu")
    assert "llm-compressor may use the GPU" in capsys.readouterr().err


def test_nothing_is_said_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for device in ("cpu", "auto", "cpu"):
        assert use_device(resolve_device(device)) == torch.device("cpu")
    assert capsys.readouterr().err == ""
