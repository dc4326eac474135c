"""Random experts in the stored layout, for ``--load-format dummy``: the sizes and the speed of real ones."""

import torch

from ..method.layer import QuantizerSettings
from ..method.trellis import NORMAL_STEP
from ..storage.layout import ExpertsLayout
from ..storage.packed import PackedExperts
from ..storage.steps import storable_steps, stored_steps

#: Width of every unit, and bits of both bases: about what 2 bits per weight come to.
_WIDTH, _BASIS_BITS = 2, 4
#: Parts of the output's directions that trellis codes of the quantizer run through.
_STRIPES = 4


def dummy_experts(
    num_experts: int, hidden_size: int, intermediate_size: int, group_size: int, has_bias: bool, ungated: bool = False
) -> PackedExperts:
    """A layer of random codes with small steps, on the CPU, of the family and block sizes that the quantizer chooses.

    Args:
        num_experts: E of this rank.
        hidden_size: H.
        intermediate_size: I of this rank.
        group_size: columns along I that share a step.
        has_bias: with (zero) biases.
        ungated: without a gate.

    Raises:
        CheckpointError: when the sizes do not fit together.
    """
    settings = QuantizerSettings(group_size=group_size).for_sizes(hidden_size, intermediate_size)
    block_size, trellis = settings.resolve_block_size(hidden_size), settings.codes == "trellis"
    layout = ExpertsLayout(
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        rank_in=hidden_size,
        rank_out=hidden_size,
        block_size=block_size,
        group_size=group_size,
        basis_in_bits=_BASIS_BITS,
        basis_out_bits=_BASIS_BITS,
        basis_group_size=settings.resolve_basis_group(hidden_size),
        has_bias=int(has_bias),
        ungated=int(ungated),
        codes=int(trellis),
        stripes=min(_STRIPES, hidden_size // block_size) if trellis else 0,
    )
    cpu = torch.device("cpu")
    widths_in = torch.full((num_experts, 2, layout.units_in), _WIDTH, dtype=torch.uint8, device=cpu)
    if ungated:
        widths_in[:, 1] = 0
    widths_out = torch.full((num_experts, layout.units_out), _WIDTH, dtype=torch.uint8, device=cpu)
    generator = torch.Generator(cpu).manual_seed(0)
    # outputs of the size of the inputs, whatever the sizes are
    step = hidden_size**-0.5 / 4
    # an even grid of 2 bits has a root mean square of √5 steps
    code_step = step * 5**0.5 * NORMAL_STEP[_WIDTH] if trellis else step
    tensors: dict[str, torch.Tensor] = {"layout": layout.to_tensor(), "widths_in": widths_in, "widths_out": widths_out}
    for name, (dtype, shape) in layout.shapes(widths_in, widths_out).items():
        if name in tensors or name == "checksums":
            continue
        if name.startswith("steps"):
            tensors[name] = stored_steps(storable_steps(torch.full(shape, code_step, device=cpu)), dtype)
        elif dtype == torch.uint8:
            tensors[name] = torch.randint(256, shape, dtype=dtype, device=cpu, generator=generator)
        else:
            tensors[name] = torch.full(shape, 0.0 if name.endswith("_bias") else step, dtype=dtype, device=cpu)
    return PackedExperts(**tensors)
