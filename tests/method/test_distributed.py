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
from bitsmoe_modifier.calibration.fingerprint import rows_digest
from bitsmoe_modifier.comparison.processes import start_context
from bitsmoe_modifier.method.candidates import plan_layer
from bitsmoe_modifier.method.distributed import Ranks, check_shares, share
from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.method.layer import DenseExperts, QuantizerSettings
from bitsmoe_modifier.method.quantize import quantize_layer
from bitsmoe_modifier.method.statistics import RoutedTokens


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
        for got, expected in zip(collected, everything, strict=True):
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, expected, strict=True))
    assert ranks.collect([]) == []
    assert ranks.everyones(f"rank {rank}") == ["rank 0", "rank 1"]
    assert ranks.total(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
    for lengths in ((3, 3), (0, 2), (2, 0)):
        own = torch.full((lengths[rank],), float(rank))
        whole = [0.0] * lengths[0] + [1.0] * lengths[1]
        assert ranks.concatenated(own).tolist() == (own.tolist() if rank else whole)
    assert ranks.compute(lambda: ("made by", rank, torch.arange(3)))[1] == 0
    with pytest.raises(CalibrationError, match="layer 3: too hot"):
        ranks.compute(_too_hot)
    with pytest.raises(CalibrationError, match="1 calibration batches are too few for 2 processes"):
        share(batches(1), ranks)


def _too_hot() -> None:
    raise CalibrationError("layer 3: too hot")


def _quantizes(rank: int, ranks: Ranks) -> None:
    """Each process measures and rounds some experts; together they make what one makes, but for the order of sums."""
    gen = torch.Generator().manual_seed(3)
    hidden, width, tokens = 64, 32, 300
    for num_experts, codes in ((5, "scalar"), (1, "scalar"), (5, "trellis")):
        experts = DenseExperts(
            torch.randn(num_experts, 2 * width, hidden, generator=gen) / 8,
            torch.randn(num_experts, hidden, width, generator=gen) / 6,
            Gating(),
        )
        x = torch.randn(tokens, hidden, generator=gen) * torch.logspace(0, -1, hidden)
        ids = torch.rand(tokens, num_experts, generator=gen).argsort(1)[:, :2]
        routed = RoutedTokens.from_router(x, ids, torch.rand(ids.shape, generator=gen) + 0.1, num_experts, rows=8)
        settings = QuantizerSettings(bits=3.0, block_size=16, group_size=16, codes=codes)
        alone, together = (plan_layer(experts, routed, settings, ranks=one) for one in (None, ranks))
        for mine, ours in zip(alone.curve(), together.curve(), strict=True):
            assert ours == pytest.approx(mine, rel=1e-6), "rounded bases absorb the order of the sums they are made of"
        design = alone.choose(3.0 * experts.elements)
        one, report = quantize_layer(experts, routed, design, settings)
        two, shared = quantize_layer(experts, routed, design, settings, ranks=ranks)
        assert ranks.everyones(two.checksums.tolist())[0] == two.checksums.tolist(), "every process has the same"
        assert torch.equal(one.layout, two.layout)
        for side in ("in", "out"):
            ours, theirs = (getattr(packed, f"codes_{side}") for packed in (two, one))
            assert float((ours != theirs).float().mean()) < 4e-3, "a byte holds up to eight codes"
        assert shared.relative_output_error == pytest.approx(report.relative_output_error, rel=1e-2)
        assert shared.width_counts == report.width_counts


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
    ("body", "codes"),
    [(_exchange, [0, 0]), (_quantizes, [0, 0]), (_other_dies, [0, -9]), (_first_dies, [-9, 0])],
    ids=lambda b: str(b)[:20],
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
