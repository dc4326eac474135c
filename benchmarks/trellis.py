"""Trellis codes on normally distributed weights: error by width, code function and length, and the encoder's time.

    python benchmarks/trellis.py

Mean squared error relative to the weights' variance, sequences of 128 unless said otherwise, beside the mid-rise grid
of scalar codes (at each sequence's best step, which flatters it at many bits) and the limit 4**-b. The code functions
that were weighed against the format's own: a table that was trained on the encoder's choices (Lloyd's iteration), which
has no closed form; the quantiles of the normal distribution, a table too; and the polynomial without its fifth power,
half an instruction a weight cheaper on a GPU. Last, windows of other lengths than the format's 8 bits, by a plain
Viterbi of any length and trained tables, on fewer sequences.
"""

import argparse
import time
from collections.abc import Callable

import torch

from bitsmoe_modifier.method import native_viterbi, viterbi
from bitsmoe_modifier.method.rounding import search_step
from bitsmoe_modifier.method.trellis import NORMAL_STEP
from bitsmoe_modifier.method.viterbi import Sequences
from bitsmoe_modifier.storage.trellis import CODES, window_values

#: Step and coefficient of r³ of the best cubic, by width.
_CUBIC = {
    1: (1.237, 0.435),
    2: (1.149, 0.98),
    3: (1.206, 1.213),
    4: (1.313, 1.332),
    6: (1.521, 1.538),
    8: (2.31, 0.935),
}


def encoded(w: torch.Tensor, width: int, values: torch.Tensor) -> torch.Tensor:
    """Windows of rows of ``w`` by a table of values, by the compiled encoder."""
    library = native_viterbi.library()
    if library is None:
        raise SystemExit("this benchmark needs a C++ compiler")
    tables = torch.zeros(9, 256)
    tables[width] = values
    rows = Sequences.rows(torch.full((len(w),), width), torch.arange(w.shape[1]))
    own = native_viterbi._tables
    native_viterbi._tables = lambda: tables
    try:
        places = rows.begin, rows.place, rows.width
        return native_viterbi.encode(library, w, torch.ones_like(w), *places, viterbi.PRELUDE)
    finally:
        native_viterbi._tables = own


def error(w: torch.Tensor, width: int, values: torch.Tensor) -> float:
    """Mean squared error."""
    return float((w - values[encoded(w, width, values).long()]).square().mean())


def permuted(width: int, value: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A function of r at every window."""
    r = (2 * (CODES[width][0] * torch.arange(256) % 256) - 255) / 256
    return value(r.double()).float()


def trained(w: torch.Tensor, width: int, values: torch.Tensor, rounds: int = 8) -> torch.Tensor:
    """Values that are the means of the weights that chose them."""
    for _ in range(rounds):
        windows = encoded(w, width, values).flatten().long()
        count = torch.bincount(windows, minlength=256)
        values = (torch.bincount(windows, w.flatten(), 256) + 3 * values) / (count + 3)
    return values.float()


def viterbi_of(w: torch.Tensor, width: int, values: torch.Tensor) -> torch.Tensor:
    """Windows int64 ``[S, T]`` of rows of ``w``, by a table of any power of two values.

    Open at both ends: closing a sequence costs little, and as much at any length of window.
    """
    costs, branches = torch.zeros(len(w), len(values) >> width), []
    for u in w.T:
        reached = costs.repeat(1, 1 << width) + (u[:, None] - values).square()
        costs, branch = reached.view(len(costs), -1, 1 << width).min(2)
        branches.append(branch)
    state, windows = costs.argmin(1), []
    for branch in reversed(branches):
        window = state << width | branch.gather(1, state[:, None])[:, 0]
        windows.append(window)
        state = window % costs.shape[1]
    return torch.stack(windows[::-1], 1)


def error_of_length(w: torch.Tensor, training: torch.Tensor, width: int, length: int, rounds: int = 8) -> float:
    """Mean squared error with windows of ``length`` bits and a table trained on other weights (Lloyd's iteration).

    It begins with the normal distribution's quantiles, shuffled.
    """
    count = 1 << length
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(length))
    values = torch.distributions.Normal(0.0, 1.0).icdf((shuffled + 0.5) / count)
    for _ in range(rounds):
        windows = viterbi_of(training, width, values).flatten()
        own = torch.bincount(windows, minlength=count)
        values = (torch.bincount(windows, training.flatten(), count) + 3 * values) / (own + 3)
    return float((w - values[viterbi_of(w, width, values)]).square().mean())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=2048)
    count = parser.parse_args().sequences
    gen = torch.Generator().manual_seed(1)
    w, training = (torch.randn(count, 128, generator=gen) for _ in range(2))
    normal = torch.distributions.Normal(0.0, 1.0)
    print("| bits | limit | scalar | format | trained table | quantiles | cubic | ns per weight, one thread |")
    print("|---|---|---|---|---|---|---|---|")
    torch.set_num_threads(1)
    for width in CODES:
        own = NORMAL_STEP[width] * window_values(width)
        scalar = float(search_step(w[:256].T[None], torch.ones(1, 128, 1), width, 32)[1].sum() / w[:256].numel())
        quantiles = permuted(width, lambda r: normal.icdf((r + 1) / 2))
        step, cubic = _CUBIC[width]
        third = permuted(width, lambda r, s=step, c=cubic: s * r * (1 + c * r * r))
        found = error(w, width, own)
        started = time.process_time()
        encoded(w, width, own)
        taken = (time.process_time() - started) / w.numel() * 1e9
        others = [error(w, width, values) for values in (trained(training, width, own), quantiles, third)]
        cells = [f"{4.0**-width:.5f}", f"{scalar:.5f}", f"{found:.5f}", *(f"{e:.5f}" for e in others), f"{taken:.0f}"]
        print(f"| {width} | {' | '.join(cells)} |", flush=True)
    print("\nBy length of the sequence:\n")
    lengths = (16, 32, 64, 128)
    print(f"| bits | {' | '.join(map(str, lengths))} |\n|---|---|---|---|---|")
    for width in CODES:
        own = NORMAL_STEP[width] * window_values(width)
        errors = [error(w.flatten()[: count * n].view(count, n).contiguous(), width, own) for n in lengths]
        print(f"| {width} | {' | '.join(f'{e:.5f}' for e in errors)} |", flush=True)
    print("\nBy bits of a window, trained tables:\n")
    windows = (6, 7, 8, 9, 10)
    print(f"| bits | {' | '.join(map(str, windows))} |\n|---|---|---|---|---|---|")
    some, others = w[: count // 8], training[: count // 4]
    for width in (1, 2, 3, 4):
        errors = [error_of_length(some, others, width, length) for length in windows]
        print(f"| {width} | {' | '.join(f'{e:.5f}' for e in errors)} |", flush=True)


if __name__ == "__main__":
    main()
