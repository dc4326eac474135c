"""The decoding assembly, emulated instruction by instruction on every byte: it needs a GPU to run, not to be right."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from bitsmoe_kernels import digits

CASES = [(f, j) for f in (4, 2, 1) for j in range(8 // f)]


def halves(registers: np.ndarray, bf16: bool) -> np.ndarray:
    """uint32 ``[n]`` as the float64 values of their two half-precision numbers ``[n, 2]``."""
    words = np.ascontiguousarray(registers.astype(np.uint32)).view(np.int16).reshape(-1, 2)
    return torch.from_numpy(words).view(torch.bfloat16 if bf16 else torch.float16).to(torch.float64).numpy()


def emulate(program: str, inputs: np.ndarray, bf16: bool) -> list[np.ndarray]:
    """Run the instructions that `digits._splice` uses on uint32 inputs; the outputs as halves, in order."""
    registers: dict[str, np.ndarray] = {"$1": inputs, "$2": inputs}
    outputs: dict[str, np.ndarray] = {}

    def value(text: str) -> np.ndarray:
        text = text.strip()
        if text.startswith("{"):  # a 16-bit register in the low half
            text = text.strip("{}").split(",")[0].strip()
        return registers[text] if text in registers else np.full_like(inputs, int(text, 0))

    for line in program.strip("{} ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, rest = line.strip().split(" ", 1)
        target, *arguments = [a.strip() for a in re.split(r",(?![^{]*\})", rest)]
        a = [value(argument) for argument in arguments]
        if name == "mov.b32":
            result = a[0]
        elif name == "prmt.b32":
            bytes_ = [(a[i // 4] >> (8 * (i % 4))) & 0xFF for i in range(8)]
            selector = int(arguments[2], 0)
            result = sum(bytes_[selector >> (4 * i) & 7] << (8 * i) for i in range(4))
        elif name in ("shl.b32", "shr.b32"):
            result = (a[0] << a[1]) & 0xFFFFFFFF if name == "shl.b32" else a[0] >> a[1]
        elif name == "lop3.b32":
            assert arguments[3] == "0xea"
            result = (a[0] & a[1]) | a[2]
        else:
            assert name == ("fma.rn.bf16x2" if bf16 else "fma.rn.f16x2")
            x, y, z = (halves(v, bf16) for v in a)
            exact = x * y + z
            kind = torch.bfloat16 if bf16 else torch.float16
            assert (torch.from_numpy(exact).to(kind).to(torch.float64).numpy() == exact).all(), "the result is rounded"
            outputs[target] = exact
            continue
        registers[target] = result
    return [outputs[name] for name in sorted(outputs)]


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp16"])
@pytest.mark.parametrize("pack", [2, 4])
@pytest.mark.parametrize(("f", "j"), CASES, ids=lambda v: str(v))
def test_digits_are_exact_and_in_their_order(f, j, pack, bf16):
    g = np.random.default_rng(0)
    bytes_ = np.stack([g.permutation(256) for _ in range(pack)], 1).astype(np.uint64)  # every byte in every place
    words = sum(bytes_[:, i] << np.uint64(8 * i) for i in range(pack)).astype(np.int64)
    got = np.concatenate(emulate(digits._splice.fn(f, j, bf16, pack), words, bf16), 1)
    top = (1 << f) - 1
    if pack == 4:
        bytes_ = bytes_[:, [0, 2, 1, 3]]  # the order of `digits.swapped`
    want = 2.0 * ((bytes_.astype(np.int64) >> (f * j)) & top) - top
    assert (got == want).all()
