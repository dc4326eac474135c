"""Collecting one layer's tensors as vLLM streams them, checking them, and cutting this rank's part (no vLLM).

Files hold a layer's tensors in alphabetical order: the payloads come before the widths that say how to cut them. vLLM's
loader maps the files into memory, so holding a tensor costs address space only; the bytes are read once, by the check,
and a rank copies what is its own. A layer is cut as soon as its last tensor arrives, and only one layer is held.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from ..storage.layout import ExpertsLayout
from ..storage.packed import TENSOR_NAMES, PackedExperts, check_content, check_structure
from ..storage.sharding import shard


@dataclass(frozen=True)
class Part:
    """What one rank holds of a layer, and the sizes that the model says the whole layer has.

    Attributes:
        where: the layer's name, for messages.
        num_experts: E of the whole layer.
        hidden_size: H.
        intermediate_size: I of the whole layer.
        has_bias: whether the model's experts have biases.
        ungated: whether the model's experts have no gate.
        tp_rank: this rank's range of I.
        tp_size: ranges of I.
        experts: ids of this rank's experts; None for all.
    """

    where: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_bias: bool
    ungated: bool = False
    tp_rank: int = 0
    tp_size: int = 1
    experts: tuple[int, ...] | None = None


class LayerLoader:
    """Collects the tensors of one layer by name."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._received: dict[str, torch.Tensor] = {}

    @property
    def empty(self) -> bool:
        """Whether no tensor has arrived."""
        return not self._received

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor from the checkpoint, without copying it.

        Raises:
            CheckpointError: when the name is unknown, or came before.
        """
        if name not in TENSOR_NAMES:
            raise CheckpointError(
                f"{self.part.where}.{name}: packed experts have no such tensor; the checkpoint is damaged, was written "
                "by something else, or its config.json belongs to another one"
            )
        if name in self._received:
            raise CheckpointError(f"{self.part.where}.{name}: is stored twice; fetch the checkpoint again")
        self._received[name] = tensor

    @property
    def complete(self) -> bool:
        """Whether every tensor that the header and the widths call for has arrived, or the header is damaged."""
        header, widths_in, widths_out = (self._received.get(n) for n in ("layout", "widths_in", "widths_out"))
        if header is None or widths_in is None or widths_out is None:
            return False
        try:
            expected = ExpertsLayout.from_tensor(header).shapes(widths_in, widths_out)
        except CheckpointError:
            return True  # `cut` says what is wrong with it, and where
        return expected.keys() <= self._received.keys()

    def cut(self, device: torch.device) -> PackedExperts:
        """Check the layer and copy this rank's part of it to ``device``; what was received is dropped.

        Raises:
            CheckpointError: naming layer and tensor, when one is missing, mis-sized, damaged, or of another model.
        """
        part, tensors = self.part, self._received
        self._received = {}
        layout = check_structure(tensors, part.where)
        for field in ("num_experts", "hidden_size", "intermediate_size", "has_bias", "ungated"):
            stored, expected = getattr(layout, field), int(getattr(part, field))
            if stored != expected:
                raise CheckpointError(
                    f"{part.where}.layout: {field} is {stored}, config.json makes it {expected}; "
                    "they do not belong together"
                )
        packed = PackedExperts(**tensors)
        check_content(packed, part.where)
        try:
            own = shard(packed, part.tp_rank, part.tp_size, part.experts)
        except CheckpointError as error:
            raise CheckpointError(f"{part.where}: {error}") from None
        mapped = {tensor.data_ptr() for tensor in tensors.values()}
        return PackedExperts(**{n: t.to(device, copy=t.data_ptr() in mapped) for n, t in own.items()})


def local_experts(expert_map: Sequence[int] | None) -> tuple[int, ...] | None:
    """Ids of a rank's experts in the order of their local ids, from vLLM's map (global id -> local id, or -1)."""
    if expert_map is None:
        return None
    held = [(local, e) for e, local in enumerate(expert_map) if local >= 0]
    return tuple(e for _, e in sorted(held))
