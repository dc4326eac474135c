"""The unquantized model's predictions on the evaluation rows, kept on disk: computed once, read by every run.

Log-probabilities are too large to keep (100,000 tokens of a 150,000-word vocabulary: 60 GB in float32), and computing
them beside every run would need both models in memory at once. What is kept is the input of the model's last linear
layer, H numbers a token instead of V, together with that layer: the reference's logits are then one matrix product
away, exactly as the model computed them. Where a model does more after its last layer (soft-capping, scaling), this is
noticed on the first rows and the logits themselves are kept.
"""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from ..errors import BitsMoEError

_ROOM = "make room, name another folder in TMPDIR, or measure fewer --eval-rows"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: filesystems that cannot be asked
_NOT_HERE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)
_STATES, _HEAD, _META = "states.bin", "head.safetensors", "states.json"


@dataclass(frozen=True)
class Reference:
    """Recorded predictions.

    Attributes:
        states: ``[rows, T − 1, D]``, memory-mapped: inputs of the last layer (D = H), or logits (D = V).
        weight, bias: the last layer, ``[V, H]`` and ``[V]``; None where the states are the logits, or without a bias.
    """

    states: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.states.shape[-1] if self.weight is None else self.weight.shape[0]

    def logits(self, rows: slice, positions: slice) -> torch.Tensor:
        """Logits ``[n, V]`` at the given positions of the rows, flattened: ``positions`` counts through rows."""
        states = self.states[rows].flatten(0, 1)[positions]
        if self.weight is None:
            return states
        return nn.functional.linear(states.to(self.weight.device), self.weight, self.bias)

    def to(self, device: torch.device) -> "Reference":
        """The same with the last layer on ``device``."""
        move = [None if t is None else t.to(device) for t in (self.weight, self.bias)]
        return Reference(self.states, *move)


@torch.no_grad()
def record(model: Any, rows: torch.Tensor, batch_size: int, folder: Path) -> Reference:
    """Run the unquantized model over the rows and write what it computed to ``folder``.

    Args:
        model: a causal language model of transformers.
        rows: int64 ``[n, T]``.
        batch_size: rows per forward pass.
        folder: an existing, empty folder.

    Raises:
        BitsMoEError: when the folder's disk has no room for it.

    Returns:
        The recorded predictions of positions 0 … T − 2 (the last one has no next token to compare with).
    """
    head = model.get_output_embeddings()
    inputs, logits = _forward(model, head, rows[:1].to(model.device))
    exact = isinstance(head, nn.Linear) and _is_last(head, inputs, logits)
    sample = inputs if exact else logits
    if exact:  # before the rows are run: the disk may be too small for it
        layer = {"weight": head.weight, "bias": head.bias}
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in layer.items() if v is not None}, folder / _HEAD)
        except SafetensorError as error:
            raise BitsMoEError(f"{folder / _HEAD} could not be written ({error}); {_ROOM}") from None
    states = _mapped(folder, (rows.shape[0], rows.shape[1] - 1, sample.shape[-1]), sample.dtype, create=True)
    with tqdm(total=len(rows), desc="Reference", unit="row") as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size].to(model.device)
            inputs, logits = _forward(model, head, batch)
            states[start : start + batch_size] = (inputs if exact else logits)[:, :-1].cpu()
            bar.update(len(batch))
    meta = {"shape": list(states.shape), "dtype": str(states.dtype).removeprefix("torch.")}
    (folder / _META).write_text(json.dumps(meta), encoding="utf-8")
    return load(folder)


def load(folder: Path) -> Reference:
    """Open what `record` wrote; the states are mapped, not read."""
    meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    states = _mapped(folder, tuple(meta["shape"]), getattr(torch, meta["dtype"]))
    layer = load_file(folder / _HEAD) if (folder / _HEAD).exists() else {}
    return Reference(states, layer.get("weight"), layer.get("bias"))


def _mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype, create: bool = False) -> torch.Tensor:
    size = torch.Size(shape).numel()
    if create:
        _reserve(folder / _STATES, size * dtype.itemsize)
    return torch.from_file(str(folder / _STATES), shared=create, size=size, dtype=dtype).view(shape)


def _reserve(file: Path, size: int) -> None:
    """Take the room that a mapped file is going to need: a disk that is full kills a process that writes to its memory.

    Raises:
        BitsMoEError: when there is no such room.
    """
    with file.open("wb") as stream:
        if not hasattr(os, "posix_fallocate"):  # macOS
            return
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise BitsMoEError(
                    f"the unquantized model's predictions take {size / 1e6:.1f} MB, for which {file.parent} has no "
                    f"room ({error.strerror}); {_ROOM}"
                ) from None
            if error.errno not in _NOT_HERE:
                raise


def _forward(model: Any, head: nn.Module | None, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(input of ``head`` ``[B, T, H]``, logits ``[B, T, V]``) of one batch; without a head, the logits twice."""
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0])) if head is not None else None
    try:
        logits = model(input_ids=batch, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    return (seen[-1] if seen else logits), logits


def _is_last(head: nn.Linear, inputs: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether the model's logits are what its last linear layer gives, nothing more."""
    if inputs.shape[:-1] != logits.shape[:-1]:
        return False
    own = head(inputs).float()
    # the same product of the same numbers: a few roundings at most
    tolerance = 8 * torch.finfo(logits.dtype).eps * own.abs().max()
    return bool((own - logits.float()).abs().max() <= tolerance)
