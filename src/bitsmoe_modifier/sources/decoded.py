"""A tensor of a source that is stored in low precision: what it stands for, and how to keep it as it is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CheckpointError
from ..storage.shards import Stored


@dataclass(frozen=True)
class AsStored:
    """A module's weight in the form of compressed-tensors that holds exactly what the source stores.

    Attributes:
        leaves: by the names that compressed-tensors gives them, what is stored.
        views: dtypes to read some leaves as, by name.
        group: the config group of such modules, without targets.
    """

    leaves: Mapping[str, Stored]
    group: Mapping[str, Any]
    views: Mapping[str, torch.dtype] = field(default_factory=dict)

    def read(self) -> dict[str, torch.Tensor]:
        """The tensors by name, on the CPU. Powers of two in eight bits become float32 where FP8 weights have them."""
        tensors = {}
        for name, stored in self.leaves.items():
            tensor = stored.read()
            view = self.views.get(name)
            if view is not None:
                tensor = tensor.view(view)
            elif tensor.dtype == torch.float8_e8m0fnu:
                tensor = tensor.to(torch.float32)
            tensors[name] = tensor
        return tensors


@dataclass(frozen=True)
class Decoded(Stored):
    """A tensor that is stored in low precision, read as the tensor that it stands for.

    Attributes:
        parts: what its values are made of.
        decode: from the parts to float32.
        others: stored beside it, of no use to its values.
        as_stored: how to keep it in low precision; None where compressed-tensors has no such form.
    """

    parts: tuple[Stored, ...] = ()
    decode: Callable[..., torch.Tensor] = field(default=torch.Tensor.float)
    others: tuple[Stored, ...] = ()
    as_stored: AsStored | None = None

    def read(
        self, row: int | None = None, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """The decoded tensor, or one row of its first dimension.

        Args:
            row: of a tensor whose parts have the same first dimension, such as fused experts.
            dtype: None for the tensor's own.
            device: to decode on.
        """
        with torch.device("cpu"):
            parts = [part.read(row).to(device) for part in self.parts]
        try:
            return self.decode(*parts).to(dtype or self.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{self.file}: {self.key}: {error}") from None
