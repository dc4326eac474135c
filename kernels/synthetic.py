"""Random stored layers for tests and benchmarks: any payload of the right length is a valid one."""

import torch

from bitsmoe_modifier.storage.chains import index_side
from bitsmoe_modifier.storage.layout import ExpertsLayout
from bitsmoe_modifier.storage.packed import PackedExperts
from bitsmoe_modifier.storage.planes import levels
from bitsmoe_modifier.storage.steps import storable_steps, stored_steps


def random_experts(
    layout: ExpertsLayout,
    widths: tuple[int, ...] = (0, 2, 4, 6),
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> PackedExperts:
    """A layer with random widths, codes, steps, bases, biases and dense experts, scaled so that no width dominates.

    Args:
        layout: sizes; its dense experts are the first ones.
        widths: drawn from uniformly for every unit.
        seed: of a generator on ``device``.
        device: of all tensors.
        dtype: of dense experts and biases.
    """
    g = torch.Generator(device=device).manual_seed(seed)

    def floats(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype)

    def integers(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(high, shape, generator=g, device=device, dtype=dtype)

    def side(
        matrices: int, units: int, fan_in: int, group_major: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        choices = torch.tensor(widths, dtype=torch.uint8, device=device)
        chosen = choices[integers(len(widths), matrices, units)]
        chosen.view(layout.num_experts, -1)[: layout.num_dense] = 0
        bits = int(chosen.sum(dtype=torch.int64)) * layout.groups
        codes = integers(256, bits * layout.quantum, dtype=torch.uint8)
        kept = (chosen > 0)[:, None].expand(-1, layout.groups, -1)
        rows = torch.rand(int(kept.sum()), layout.block_size, generator=g, device=device) + 0.5
        # the largest values of trellis codes do not depend on the width
        top = torch.tensor([1 if layout.codes else levels(b) for b in range(9)], device=device)[chosen.long()]
        per_row = top[:, None].expand(-1, layout.groups, -1)[kept]
        order = index_side(chosen, layout, "in" if group_major else "out").step_offset[kept].to(device)
        rows[order] /= per_row[:, None] * fan_in**0.5
        return chosen, codes, stored_steps(storable_steps(rows), layout.step_dtype).flatten()

    def basis(rows: int, columns: int, bits: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if bits == 0:
            return None, None
        if bits == 16:
            return floats(rows, columns, scale=columns**-0.5, dtype=torch.bfloat16), None
        step = torch.rand(rows, columns // layout.basis_group_size, generator=g, device=device) + 0.5
        packed = integers(256, rows, columns * bits // 8, dtype=torch.uint8)
        return packed, (step / (levels(bits) * columns**0.5)).to(torch.float16)

    n, inner, hidden = layout.num_experts, layout.intermediate_size, layout.hidden_size
    widths_in, codes_in, steps_in = side(2 * n, layout.units_in, layout.rank_in, True)
    widths_out, codes_out, steps_out = side(n, layout.units_out, inner, False)
    basis_in, basis_in_step = basis(layout.rank_in, hidden, layout.basis_in_bits)
    basis_out, basis_out_step = basis(hidden, layout.rank_out, layout.basis_out_bits)
    dense, bias = layout.num_dense, layout.has_bias
    return PackedExperts(
        layout=layout.to_tensor().to(device),
        widths_in=widths_in.view(n, 2, -1),
        widths_out=widths_out,
        codes_in=codes_in,
        codes_out=codes_out,
        steps_in=steps_in,
        steps_out=steps_out,
        basis_in=basis_in,
        basis_in_step=basis_in_step,
        basis_out=basis_out,
        basis_out_step=basis_out_step,
        dense_ids=torch.arange(dense, dtype=torch.int32, device=device) if dense else None,
        dense_in=floats(dense, 2 * inner, hidden, scale=hidden**-0.5, dtype=dtype) if dense else None,
        dense_out=floats(dense, hidden, inner, scale=inner**-0.5, dtype=dtype) if dense else None,
        in_bias=floats(n, 2 * inner, dtype=dtype) if bias else None,
        out_bias=floats(n, hidden, dtype=dtype) if bias else None,
    )
