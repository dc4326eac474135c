"""A reader of trellis codes, written from docs/format.md alone: one number at a time, and nothing of the product's."""

import numpy as np
import torch

MULTIPLIERS = {1: 123, 2: 69, 3: 95, 4: 81, 6: 95, 8: 1}
ALPHA = {1: 30, 2: -61, 3: -58, 4: -59, 6: -43, 8: 8}
GAMMA = {1: 576, 2: 201, 3: 173, 4: 157, 6: 145, 8: 241}


def value(window: int, width: int) -> float:
    """What a window stands for, in units of the step."""
    r = (2 * (MULTIPLIERS[width] * window % 256) - 255) / 256
    t = float(np.float16(r * r + ALPHA[width] / 256))
    q = float(np.float16(t * t + GAMMA[width] / 256))
    return float(np.float16(r * q))


VALUES = {width: [value(window, width) for window in range(256)] for width in MULTIPLIERS}


def read_tile(data: bytes, width: int, rows: int, columns: int) -> np.ndarray:
    """A tile of sequences along its rows, float32 ``[rows, columns]`` in units of the step."""
    tile = np.zeros((rows, columns), dtype=np.float32)
    bits = rows * width
    size = 2 * bits // 8
    for pair in range(columns // 2):
        words = np.frombuffer(data[pair * size : (pair + 1) * size], dtype="<u4")
        for odd in range(2):
            stream = 0
            for number, word in enumerate(words.tolist()):
                stream |= (word >> 16 * odd & 0xFFFF) << 16 * number
            stream |= (stream & 0xFF) << bits  # it is circular
            for position in range(rows):
                row = position % (rows // 8) * 8 + position // (rows // 8)
                tile[row, 2 * pair + odd] = VALUES[width][stream >> width * position & 0xFF]
    return tile


def chains(widths: list[int], stripes: int, block_size: int) -> list[list[int]]:
    """Units of every chain of a down matrix, in the order of the payload."""
    found = []
    for width in (8, 6, 4, 3, 2, 1):
        for stripe in range(stripes):
            left = [u for u in range(stripe, len(widths), stripes) if widths[u] == width]
            count = -(-len(left) // max(1, 128 // block_size))
            while left:
                take = -(-len(left) // count)
                found.append(left[:take])
                left, count = left[take:], count - 1
    return found


def read_steps(stored: torch.Tensor) -> np.ndarray:
    """Steps: (1 + (c mod 8) / 8) 2^(c // 8 - 23) of a byte c."""
    code = stored.numpy()
    return np.ldexp(1 + (code % 8) / 8, code.astype(int) // 8 - 23).astype(np.float32)


def read_factors(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[E, 2I, R]`` and F ``[E, R', I]``, float32, of a layer of trellis codes."""
    version, experts, _, length, rank_in, rank_out, bs, gs, _, _, _, _, _, codes, stripes, _ = tensors[
        "layout"
    ].tolist()
    assert (version, codes) == (2, 1)
    groups = length // gs
    a = np.zeros((experts, 2, length, rank_in), dtype=np.float32)
    data, steps, at, step_at = tensors["codes_in"].numpy().tobytes(), read_steps(tensors["steps_in"]), 0, 0
    for e in range(experts):
        for half in range(2):
            widths = tensors["widths_in"][e, half].tolist()
            for g in range(groups):
                for unit in sorted(range(len(widths)), key=lambda u: (-widths[u], u)):
                    if not widths[unit]:
                        continue
                    size = widths[unit] * bs * gs // 8
                    tile = read_tile(data[at : at + size], widths[unit], gs, bs)
                    a[e, half, g * gs : g * gs + gs, unit * bs : unit * bs + bs] = tile * steps[step_at : step_at + bs]
                    at, step_at = at + size, step_at + bs
    assert (at, step_at) == (len(data), len(steps))
    f = np.zeros((experts, rank_out, length), dtype=np.float32)
    data, steps, at, step_at = tensors["codes_out"].numpy().tobytes(), read_steps(tensors["steps_out"]), 0, 0
    for e in range(experts):
        widths = tensors["widths_out"][e].tolist()
        for units in chains(widths, stripes, bs):
            width, rows = widths[units[0]], len(units) * bs
            for g in range(groups):
                size = width * rows * gs // 8
                tile = read_tile(data[at : at + size], width, rows, gs)
                for number, unit in enumerate(units):
                    own = tile[number * bs : (number + 1) * bs]
                    place = step_at + (number * groups + g) * bs
                    scaled = own * steps[place : place + bs, None]
                    f[e, unit * bs : unit * bs + bs, g * gs : g * gs + gs] = scaled
                at += size
            step_at += len(units) * groups * bs
    assert (at, step_at) == (len(data), len(steps))
    return torch.from_numpy(a).flatten(1, 2), torch.from_numpy(f)
