"""The whole layer in plain PyTorch, fp32: the oracle of `moe_forward`, readable against docs/method.md line by line."""

import torch

from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.storage.chains import index_side
from bitsmoe_modifier.storage.factors import decode_basis, decode_factor
from bitsmoe_modifier.storage.layout import ExpertsLayout
from bitsmoe_modifier.storage.packed import PackedExperts


def decode_expert_factors(packed: PackedExperts) -> tuple[torch.Tensor, torch.Tensor]:
    """All factors of a layer in float32: A ``[E, 2, I, R]`` and F ``[E, R', I]``."""
    layout = ExpertsLayout.from_tensor(packed.layout.cpu())
    n = layout.num_experts
    widths_in = packed.widths_in.flatten(0, 1)
    index_in = index_side(widths_in, layout, "in")
    index_out = index_side(packed.widths_out, layout, "out")
    a = decode_factor(packed.codes_in, packed.steps_in, widths_in, index_in, layout, "in")
    f = decode_factor(packed.codes_out, packed.steps_out, packed.widths_out, index_out, layout, "out")
    return a.view(n, 2, layout.intermediate_size, layout.rank_in), f


def decode_bases(packed: PackedExperts) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The bases B ``[R, H]`` and U ``[H, R']`` in float32; None where a side has none."""
    layout = ExpertsLayout.from_tensor(packed.layout.cpu())
    group, b, u = layout.basis_group_size, packed.basis_in, packed.basis_out
    return (
        None if b is None else decode_basis(b, packed.basis_in_step, layout.basis_in_bits, group),
        None if u is None else decode_basis(u, packed.basis_out_step, layout.basis_out_bits, group),
    )


def moe_reference(
    x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, packed: PackedExperts, gating: Gating
) -> torch.Tensor:
    """y ``[T, H]`` float32 for x ``[T, H]``; the ids and weights are ``[T, k]``, ids outside ``[0, E)`` count nothing.

    An expert that is stored dense has only zero-width units, so its quantized part is exactly zero and its dense part
    is added; the biases belong to the expert in either case.
    """
    layout = ExpertsLayout.from_tensor(packed.layout.cpu())
    x, p = x.float(), top_k_weights.float()
    a, f = decode_expert_factors(packed)
    b, u = decode_bases(packed)
    h = x if b is None else x @ b.T
    t = torch.zeros(len(x), layout.rank_out, device=x.device)
    y = torch.zeros(len(x), layout.hidden_size, device=x.device)
    dense_ids = [] if packed.dense_ids is None else packed.dense_ids.tolist()
    for e in range(layout.num_experts):
        p_e = torch.where(top_k_index == e, p, 0.0).sum(1, keepdim=True)
        bias = 0.0 if packed.in_bias is None else packed.in_bias[e].float()
        gate, up = (h @ a[e].flatten(0, 1).T + bias).chunk(2, 1)
        t += p_e * (gating(gate, up) @ f[e].T)
        if e in dense_ids and packed.dense_in is not None and packed.dense_out is not None:
            place = dense_ids.index(e)
            gate, up = (x @ packed.dense_in[place].float().T + bias).chunk(2, 1)
            y += p_e * (gating(gate, up) @ packed.dense_out[place].float().T)
        if packed.out_bias is not None:
            y += p_e * packed.out_bias[e].float()
    return y + (t if u is None else t @ u.T)
