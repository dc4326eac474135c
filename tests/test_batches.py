"""Batches that memory does not hold are halved, and only for that reason."""

import pytest
import torch

from bitsmoe_modifier import BitsMoEError
from bitsmoe_modifier.batches import with_smaller_batches

OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried 8"),
    MemoryError(),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_halved_until_it_fits(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[int] = []

    def run(batch_size: int) -> str:
        tried.append(batch_size)
        if batch_size > 3:
            raise error
        return "done"

    assert with_smaller_batches(run, 16, "calibration") == ("done", 2)
    assert tried == [16, 8, 4, 2]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "calibration: out of memory; going on with --batch-size 8"
    assert len(said) == 3


def test_one_row_that_is_too_much() -> None:
    """The remedy is one that the command has: `eval` has no --offload-dir."""

    def run(batch_size: int) -> None:
        raise torch.OutOfMemoryError("no")

    with pytest.raises(BitsMoEError, match=r"evaluation: out of memory with one row at a time; .* --seq-len$"):
        with_smaller_batches(run, 4, "evaluation")
    with pytest.raises(BitsMoEError, match=r"calibration: out of memory with one row at a time; or --offload-dir$"):
        with_smaller_batches(run, 4, "calibration", "or --offload-dir")


def test_other_errors_pass() -> None:
    def run(batch_size: int) -> None:
        tried.append(batch_size)
        raise RuntimeError("shapes do not fit")

    tried: list[int] = []
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        with_smaller_batches(run, 4, "calibration")
    assert tried == [4]


def test_a_real_allocation_that_is_too_large() -> None:
    """What torch raises on this machine is known as what it is."""
    tried = []

    def run(batch_size: int) -> int:
        tried.append(batch_size)
        return torch.empty(2**56 if batch_size > 1 else 8, dtype=torch.uint8).numel()

    assert with_smaller_batches(run, 2, "x") == (8, 1)
    assert tried == [2, 1]
