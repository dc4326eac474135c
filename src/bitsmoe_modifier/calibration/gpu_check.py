"""The Triton kernels against plain PyTorch on the GPU of a run, before the run relies on them.

What passes in an interpreter and compiles for a GPU may still fail, or compute otherwise, on one that nobody had yet. A
quantization takes hours, this look some seconds; where a kernel is not to be trusted, the run goes on in PyTorch.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from loguru import logger

from ..devices import kernels_wanted
from ..method import rounding
from ..method.coders import ColumnCoder
from ..method.trellis import NORMAL_STEP, ChainTrellis, GroupTrellis
from ..method.viterbi import PRELUDE, Sequences, encode_plain
from ..runtime.experts import BitsMoEExperts
from ..storage.planes import WIDTHS
from ..storage.steps import storable_steps
from ..storage.trellis import CODES, sequence_order, trellis_values

#: How far a kernel's loss may lie from PyTorch's, relative: sums have another order, and what lies next to a tie falls
#: on either side.
_LOSS = 1e-2
#: The same of a block of columns in trellis codes: where a tie falls on the other side, all columns after it differ.
_BLOCK_LOSS = 0.1
#: How far products of bfloat16 may lie apart, of their own size.
_PRODUCT = 5e-2
_SEQUENCES, _LENGTH, _COLUMNS = 8, 128, 16
#: Tokens of the first layer that is packed, which both paths are given.
_TOKENS = 64


def check_rounding(device: torch.device | str) -> bool:
    """Whether the kernels that quantize are trusted on a GPU; where not, a warning says why, and none is used in this
    process from here on.

    Random weights are rounded and encoded by both; what they lose must be the same.
    """
    checks: dict[str, tuple[Callable[[torch.device | str], float], float]] = {
        "rounding": (_rounded, _LOSS),
        "trellis encoder": (_encoded, _LOSS),
        "trellis rounding": (_rounded_in_trellis, _BLOCK_LOSS),
    }
    trusted = all(_trusted(name, partial(check, device), limit) for name, (check, limit) in checks.items())
    if not trusted:
        os.environ["BITSMOE_FORCE_PLAIN"] = "1"
    return trusted


def check_product(experts: BitsMoEExperts, inputs: Sequence[torch.Tensor]) -> bool:
    """The same of the kernels that multiply by packed experts, through which the calibration rows go; of those alone.

    Args:
        experts: a layer, placed.
        inputs: its inputs, expert ids and their weights for some tokens; the first ones are taken.
    """
    some = [one[:_TOKENS] for one in inputs]
    if not kernels_wanted(some[0]) or not experts.kernels_trusted:
        return experts.kernels_trusted

    def difference() -> float:
        found, plain = (product(*some).float() for product in (experts, experts.forward_plain))
        return float((found - plain).norm() / plain.norm().clamp_min(1e-30))

    # the encoder goes on, without which trellis codes take hours
    BitsMoEExperts.kernels_trusted = _trusted("product", difference, _PRODUCT)
    return BitsMoEExperts.kernels_trusted


def _trusted(name: str, difference: Callable[[], float], limit: float) -> bool:
    try:
        found = difference()
        trouble = "" if found <= limit else f"it differs from PyTorch by {found:.3g}, {limit} is allowed"
    except Exception as error:  # noqa: BLE001  whatever a compiler or a driver has to say: the run can do without
        trouble = f"{type(error).__name__}: {error}"
    if trouble:
        logger.warning(
            f"plain PyTorch is used, which is slower: on this GPU the {name} kernel is not to be trusted ({trouble}); "
            "`python benchmarks/gpu.py --stage check --out DIR` says more"
        )
    return not trouble


def _rounded(device: torch.device | str) -> float:
    """Relative difference of what rounding a block of columns loses."""
    from bitsmoe_kernels.rounding import round_block

    generator = torch.Generator("cpu").manual_seed(0)
    shape = len(WIDTHS), _COLUMNS, _LENGTH
    weights, response = (
        torch.randn(*size, generator=generator, device="cpu") for size in (shape, (*shape[:2], _COLUMNS))
    )
    level = 2.0 ** torch.tensor(WIDTHS, device="cpu")[:, None, None].expand(-1, _COLUMNS, 1) - 1
    step = storable_steps(2.0 / (level + 1))
    importance = torch.rand(shape[0], _LENGTH, generator=generator, device="cpu")
    block = weights.clone(), 0.1 * response, weights, step, level, importance
    found = round_block(*(one.to(device) for one in block))[2].cpu()
    plain = rounding.round_block(*block)[2]
    return _apart(found, plain)


def _encoded(device: torch.device | str) -> float:
    """The largest relative difference, over bit-widths, of what encoding sequences loses."""
    from bitsmoe_kernels.trellis_encoder import encode

    generator, apart = torch.Generator("cpu").manual_seed(0), []
    for width in CODES:
        target = torch.randn(_SEQUENCES, _LENGTH, generator=generator, device="cpu") / NORMAL_STEP[width]
        gain = torch.ones_like(target)
        order = sequence_order(_LENGTH, "cpu")
        rows = Sequences.rows(torch.full((_SEQUENCES,), width, device="cpu"), order)
        windows = encode(target.to(device), gain.to(device), rows, PRELUDE).cpu(), encode_plain(target, gain, rows)
        apart.append(_apart(*(target - trellis_values(one, width) for one in windows)))
    return _largest(apart)


def _rounded_in_trellis(device: torch.device | str) -> float:
    """The largest relative difference, over bit-widths, of what rounding a block of columns loses: of gate and up, anew
    and from windows, and of down."""
    generator, widths = torch.Generator("cpu").manual_seed(0), torch.tensor(list(CODES), device="cpu")
    count, columns, length = len(widths), _COLUMNS // 4, _LENGTH // 2
    weights, response = (
        torch.randn(count, columns, size, generator=generator, device="cpu") for size in (length, columns)
    )
    importance = torch.rand(count, length, generator=generator, device="cpu") + 0.1
    level = 2.0 ** widths[:, None, None].expand(-1, columns, 1) - 1
    normal = torch.tensor([NORMAL_STEP[width] for width in CODES], device="cpu")[:, None, None]
    step = storable_steps(normal).expand(-1, columns, -1)

    def coder(side: str, where: torch.device | str) -> ColumnCoder:
        if side == "in":
            return GroupTrellis()
        return ChainTrellis(widths[:, None].to(torch.uint8), 1, None, torch.ones(length, device=where), length)

    def apart(side: str, step: torch.Tensor, weight: torch.Tensor | None, codes: torch.Tensor | None) -> list[float]:
        block = weights, 0.1 * response, weights, step, level
        plain = rounding.round_block(weights.clone(), *block[1:], weight, codes, coder(side, "cpu"))[2]
        after = [one if one is None else one.to(device) for one in (weight, codes)]
        found = coder(side, device).block(*(one.to(device) for one in block), *after)[2].cpu()
        return [_apart(*both) for both in zip(found, plain, strict=True)]

    windows = torch.randint(256, weights.shape, generator=generator, device="cpu").to(torch.float32)
    differences = apart("out", step.expand_as(weights).contiguous(), None, None)
    return _largest(differences + apart("in", step, importance, None) + apart("in", step, importance, windows))


def _largest(differences: list[float]) -> float:
    """NaN where one is."""
    return float(torch.tensor(differences, device="cpu").max())


def _apart(found: torch.Tensor, plain: torch.Tensor) -> float:
    """Relative difference of two losses, summed squares; NaN where there is one."""
    one, two = (float(errors.double().square().sum()) for errors in (found, plain))
    return abs(one - two) / two
