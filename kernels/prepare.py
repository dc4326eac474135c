"""Launch metadata of a stored layer, computed once on load: what the kernels read instead of the widths.

A kernel program must find the codes of "matrix m, group g, the b-bit units" with a few integer loads, and every address
must stay a multiple of 16 bytes that the compiler can prove. So the head of a matrix holds starts in *quanta* and in
rows of steps (the kernel multiplies by constants) and, per width that occurs in the layer, how many units are at least
that wide; ``order`` maps the payload position of a unit to the directions it holds.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from bitsmoe_modifier.errors import CheckpointError
from bitsmoe_modifier.storage.chains import chains_of, index_side
from bitsmoe_modifier.storage.layout import ExpertsLayout
from bitsmoe_modifier.storage.packed import PackedExperts
from bitsmoe_modifier.storage.steps import step_values

from .tuned import Sizes, entries_of

#: Sets of widths that kernels are compiled for: the layers of a model differ in which they use, and a set of their own
#: for each would compile every kernel several times. Widths that do not occur cost a loop of no rounds.
WIDTH_SETS = ((6, 4, 2), (8, 6, 4, 3, 2, 1))

BLOCKS = (16, 32, 64, 128)
GROUPS = (32, 64, 128)
BASIS_GROUPS = (32, 64, 128, 256)

#: Bytes of shared memory that a program may have on every GPU since sm_80 (sm_86, sm_89 and sm_120 have the least). The
#: kernels of every layer that is taken need no more there: `compile_gates --shapes` compiles them.
SHARED_BYTES = 99 * 1024

#: Multiprocessors of an H100 and an H200: what is assumed where no GPU is.
PROCESSORS = 132


@dataclass(frozen=True)
class PreparedSide:
    """One side's payload with its launch metadata; a *matrix* is an (expert, gate | up) or an expert's down.

    Attributes:
        codes: uint8 1-D, as stored.
        steps: 1-D, in stored order: bf16, which holds every step of a byte exactly, or fp16 of format version 1. A byte
            would be a load of its own in the kernels, for 3 % of a 2-bit weight.
        head: int32 ``[matrices, 2 + len(widths)]``: start in quanta, start in rows of ``block_size`` steps, then for
            each of ``widths`` the number of units at least that wide.
        order: int32 ``[matrices, units]``: the unit at each payload position (widest first). On the output side of
            trellis codes ``[matrices, units, 6]``: besides the unit its width, the quantum where its chain begins, the
            chain's units, its number among them, and the row of its first group's steps; units of width 0 come last.
        widths: widths > 0, widest first, with all that occur among them; kernels are specialized on them.
        gain: power of two with ``16 * gain * steps <= 1``. The input side multiplies activations by steps in their own
            dtype; the gain keeps these products out of fp16's subnormals without letting them overflow.
    """

    codes: torch.Tensor
    steps: torch.Tensor
    head: torch.Tensor
    order: torch.Tensor
    widths: tuple[int, ...]
    gain: float

    @property
    def factor(self) -> list[torch.Tensor]:
        """What `products.gate_up` and `products.down` take of it."""
        return [self.codes, self.steps, self.head, self.order]


@dataclass(frozen=True)
class PreparedExperts:
    """A layer's stored tensors with the launch metadata of both sides. Payloads are shared with ``packed``.

    Attributes:
        layout: sizes.
        packed: as stored.
        side_in: of gate and up.
        side_out: of down.
        capability: 10 × major + minor of the layer's GPU; 0 in the interpreter.
        spans: from `line_spans`.
        cache: bytes of weights that a step may fetch ahead (`ahead.py`): a third of the GPU's second cache.
        sizes: launch sizes that were tried on this GPU, by pairs (`tuned.py`).
        processors: multiprocessors of the layer's GPU; `PROCESSORS` where there is none.
        payload: bytes of codes and steps, as a number: of tensors whose sizes torch.compile made symbols it has none.
    """

    layout: ExpertsLayout
    packed: PackedExperts
    side_in: PreparedSide
    side_out: PreparedSide
    capability: int
    spans: torch.Tensor | None = None
    cache: int = 0
    sizes: dict[int, Sizes] = field(default_factory=dict)
    processors: int = PROCESSORS
    payload: int = 0


def unsupported(
    layout: ExpertsLayout, dtype: torch.dtype = torch.bfloat16, device: torch.device | str | None = None
) -> str:
    """Why the kernels cannot run this layout with activations of ``dtype``; "" where they can.

    ``device``: the GPU that shall run them; None: the current one. The storage format allows more sizes than a
    tensor-core tile has shapes; the plain path runs all of them.
    """
    if torch.version.hip is not None:
        return "digits are decoded by NVIDIA instructions; this is a ROCm build of torch"
    where = None if device is None else torch.device(device)
    on_gpu = torch.cuda.is_available() and (where is None or where.type == "cuda")
    if on_gpu and torch.cuda.get_device_capability(where)[0] < 8:
        return "the GPU is older than sm_80, which has the bf16 instructions that decode digits"
    if on_gpu:
        properties = torch.cuda.get_device_properties(where)
        shared = getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES)
        if shared < SHARED_BYTES:
            return f"the GPU gives a program {shared} bytes of shared memory, and the kernels take up to {SHARED_BYTES}"
    checks: list[tuple[str, object, tuple[object, ...]]] = [
        ("block_size", layout.block_size, BLOCKS),
        ("group_size", layout.group_size, GROUPS),
        ("activation dtype", dtype, (torch.float16, torch.bfloat16)),
    ]
    if layout.basis_in_bits in (4, 8) or layout.basis_out_bits in (4, 8):
        checks.append(("basis_group_size", layout.basis_group_size, BASIS_GROUPS))
    for name, value, known in checks:
        if value not in known:
            return f"{name} {value} has no kernel (known: {', '.join(map(str, known))})"
    return ""


def prepare(packed: PackedExperts) -> PreparedExperts:
    """Compute the launch metadata of a layer. Call it once after loading: it waits for the device a few times.

    Args:
        packed: the stored tensors, already checked (`bitsmoe_modifier.storage.layout.check_structure`).

    Raises:
        RuntimeError: while a CUDA graph is captured.
        CheckpointError: when the layout has sizes that no kernel covers (see `unsupported`), or a side's payload is
            larger than int32 quanta can address.
    """
    if packed.codes_in.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "packed experts prepare their kernels at their first use, which a CUDA graph cannot capture; run the model "
            "once before capturing"
        )
    layout = ExpertsLayout.from_tensor(packed.layout.cpu())
    reason = unsupported(layout, device=packed.codes_in.device)
    if reason:
        raise CheckpointError(f"{reason}; use the plain path for this layer")
    side_in = _prepare_side(packed.codes_in, packed.steps_in, packed.widths_in.flatten(0, 1), layout)
    side_out = _prepare_side(packed.codes_out, packed.steps_out, packed.widths_out, layout)
    if layout.codes:
        side_out = replace(side_out, order=_chain_places(packed.widths_out, layout))
    payload = sum(side.codes.nbytes + side.steps.nbytes for side in (side_in, side_out))
    if not packed.codes_in.is_cuda:
        return PreparedExperts(layout, packed, side_in, side_out, 0, sizes=entries_of("", layout), payload=payload)
    gpu = torch.cuda.get_device_properties(packed.codes_in.device)
    sizes = entries_of(gpu.name, layout)
    spans = line_spans(side_in, side_out, layout)
    cache = int(getattr(gpu, "L2_cache_size", 0)) // 3
    return PreparedExperts(
        layout, packed, side_in, side_out, 10 * gpu.major + gpu.minor, spans, cache, sizes, gpu.multi_processor_count,
        payload,
    )  # fmt: skip


def line_spans(side_in: PreparedSide, side_out: PreparedSide, layout: ExpertsLayout) -> torch.Tensor:
    """Where an expert lies: int32 ``[E, 8, 2]``, the first 128-byte line and the end, counted from where each of the
    tensors `PreparedSide.factor` of the input side and then of the output side begins."""
    columns = []
    for side in (side_in, side_out):
        starts = side.head.view(layout.num_experts, -1, side.head.shape[1])[:, 0, :2].to(torch.int64)
        for i, (unit, payload) in enumerate(((layout.quantum, side.codes), (2 * layout.block_size, side.steps))):
            begins = starts[:, i] * unit
            ends = torch.cat([begins[1:], begins.new_tensor([payload.nbytes])])
            ends = torch.where(ends > begins, -(-ends // 128), begins // 128)
            columns.append(torch.stack([begins // 128, ends], 1))
        for table in (side.head, side.order):  # as many rows of every expert
            row = table.nbytes // layout.num_experts
            begins = torch.arange(layout.num_experts, device=table.device) * row
            columns.append(torch.stack([begins // 128, (begins + row + 127) // 128], 1))
    return torch.stack(columns, 1).to(torch.int32).contiguous()


def width_set(widths: Iterable[int]) -> tuple[int, ...]:
    """The widths that kernels are compiled for, widest first, where ``widths`` occur: one alone, or a common set."""
    used = set(widths) - {0}
    if len(used) <= 1:
        return tuple(used)
    return next(known for known in WIDTH_SETS if used <= set(known))


def _aligned(payload: torch.Tensor) -> torch.Tensor:
    """The payload at an address that 16-byte loads can use; a copy only where a loader handed out a view in between."""
    return payload if payload.data_ptr() % 16 == 0 else payload.clone()


def _prepare_side(
    codes: torch.Tensor, steps: torch.Tensor, widths: torch.Tensor, layout: ExpertsLayout
) -> PreparedSide:
    """Metadata of one side; ``widths`` is uint8 ``[matrices, units]``."""
    wide = widths.to(torch.int64)
    used = width_set(wide.unique().tolist())
    at_least = [(wide >= b).sum(1) for b in used]
    bits, kept = wide.sum(1) * layout.groups, (wide > 0).sum(1) * layout.groups
    head = torch.stack([bits.cumsum(0) - bits, kept.cumsum(0) - kept, *at_least], 1)
    if codes.numel() // layout.quantum >= 2**31:
        raise CheckpointError(f"a payload of {codes.numel()} bytes is beyond 32-bit offsets; shard the layer")
    largest = float(step_values(steps.max())) if steps.numel() else 1.0
    gain = 2.0 ** (-4 - math.ceil(math.log2(largest))) if largest > 0 else 1.0
    return PreparedSide(
        codes=_aligned(codes),
        steps=_aligned(step_values(steps).to(torch.bfloat16) if steps.dtype == torch.uint8 else steps),
        head=head.to(torch.int32).contiguous(),
        order=torch.argsort(wide, dim=1, descending=True, stable=True).to(torch.int32).contiguous(),
        widths=used,
        gain=gain,
    )


def _chain_places(widths: torch.Tensor, layout: ExpertsLayout) -> torch.Tensor:
    """`PreparedSide.order` of the output side of trellis codes."""
    index = index_side(widths.cpu(), layout, "out")
    code, row = index.code_offset[:, 0].tolist(), index.step_offset[:, 0].tolist()
    places = []
    for matrix, own in enumerate(widths.tolist()):
        for units in chains_of(own, layout.stripes, layout.block_size):
            for number, unit in enumerate(units):
                places.append((unit, own[unit], code[matrix][unit], len(units), number, row[matrix][unit]))
        places += [(unit, 0, 0, 1, 0, 0) for unit, width in enumerate(own) if not width]
    return torch.tensor(places, dtype=torch.int32, device=widths.device).view(len(widths), -1, 6)
