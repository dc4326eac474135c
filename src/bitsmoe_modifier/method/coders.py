"""What rounding asks of codes of another family than the grid's."""

from typing import Protocol

import torch


class ColumnCoder(Protocol):
    """Codes of another family than the grid's, a column at a time (`trellis`)."""

    def grid(self, codes: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Values of codes in units of the step; ``level`` broadcasts against them."""
        ...

    def column(
        self,
        target: torch.Tensor,
        step: torch.Tensor,
        level: torch.Tensor,
        row_weight: torch.Tensor | None,
        codes: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, steps and values of one column, as `rounding._round_column` gives them for the grid."""
        ...

    def block(
        self,
        target: torch.Tensor,
        response: torch.Tensor,
        reference: torch.Tensor,
        step: torch.Tensor,
        level: torch.Tensor,
        row_weight: torch.Tensor | None,
        codes: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`rounding.round_block` by a kernel, on a GPU."""
        ...
