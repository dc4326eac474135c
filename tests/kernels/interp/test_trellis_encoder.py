"""The encoder kernel against Viterbi's algorithm in PyTorch: equal cost, and every sequence closes."""

import itertools

import pytest
import torch
from bitsmoe_kernels.trellis_encoder import encode
from kernel_backend import seeded

from bitsmoe_modifier.method import viterbi
from bitsmoe_modifier.method.trellis import NORMAL_STEP
from bitsmoe_modifier.method.viterbi import PRELUDE, Sequences, encode_plain
from bitsmoe_modifier.storage.trellis import CODES, pack_windows, sequence_order, trellis_values


def cost(target: torch.Tensor, gain: torch.Tensor, windows: torch.Tensor, width: int) -> float:
    return float((target.double() - gain.double() * trellis_values(windows, width).double()).square().sum())


@pytest.mark.parametrize("seed", range(2))
def test_costs_what_the_oracle_costs(seed: int) -> None:
    """Sequences of all widths, shorter and longer than the free run, anywhere in a tensor with gaps."""
    kinds = list(itertools.product(CODES, (16, 32) if seed else (2, 48)))
    lengths = torch.tensor([length for _, length in kinds], device="cpu")
    begin = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    total = int(begin[-1])
    place = torch.randperm(total + 50, device="cpu", generator=torch.Generator().manual_seed(seed))[:total]
    width = torch.tensor([w for w, _ in kinds], dtype=torch.int32, device="cpu")
    sequences = Sequences(begin, place, width)
    target = torch.randn(total + 50, generator=seeded(seed))
    gain = torch.rand(total + 50, generator=seeded(seed)) + 0.3
    got, expected = encode(target, gain, sequences, PRELUDE), encode_plain(target, gain, sequences)
    for s, b in enumerate(width.tolist()):
        own = place[begin[s] : begin[s + 1]].to(target.device)
        found, best = (cost(target[own], gain[own], w[own], b) for w in (got, expected))
        assert found == pytest.approx(best, rel=1e-5)
    outside = torch.ones(len(target), dtype=torch.bool).index_fill_(0, place.to(target.device), False)
    assert not bool(got[outside].any())


@pytest.mark.parametrize("width", CODES)
def test_sequences_close(width: int) -> None:
    gain = torch.rand(2, 32, generator=seeded(width)) + 0.3
    target = gain * torch.randn(2, 32, generator=seeded(1)) / NORMAL_STEP[width]
    rows = Sequences.rows(torch.full((2,), width, device="cpu"), sequence_order(32))
    windows = encode(target, gain, rows, PRELUDE)
    pack_windows(windows.T[None], width)  # raises where neighbours, the last and the first too, disagree


def test_few_sequences_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    target, gain = torch.randn(3, 16, generator=seeded(2)), torch.ones(3, 16)
    rows = Sequences.rows(torch.full((3,), 4, device="cpu"), torch.arange(16, device="cpu"))
    together = encode(target, gain, rows, PRELUDE)
    monkeypatch.setattr("bitsmoe_kernels.trellis_encoder._SCRATCH", 1)
    assert torch.equal(encode(target, gain, rows, PRELUDE), together)


def test_the_quantizer_encodes_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`viterbi.encode` goes to the kernel where kernels run, and to nothing else."""
    monkeypatch.setattr(viterbi, "kernels_wanted", lambda tensor: True)
    monkeypatch.setattr(viterbi.native_viterbi, "library", lambda: pytest.fail("the CPU encodes"))
    target, gain = torch.randn(2, 16, generator=seeded(3)), torch.ones(2, 16)
    rows = Sequences.rows(torch.full((2,), 2, device="cpu"), torch.arange(16, device="cpu"))
    assert torch.equal(viterbi.encode(target, gain, rows), encode(target, gain, rows, PRELUDE))
