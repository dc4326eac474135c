"""What processes exchange: order, dtypes, errors, and the end of a process that others wait for."""

import datetime
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bitsmoe_modifier import CalibrationError
from bitsmoe_modifier.compare.processes import start_context
from bitsmoe_modifier.distributed import Ranks, check_shares, share
from bitsmoe_modifier.fingerprint import rows_digest


def batches(count: int, seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """Captured inputs of an experts module, of different lengths."""
    gen = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        tokens = 3 + n % 4
        x = torch.randn(tokens, 8, generator=gen).bfloat16()
        made.append((x, torch.randint(4, (tokens, 2), generator=gen), torch.rand(tokens, 2, generator=gen)))
    return made


def _exchange(rank: int, ranks: Ranks) -> None:
    for count in (2, 5, 6):
        everything = batches(count)
        collected = ranks.collect(share(everything, ranks))
        assert len(collected) == (count if rank == 0 else 0)
        for got, expected in zip(collected, everything if rank == 0 else [], strict=True):
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, expected, strict=True))
    assert ranks.collect([]) == []
    assert ranks.everyones(f"rank {rank}") == ["rank 0", "rank 1"]
    assert ranks.total(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
    assert ranks.compute(lambda: ("made by", rank, torch.arange(3)))[1] == 0
    with pytest.raises(CalibrationError, match="layer 3: too hot"):
        ranks.compute(_too_hot)
    with pytest.raises(CalibrationError, match="1 calibration batches are too few for 2 processes"):
        share(batches(1), ranks)


def _too_hot() -> None:
    raise CalibrationError("layer 3: too hot")


def _other_dies(rank: int, ranks: Ranks) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"peer|reset|closed"):
        ranks.collect(batches(1))


def _first_dies(rank: int, ranks: Ranks) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"peer|reset|closed"):
        ranks.compute(list)


def _process(rank: int, store: str, body: Callable[[int, Ranks], None]) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=patience)
    body(rank, Ranks())


@pytest.mark.parametrize(
    ("body", "codes"), [(_exchange, [0, 0]), (_other_dies, [0, -9]), (_first_dies, [-9, 0])], ids=lambda b: str(b)[:20]
)
def test_two_processes(body: Callable[[int, Ranks], None], codes: list[int], tmp_path: Path) -> None:
    processes = [
        start_context("cpu").Process(target=_process, args=(rank, str(tmp_path / "store"), body)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    still_running = [process for process in processes if process.is_alive()]
    for process in still_running:
        process.kill()
    assert not still_running, "waits for a process that is gone"
    assert [process.exitcode for process in processes] == codes


def test_one_process_exchanges_nothing() -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
    inputs: list[Any] = batches(3)
    assert ranks.collect(inputs) is inputs
    assert share(inputs) == inputs
    assert ranks.everyones(5) == [5]


def test_equal_rows_are_refused() -> None:
    one, two = ([{"input_ids": torch.full((1, 4), token)}] for token in (1, 2))
    check_shares([rows_digest(one), rows_digest(two)])
    with pytest.raises(CalibrationError, match=r"2 processes calibrate with the same rows.*distributed\.share"):
        check_shares([rows_digest(one), rows_digest(one)])
