"""The encoder of trellis codes: optimal where that can be checked, and the same in C++ as in PyTorch."""

import itertools

import pytest
import torch

from bitsmoe_modifier.method import native_viterbi, viterbi
from bitsmoe_modifier.method.trellis import NORMAL_STEP
from bitsmoe_modifier.method.viterbi import Sequences, encode, encode_plain
from bitsmoe_modifier.storage.trellis import CODES, pack_windows, sequence_order, trellis_values, window_values
from trellis_reader import VALUES

#: Mean squared error of the mid-rise grid on normally distributed weights, at its best step (method.md section 5).
SCALAR = {1: 0.3634, 2: 0.1188, 3: 0.0374, 4: 0.0115, 6: 0.00104, 8: 8e-5}


def cost(target: torch.Tensor, gain: torch.Tensor, windows: torch.Tensor, width: int) -> torch.Tensor:
    """Of every row, float64."""
    return (target.double() - gain.double() * trellis_values(windows, width).double()).square().sum(1)


def drawn(count: int, length: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets in units of the step, and gains."""
    gen = torch.Generator().manual_seed(seed)
    gain = torch.rand(count, length, generator=gen) + 0.3
    return gain * torch.randn(count, length, generator=gen) / NORMAL_STEP[width], gain


def rows(count: int, length: int, width: int) -> Sequences:
    return Sequences.rows(torch.full((count,), width), torch.arange(length))


@pytest.mark.parametrize(("width", "length"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (8, 2)])
def test_given_the_bits_that_wrap_no_sequence_is_better(width: int, length: int) -> None:
    """Against every stream of some 2**12 (8 bits: 2**16), one weight at a time by the reader's own values."""
    target, gain = drawn(3, length, width)
    windows = encode_plain(target, gain, rows(3, length, width))
    bits, shared = width * length, (1 << (8 - width)) - 1
    streams = torch.arange(1 << bits)
    circular = streams
    while bits < width * length + 8:  # sequences shorter than a window hold bits several times
        circular, bits = circular | streams << bits, bits + width * length
    every = torch.stack([circular >> width * t & 255 for t in range(length)], 1)
    values = torch.tensor(VALUES[width], dtype=torch.float64)[every]
    found = cost(target, gain, windows, width)
    for u, g, got, own in zip(target.double(), gain.double(), windows, found, strict=True):
        costs = (u - g * values).square().sum(1)
        alike = every[:, 0] & shared == int(got[0]) & shared
        assert float(own) == pytest.approx(float(costs[alike].min()), rel=1e-6)


@pytest.mark.parametrize("width", CODES)
@pytest.mark.parametrize("length", [16, 48, 128])
def test_sequences_close(width: int, length: int) -> None:
    target, gain = drawn(6, length, width)
    windows = encode(target, gain, Sequences.rows(torch.full((6,), width), sequence_order(length)))
    pack_windows(windows.T[None], width)  # raises where neighbours, the last and the first too, disagree


@pytest.mark.parametrize("width", CODES)
def test_errors_of_normal_weights(width: int) -> None:
    """Below the grid's, at the length of a group, by what trellis codes promise."""
    w = torch.randn(256, 128, generator=torch.Generator().manual_seed(5))
    windows = encode(w / NORMAL_STEP[width], torch.ones_like(w), rows(256, 128, width))
    error = float((w - NORMAL_STEP[width] * trellis_values(windows, width)).square().mean())
    assert error < {1: 0.82, 2: 0.67, 3: 0.58, 4: 0.53, 6: 0.45, 8: 0.75}[width] * SCALAR[width]


def scattered(seed: int) -> tuple[torch.Tensor, torch.Tensor, Sequences]:
    """Sequences of all widths and many lengths, anywhere in a tensor with gaps."""
    gen = torch.Generator().manual_seed(seed)
    kinds = list(itertools.product(CODES, (16, 32, 80, 128))) * 3
    lengths = torch.tensor([length for _, length in kinds])
    begin = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    total = int(begin[-1])
    place = torch.randperm(total + 50, generator=gen)[:total]
    target, gain = (torch.randn(total + 50, generator=gen) for _ in range(2))
    return target, gain.abs(), Sequences(begin, place, torch.tensor([w for w, _ in kinds], dtype=torch.int32))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_costs_what_the_oracle_costs(seed: int, threads: int) -> None:
    library = native_viterbi.library()
    if library is None:
        pytest.skip("no C++ compiler here")
    target, gain, sequences = scattered(seed)
    torch.set_num_threads(threads)
    try:
        got = encode(target, gain, sequences)
    finally:
        torch.set_num_threads(1)
    expected = encode_plain(target, gain, sequences)
    for s, width in enumerate(sequences.width.tolist()):
        place = sequences.place[sequences.begin[s] : sequences.begin[s + 1]]
        own, best = (cost(target[None, place], gain[None, place], w[None, place], width) for w in (got, expected))
        # what the lowest bits of a cost lose to the number of its branch
        assert float(own) == pytest.approx(float(best), rel=1e-4)
    outside = torch.ones(len(target), dtype=torch.bool).index_fill_(0, sequences.place, False)
    assert not bool(got[outside].any())


def test_without_a_compiler_the_oracle_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_viterbi, "library", lambda: None)
    target, gain, sequences = scattered(0)
    assert torch.equal(encode(target, gain, sequences), encode_plain(target, gain, sequences))


def test_heavy_weights_come_closer() -> None:
    target, gain = drawn(64, 128, 2)
    heavy = gain.clone()
    heavy[:, ::4] *= 5
    lost = []
    for g in (gain, heavy):
        w = target / gain
        windows = encode(g * w, g, rows(64, 128, 2))
        lost.append(float((w - trellis_values(windows, 2))[:, ::4].square().mean()))
    assert lost[1] < 0.6 * lost[0]


def test_the_compiled_encoder_believes_nothing() -> None:
    library = native_viterbi.library()
    if library is None:
        pytest.skip("no C++ compiler here")
    target, gain = drawn(2, 16, 2)
    good = rows(2, 16, 2)
    for bad, message in (
        (Sequences(good.begin, good.place + 1, good.width), "outside"),
        (Sequences(good.begin[:-1], good.place, good.width), "belong together"),
        (Sequences(good.begin, good.place, good.width + 3), "belong together"),
        (Sequences(good.begin, good.place.int(), good.width), "int64 places"),
    ):
        with pytest.raises(ValueError, match=message):
            native_viterbi.encode(library, target, gain, bad.begin, bad.place, bad.width, viterbi.PRELUDE)
    with pytest.raises(ValueError, match="one shape"):
        native_viterbi.encode(library, target, gain[:1], good.begin, good.place, good.width, viterbi.PRELUDE)


def test_window_values_serve_any_device_string() -> None:
    assert torch.equal(window_values(2), window_values(2, "cpu"))
