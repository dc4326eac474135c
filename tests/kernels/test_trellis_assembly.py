"""The decoding assembly of trellis codes, emulated: it needs a GPU to run, not to be right."""

import numpy as np
import pytest

pytest.importorskip("triton")

from bitsmoe_kernels import trellis_codes

from bitsmoe_modifier.storage.trellis import CODES, window_values

SHIFTS = [(b, s) for b in CODES for s in sorted({b * n % 16 for n in range(16)})]


def halves(registers: np.ndarray) -> np.ndarray:
    """uint32 ``[n]`` as the float64 values of their two float16 numbers ``[n, 2]``."""
    return np.ascontiguousarray(registers).view(np.float16).reshape(-1, 2).astype(np.float64)


def rounded(values: np.ndarray) -> np.ndarray:
    """float64 ``[n, 2]`` rounded to float16, as uint32 ``[n]``."""
    return np.ascontiguousarray(values.astype(np.float16)).view(np.uint32).reshape(-1)


def emulate(program: str, word: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Run the instructions of `trellis_codes._assembly` on uint32 inputs."""
    registers = {"$1": word, "$2": following}

    def value(text: str) -> np.ndarray:
        return registers[text] if text in registers else np.full_like(word, int(text, 0))

    for line in program.strip("{} ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, rest = line.strip().split(" ", 1)
        target, *arguments = [a.strip() for a in rest.split(",")]
        a = [value(argument) for argument in arguments]
        if name == "mov.b32":
            result = a[0]
        elif name == "prmt.b32":
            bytes_ = [(a[i // 4] >> (8 * (i % 4))) & 0xFF for i in range(8)]
            result = sum(bytes_[int(arguments[2], 0) >> (4 * i) & 7] << (8 * i) for i in range(4))
        elif name == "shr.b32":
            result = a[0] >> a[1]
        elif name == "and.b32":
            result = a[0] & a[1]
        elif name == "mul.lo.u32":
            result = (a[0].astype(np.uint64) * a[1] & 0xFFFFFFFF).astype(np.uint32)
        elif name == "lop3.b32":
            assert arguments[3] == "0xea"
            result = (a[0] & a[1]) | a[2]
        elif name == "fma.rn.f16x2":
            x, y, z = map(halves, a)
            result = rounded(x * y + z)
        else:
            assert name == "mul.rn.f16x2"
            result = rounded(halves(a[0]) * halves(a[1]))
        registers[target] = result.astype(np.uint32)
    return halves(registers["$0"])


@pytest.mark.parametrize(("width", "shift"), SHIFTS, ids=str)
def test_windows_become_their_values(width: int, shift: int) -> None:
    """Every window in each half, whatever the bits around it are."""
    g = np.random.default_rng(shift)
    count = 4096
    stream = g.integers(0, 1 << 32, (count, 2), dtype=np.uint64)  # the 32 bits of each column
    windows = np.stack([g.permutation(np.tile(np.arange(256), count // 256)) for _ in range(2)], 1).astype(np.uint64)
    stream = stream & ~np.uint64(0xFF << shift) | windows << np.uint64(shift)
    word = (stream[:, 0] & 0xFFFF | (stream[:, 1] & 0xFFFF) << 16).astype(np.uint32)
    following = (stream[:, 0] >> 16 & 0xFFFF | (stream[:, 1] >> 16 & 0xFFFF) << 16).astype(np.uint32)
    found = emulate(trellis_codes._assembly.fn(width, shift), word, following)
    assert (found == window_values(width).double().numpy()[windows.astype(np.int64)]).all()


def test_windows_share_shifted_words() -> None:
    """Of the eight windows of a 2-bit word two go through each shifted word; a move by a byte serves four."""
    moves = [trellis_codes._move.fn(2, shift)[:2] for shift in range(0, 16, 2)]
    assert len(set(moves)) == 4
    assert sum(late for late, _ in moves) == 4
