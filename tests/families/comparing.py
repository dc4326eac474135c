"""Dense weights put into a model as transformers builds it, against what packed experts compute."""

import torch
from torch import nn

from bitsmoe_modifier.loading.quantizer import experts_sizes


def insert(experts: nn.Module, gate_up: torch.Tensor, down: torch.Tensor) -> float:
    """Put dequantized weights into a fused experts module; return by how much, relatively, they differ from its own."""
    num_experts, hidden, width = experts_sizes(experts)
    if not getattr(experts, "has_gate", True):
        gate_up, zeros = gate_up.chunk(2, dim=1)
        assert not zeros.any()
        pairs = (experts.up_proj, gate_up), (experts.down_proj, down)
        errors = [float((new - own).norm() / own.norm()) for own, new in pairs]
        experts.up_proj.data.copy_(gate_up)
        experts.down_proj.data.copy_(down)
        return max(errors)
    assert gate_up.shape == (num_experts, 2 * width, hidden)
    if not getattr(experts, "is_concatenated", True):  # gate and up rows alternate
        gate_up = torch.stack(gate_up.chunk(2, dim=1), dim=2).flatten(1, 2)
    errors = []
    for own, new in ((experts.gate_up_proj.data, gate_up), (experts.down_proj.data, down)):
        new = new if own.shape == new.shape else new.transpose(1, 2)
        errors.append(float((new - own).norm() / own.norm()))
        own.copy_(new)
    return max(errors)
