"""Experts that stay in their source's files, as llm-compressor calibrates experts: in the memory of one of them."""

from collections.abc import Sequence
from typing import Any

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from torch import nn
from torch.nn.functional import linear

from ..errors import RecipeError
from ..loading.claims import matches
from ..method.gating import gating_of
from ..method.layer import DenseExperts
from ..sources.stacks import KEPT_DECODED, StoredStack, Turned, read_parameters, stored_parameters


class _Product(torch.autograd.Function):
    """``x Wᵀ`` with a matrix that is read again in the backward pass, instead of being kept for it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrices: Turned, expert: int) -> torch.Tensor:
        ctx.matrices, ctx.expert = matrices, expert
        return linear(x, matrices.read(expert).to(x))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ ctx.matrices.read(ctx.expert).to(gradient), None, None


class StoredExpert(nn.Module):
    """One expert of `stored_experts`: what llm-compressor's ExpertMLP computes."""

    def __init__(self, owner: LinearExperts2D, number: int) -> None:
        super().__init__()
        self._of = (owner, number)  # a tuple hides the owner from nn.Module, whose child this is

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` to ``[T, H]``."""
        if not len(hidden_states):
            return hidden_states
        owner, number = self._of
        matrices: StoredMatrices = vars(owner)["stored"]
        gate_up, down = matrices.gate_up(hidden_states.device), matrices.down(hidden_states.device)
        biases = matrices.biases(number)
        inner = _Product.apply(hidden_states, gate_up, number)
        inner = inner if biases is None else inner + biases[0].to(inner)
        made: Any = owner
        inner = made._apply_gate(inner) if made.has_gate else made.act_fn(inner)
        outer = _Product.apply(inner, down, number)
        return outer if biases is None else outer + biases[1].to(outer)


class StoredMatrices:
    """The matrices of an experts module of transformers whose parameters are stacks, however it lays them out."""

    def __init__(self, experts: Any) -> None:
        self.experts = experts
        self._stacks = stored_parameters(experts)

    @property
    def stacks(self) -> dict[str, StoredStack]:
        """By the parameter's name."""
        return self._stacks

    def gate_up(self, device: torch.device | str = "cpu") -> Turned:
        """``[E, 2I, H]``, gate rows first; of experts without a gate ``[E, I, H]``."""
        return Turned(self._stacks["gate_up_proj" if self.experts.has_gate else "up_proj"], self._rows, device)

    def down(self, device: torch.device | str = "cpu") -> Turned:
        """``[E, H, I]``."""
        turned = self.experts.is_transposed
        return Turned(self._stacks["down_proj"], lambda m: m.T.contiguous() if turned else m, device)

    def biases(self, expert: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of one expert: gate and up ``[2I]``, down ``[H]``."""
        if not self.experts.has_bias:
            return None
        return self._in_biases()[expert], self.experts.down_proj_bias[expert]

    def dense(self, device: torch.device | str) -> DenseExperts:
        """What the method quantizes, read expert by expert."""
        if not self.experts.has_gate:
            raise RecipeError("experts without a gate are not read from low precision; add them to `ignore`")
        in_bias = out_bias = None
        if self.experts.has_bias:
            in_bias, out_bias = self._in_biases().to(device), self.experts.down_proj_bias.detach().to(device)
        return DenseExperts(self.gate_up(device), self.down(device), gating_of(self.experts), in_bias, out_bias)

    def _in_biases(self) -> torch.Tensor:
        bias = self.experts.gate_up_proj_bias.detach()
        return bias if self.experts.is_concatenated else torch.cat([bias[:, ::2], bias[:, 1::2]], 1)

    def _rows(self, matrix: torch.Tensor) -> torch.Tensor:
        rows = matrix.T if self.experts.is_transposed else matrix
        if self.experts.has_gate and not self.experts.is_concatenated:
            rows = torch.cat([rows[::2], rows[1::2]])
        return rows.contiguous()


def take_apart(experts: Any, kind: type[LinearExperts2D], sizes: Any) -> LinearExperts2D:
    """llm-compressor's form of an experts module whose parameters are stacks, without any weight of theirs.

    Args:
        experts: of transformers.
        kind: the class that llm-compressor has for it.
        sizes: configuration by which that class is built.
    """
    with torch.device("meta"):
        made: Any = kind(sizes)
    for number in range(made.num_experts):
        made[number] = StoredExpert(made, number)
    vars(made)["stored"] = StoredMatrices(experts)  # past nn.Module, which would take the experts for a child
    return made


def is_kept_decoded(module: Any) -> bool:
    """Whether a layer's packed experts are kept decoded while the calibration rows go on through them.

    In the place of experts that were in memory there is room for that; for those of files only where they are small.
    """
    stored = stored_matrices(module)
    if stored is None:
        return True
    hidden, width = stored.down().shape[-2:]
    return (3 if module.has_gate else 2) * module.num_experts * hidden * width <= KEPT_DECODED


def placed_module(module: Any, model: Any) -> Any:
    """A module that is on the devices where what replaces ``module`` shall be: its own, or the model's embedding."""
    return module[0].up_proj if stored_matrices(module) is None else model.get_input_embeddings()


def stored_matrices(module: nn.Module) -> StoredMatrices | None:
    """The matrices of an experts module that stays in files; None of any other."""
    return vars(module).get("stored")


def read_other_experts(model: nn.Module, ours: Sequence[Any]) -> None:
    """Read the experts from the source's files that no BitsMoEModifier is going to quantize.

    Other modifiers work on Linears with weights, and what is left alone is saved with its weights.

    Args:
        model: as it was loaded.
        ours: the BitsMoEModifiers of the run.
    """
    for name, module in list(model.named_modules()):
        taken = any(matches(name, one.targets) and not matches(name, one.ignore) for one in ours)
        if not taken and stored_parameters(module):
            read_parameters(module)
