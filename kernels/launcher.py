"""Starting a kernel: the one place that gives launches their options, and where `machine_code` takes them from, so that
what the compile gates look at is what runs.
"""

from collections.abc import Sequence

import torch
import triton

from .launch import FUSION, Launch, on


def options(
    kernel: triton.JITFunction, how: Launch, fusion: dict[str, bool] = FUSION
) -> tuple[dict[str, object], dict[str, object]]:
    """(constants, compiler options) that a launch of ``kernel`` adds to its own: STAGES, PACK and COLUMNS go to
    kernels that have such parameters."""
    constants = {"STAGES": how.stages, "PACK": how.pack, "COLUMNS": how.columns}
    chosen: dict[str, object] = {"num_warps": how.warps, "num_stages": max(1, how.stages), **fusion}
    if how.registers is not None:
        chosen["maxnreg"] = how.registers
    return {name: value for name, value in constants.items() if name in kernel.arg_names}, chosen


def run(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    arguments: Sequence[object],
    how: Launch,
    device: torch.device,
    constants: dict[str, object],
    fusion: dict[str, bool] = FUSION,
) -> None:
    """Launch ``kernel`` on the tensors' own device.

    Args:
        kernel: to run.
        grid: programs.
        arguments: in the kernel's order, up to its constants.
        how: warps, stages, packing, registers.
        device: of the tensors.
        constants: by name; those that the kernel does not have are left out, since the kernels of one operation for the
            two families of codes differ in a few.
        fusion: `launch.FUSION` or `launch.NO_FUSION`.
    """
    fixed, chosen = options(kernel, how, fusion)
    own = {name: value for name, value in constants.items() if name in kernel.arg_names}
    with on(device):
        kernel[grid](*arguments, **own, **fixed, **chosen)
