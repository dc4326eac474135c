"""Which device a command computes on.

llm-compressor takes the first accelerator that it finds, whatever was asked for, so the others are hidden from it. CUDA
looks for its devices once per process: what is hidden stays so until the process ends, and what it has found cannot be
hidden any more.
"""

import os

import torch

from .. import messages
from ..errors import BitsMoEError

#: the device that this process has hidden all others for, by the name it had before; "" where none were hidden
_hidden_for = ""
_AFRESH = "start a new process for it (in a notebook: restart the kernel)"


def resolve_device(device: str) -> str:
    """``auto`` is CUDA where there is one; a device for which this process has hidden the others by its present name.

    Raises:
        BitsMoEError: when torch does not know or have the device, or an earlier run of this process has hidden it.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        if _hidden_for:
            messages.say("note", f"on the CPU: an earlier run of this process has hidden its GPUs; {_AFRESH}")
        return "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type != "cuda":
            torch.empty(0, device=chosen)
            return device
        if _hidden_for and str(chosen) == _hidden_for:
            return "cuda:0"
        if _hidden_for and (_hidden_for == "cpu" or chosen.index is not None):
            raise RuntimeError(f"an earlier run of this process took {_hidden_for} and hid all others; {_AFRESH}")
        if (chosen.index or 0) >= torch.cuda.device_count():  # counts without using CUDA
            raise RuntimeError(f"{torch.cuda.device_count()} CUDA GPUs are here")
    except (RuntimeError, AssertionError) as error:
        raise BitsMoEError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def use_device(device: str) -> torch.device:
    """Hide the other accelerators from llm-compressor.

    To be called before this process has used CUDA. Processes of torchrun, which take a device each, see them all.

    Args:
        device: as `resolve_device` returns it.

    Returns:
        The device by its number from now on.

    Raises:
        BitsMoEError: when this process has used CUDA already, and the device is not the first one.
    """
    global _hidden_for
    chosen = torch.device(device)
    if chosen.type == "cpu":
        if torch.cuda.is_initialized():
            messages.say("note", f"llm-compressor may use the GPU that this process has used before; {_AFRESH}")
        elif not _hidden_for and torch.cuda.device_count():
            _hidden_for = "cpu"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif chosen.type == "cuda" and chosen.index and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if torch.cuda.is_initialized():
            raise BitsMoEError(
                f"--device {device} cannot be used: this process has used CUDA already, and llm-compressor would take "
                f"cuda:0; {_AFRESH}"
            )
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[chosen.index].strip()
        _hidden_for = str(chosen)
        return torch.device("cuda", 0)
    return chosen
