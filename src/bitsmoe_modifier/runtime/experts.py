"""`BitsMoEExperts`: the module that stands in for a layer's routed experts and runs on the stored tensors.

The forward is the one of docs/method.md: ``h = B x`` once per token, per active expert ``a = A[e] h``,
``z = gating(a_gate, a_up)``, ``t += p_e F[e] z``, and ``y = U t`` once. On a CPU a decoding step's few
pairs are multiplied straight from the stored codes (`native_product`, `packed_product`); for more of them the experts
that the batch reaches are decoded, a bounded number at a time, and those used last are kept (`decoded`). On CUDA the
same computation runs in the Triton kernels of `bitsmoe_kernels`, unless BITSMOE_FORCE_PLAIN=1 is set.
"""

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..devices import is_offloaded, kernels_wanted
from ..method.gating import Gating
from ..storage.chains import index_side
from ..storage.factors import decode_basis, decode_factor
from ..storage.layout import ExpertsLayout, UnitIndex
from ..storage.packed import TENSOR_NAMES, PackedExperts
from .decoded import DecodedCache
from .differentiable import with_gradient
from .native_product import fastest_product, is_compiled
from .packed_product import PlaneIndex, index_planes
from .pairs import group_by_expert, in_turn
from .sorted_rows import routing_of
from .trellis_product import TileIndex, index_tiles, trellis_product
from .trellis_product import is_available as trellis_compiled

if TYPE_CHECKING:
    from bitsmoe_kernels import PreparedExperts

    from ..method.quantize import LayerReport

_LOGGER = logging.getLogger(__name__)

#: Bytes of weights that are decoded at a time when a batch reaches many experts.
CHUNK_BYTES = 64 * 2**20

#: (token, choice) pairs up to which decoding whole experts costs more than it saves: few of them share an expert.
FEW_PAIRS = 16

#: The same per expert reached, where products are compiled: decoding an expert takes as long as some 30 of them.
FEW_PER_EXPERT = 16

#: The same of trellis codes, whose products take longer.
FEW_PER_TRELLIS_EXPERT = 8


class BitsMoEExperts(nn.Module):
    """The routed experts of one MoE layer in the stored layout.

    Every stored tensor is a Parameter without gradient under its name in `PackedExperts`; dtypes are part of the format
    and survive ``.to(dtype)``, ``.half()`` and the like. Built from meta tensors it is the placeholder that a loader
    fills.

    Args:
        packed: the stored tensors. Where ``layout`` is on the meta device, `spec` is known only after loading.
        gating: the function between gate/up and down.
    """

    layout: torch.Tensor
    widths_in: torch.Tensor
    widths_out: torch.Tensor
    codes_in: torch.Tensor
    dense_ids: torch.Tensor
    dense_in: torch.Tensor
    dense_out: torch.Tensor
    in_bias: torch.Tensor
    out_bias: torch.Tensor

    #: what quantization noted about this layer; None in a loaded checkpoint
    report: "LayerReport | None" = None
    #: False after a quantization in this process found the kernels to compute otherwise (`calibration.gpu_check`)
    kernels_trusted = True

    def __init__(self, packed: PackedExperts, gating: Gating) -> None:
        super().__init__()
        for name, tensor in packed.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.gating = gating
        self._spec = None if packed.layout.is_meta else ExpertsLayout.from_tensor(packed.layout)
        self._units: tuple[UnitIndex, UnitIndex] | None = None
        self._planes: dict[str, PlaneIndex] | dict[str, TileIndex] | None = None
        self._dense_rows: dict[int, int] | None = None
        self._prepared: dict[torch.dtype, PreparedExperts | None] = {}
        self._cache = DecodedCache()

    # ------------------------------------------------------------------------------------------ what is stored

    @property
    def spec(self) -> ExpertsLayout:
        """The parsed header (the parameter ``layout``); parsed once.

        Raises:
            CheckpointError: when the header is not one.
        """
        if self._spec is None:
            self._spec = ExpertsLayout.from_tensor(self.layout)
        return self._spec

    @property
    def packed(self) -> PackedExperts:
        """The current parameters as plain tensors."""
        tensors = {name: getattr(self, name, None) for name in TENSOR_NAMES}
        return PackedExperts(**{name: t.detach() for name, t in tensors.items() if t is not None})

    @property
    def num_experts(self) -> int:
        """E."""
        return self.spec.num_experts

    @property
    def hidden_dim(self) -> int:
        """H, named as in transformers' experts modules."""
        return self.spec.hidden_size

    @property
    def intermediate_dim(self) -> int:
        """I, named as in transformers' experts modules."""
        return self.spec.intermediate_size

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        if self._spec is None:
            return "not loaded"
        sizes = self._spec
        return f"experts={sizes.num_experts}, hidden={sizes.hidden_size}, intermediate={sizes.intermediate_size}"

    def _forget(self) -> None:
        """Drop everything derived from parameters that are about to change."""
        self._units = None
        self._planes = None
        self._dense_rows = None
        self._prepared = {}
        self._cache.clear()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "BitsMoEExperts":
        """Move between devices only: a dtype that ``fn`` changes is changed back."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._forget()
        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        self._spec = None
        super()._load_from_state_dict(*args, **kwargs)

    # -------------------------------------------------------------------------------------------------- decoding

    def keep_decoded(self, keep: bool) -> None:
        """Keep every expert that a call decodes, for many calls in a row, or drop all that is kept.

        Takes up to the dense layer's size, whatever BITSMOE_CACHE_MB says.
        """
        self._cache.clear()
        self._cache.whole = keep

    def _index(self) -> tuple[UnitIndex, UnitIndex]:
        """Payload index of both sides, rebuilt from the bit-widths once."""
        if self._units is None:
            spec = self.spec
            self._units = (
                index_side(self.widths_in.reshape(-1, spec.units_in), spec, "in"),
                index_side(self.widths_out, spec, "out"),
            )
        return self._units

    def _packed_index(self) -> dict[str, Any]:
        """Planes of both sides by digit size, or tiles of trellis codes: what their products take, found once."""
        if self._planes is None:
            with torch.inference_mode(False), torch.no_grad():  # they serve later calls under any autograd mode
                widths = {"in": self.widths_in.flatten(0, 1), "out": self.widths_out}
                if self.spec.codes:
                    self._planes = {side: index_tiles(w, self.spec, side) for side, w in widths.items()}
                else:
                    units = dict(zip(widths, self._index(), strict=True))
                    self._planes = {side: index_planes(w, units[side], self.spec, side) for side, w in widths.items()}
        return self._planes

    def _rows_of_dense(self) -> dict[int, int]:
        """Row in ``dense_in`` / ``dense_out`` of every super expert."""
        if self._dense_rows is None:
            ids = self.dense_ids.tolist() if self.spec.num_dense else []
            self._dense_rows = {expert: row for row, expert in enumerate(ids)}
        return self._dense_rows

    def _decode(self, experts: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of the given experts: A ``[n, 2I, R]`` and F ``[n, R', I]``."""
        spec, (index_in, index_out) = self.spec, self._index()
        rows = torch.tensor(experts, device=index_in.code_offset.device)
        gate_and_up = torch.stack([2 * rows, 2 * rows + 1], 1).flatten()
        factors = []
        for side, index, matrices, units in (
            ("in", index_in, gate_and_up, spec.units_in),
            ("out", index_out, rows, spec.units_out),
        ):
            widths = getattr(self, f"widths_{side}")[rows].reshape(-1, units)
            chosen = UnitIndex(index.code_offset[matrices], index.step_offset[matrices])
            codes, steps = getattr(self, f"codes_{side}"), getattr(self, f"steps_{side}")
            factors.append(decode_factor(codes, steps, widths, chosen, spec, side, dtype))
        return factors[0].view(len(experts), 2 * spec.intermediate_size, spec.rank_in), factors[1]

    def _factors(self, experts: list[int], dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (expert, A ``[2I, R]``, F ``[R', I]``) in the given order, decoding at most `CHUNK_BYTES` at a time."""
        spec = self.spec
        size = spec.intermediate_size * (2 * spec.rank_in + spec.rank_out) * dtype.itemsize
        chunk = max(1, CHUNK_BYTES // size)
        for start in range(0, len(experts), chunk):
            wanted = experts[start : start + chunk]
            ready = {e: entry for e in wanted if (entry := self._cache.get((dtype, e))) is not None}
            missing = [e for e in wanted if e not in ready]
            if missing:
                # what is kept must serve later calls under any autograd mode
                with torch.inference_mode(False), torch.no_grad():
                    for e, a, f in zip(missing, *self._decode(missing, dtype), strict=True):
                        ready[e] = (a, f)
                        self._cache.put((dtype, e), ready[e])
            for e in wanted:
                a, f = ready.pop(e)
                yield e, a, f

    def _basis(self, side: str, dtype: torch.dtype) -> torch.Tensor | None:
        """B ``[R, H]`` (side "in") or U ``[H, R']`` (side "out"); None where the side has none."""
        bits = getattr(self.spec, f"basis_{side}_bits")
        if not bits:
            return None
        entry = self._cache.get((dtype, side))
        if entry is None:
            step = getattr(self, f"basis_{side}_step", None)
            with torch.inference_mode(False), torch.no_grad():
                basis = decode_basis(getattr(self, f"basis_{side}").detach(), step, bits, self.spec.basis_group_size)
                entry = (basis.to(dtype),)
                self._cache.put((dtype, side), entry)
        return entry[0]

    @torch.no_grad()
    def dense_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights that the stored tensors stand for, for tests and export.

        Returns:
            (gate_up ``[E, 2I, H]``, down ``[E, H, I]``) in float32, gate rows before up rows: ``A B`` and ``U F``, or
            as stored for super experts. Biases, where there are any, are the parameters ``in_bias`` and ``out_bias``.
        """
        spec, device = self.spec, self.codes_in.device
        experts, hidden, length, like = spec.num_experts, spec.hidden_size, spec.intermediate_size, torch.float32
        gate_up = torch.empty(experts, 2 * length, hidden, dtype=like, device=device)
        down = torch.empty(experts, hidden, length, dtype=like, device=device)
        basis_in, basis_out = self._basis("in", torch.float32), self._basis("out", torch.float32)
        dense = self._rows_of_dense()
        for e, a, f in self._factors([e for e in range(spec.num_experts) if e not in dense], torch.float32):
            gate_up[e] = a if basis_in is None else a @ basis_in
            down[e] = f if basis_out is None else basis_out @ f
        for e, row in dense.items():
            gate_up[e], down[e] = self.dense_in[row].float(), self.dense_out[row].float()
        return gate_up, down

    # --------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's routed experts, as transformers calls them.

        Args:
            hidden_states: x ``[T, H]``, any float dtype; the matrix products run in it. Without the other arguments,
                rows that the caller has sorted by expert (`sorted_rows`).
            top_k_index: ``[T, k]``, expert of every (token, choice). Ids outside ``[0, E)``, which expert parallelism
                gives to other ranks' experts, add nothing.
            top_k_weights: p ``[T, k]``, any float dtype.

        Returns:
            y ``[T, H]`` in the dtype of ``hidden_states``. The sum over a token's experts runs in float32 in order of
            the expert id, never in the order in which threads finish.
        """
        if top_k_index is None or top_k_weights is None:
            top_k_index, top_k_weights = routing_of(hidden_states, self.num_experts)
        if self.kernels_trusted and kernels_wanted(hidden_states):
            prepared = self._prepare_kernels(hidden_states.dtype)
            if prepared is not None:
                from bitsmoe_kernels import moe_forward

                def run(x: torch.Tensor, ids: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
                    return moe_forward(x, ids, p, prepared, self.gating)

                return with_gradient(run, self.forward_plain, hidden_states, top_k_index, top_k_weights)
        return self.forward_plain(hidden_states, top_k_index, top_k_weights)

    def _prepare_kernels(self, dtype: torch.dtype) -> "PreparedExperts | None":
        """What the kernels need of this layer, computed at its first use; None where they cannot run it."""
        if dtype not in self._prepared:
            prepared = None
            if not is_offloaded(self):
                from bitsmoe_kernels import prepare, unsupported

                reason = unsupported(self.spec, dtype, self.codes_in.device)
                if reason:
                    _LOGGER.warning("packed experts run in plain PyTorch, which is slow: %s", reason)
                else:
                    prepared = _at_fixed_addresses(prepare(self.packed))
            self._prepared[dtype] = prepared  # not before: what fails (memory, a capture) is tried again
        return self._prepared[dtype]

    def forward_plain(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`forward` in plain PyTorch, on any device; also what the kernels are compared with."""
        spec, x, dtype = self.spec, hidden_states, hidden_states.dtype
        tokens, choices = top_k_index.shape
        pairs, spans = group_by_expert(top_k_index, spec.num_experts)
        token = pairs // choices
        p = top_k_weights.flatten()[pairs, None].to(torch.promote_types(dtype, torch.float32))
        dense = self._rows_of_dense()

        basis_in, basis_out = self._basis("in", dtype), self._basis("out", dtype)
        h = x if basis_in is None else F.linear(x, basis_in)
        t = p.new_zeros(tokens, spec.rank_out)
        # super experts and output biases live in the hidden channels, beside the output basis
        y = t if basis_out is None else p.new_zeros(tokens, spec.hidden_size)

        packed = {e: span for e, span in spans.items() if e not in dense}
        if packed and self._runs_packed(x, len(pairs), len(packed)):
            experts, rows = in_turn(packed)
            index = token[rows]
            t.index_add_(0, index, self._run_packed(experts, h[index]) * p[rows])  # one row after the other
        else:
            for e, out in self._run_decoded({e: h[token[span]] for e, span in packed.items()}):
                t.index_add_(0, token[spans[e]], out * p[spans[e]])
        for e in sorted(dense.keys() & spans.keys()):
            span, w_in, w_out = spans[e], self.dense_in[dense[e]].to(dtype), self.dense_out[dense[e]].to(dtype)
            y.index_add_(0, token[span], self._run_expert(e, x[token[span]], w_in, w_out) * p[span])
        if spec.has_bias:
            for e, span in spans.items():
                y.index_add_(0, token[span], self.out_bias[e].to(p.dtype) * p[span])

        if basis_out is not None:
            y = y + F.linear(t.to(dtype), basis_out)
        return y.to(dtype)

    def _runs_packed(self, x: torch.Tensor, pairs: int, reached: int) -> bool:
        """Whether so many pairs on so many experts are multiplied from the codes, and no expert is decoded."""
        if x.is_cuda:  # there the packed sums would depend on the order in which threads finish
            return False
        if self.spec.codes:
            return pairs <= FEW_PER_TRELLIS_EXPERT * reached and not self._cache.whole and trellis_compiled(x)
        return pairs <= FEW_PAIRS or (
            pairs <= FEW_PER_EXPERT * reached and not self._cache.whole and is_compiled(x, torch.float32)
        )

    def _run_packed(self, experts: list[int], h: torch.Tensor) -> torch.Tensor:
        """Outputs ``[n, R']``, in float32 or wider, of one expert for each row of h ``[n, R]``."""
        a = self._multiply("in", experts, h.to(torch.promote_types(h.dtype, torch.float32)))
        if self.spec.has_bias:
            a = a + self.in_bias[experts]
        return self._multiply("out", experts, self.gating(*a.chunk(2, -1)))

    def _multiply(self, side: str, experts: list[int], v: torch.Tensor) -> torch.Tensor:
        """The side's factors of the given experts, each times its row of v, at most `CHUNK_BYTES` decoded at a time."""
        spec, codes, steps = self.spec, getattr(self, f"codes_{side}"), getattr(self, f"steps_{side}")
        index, product = self._packed_index()[side], trellis_product if self.spec.codes else fastest_product
        chunk = max(1, CHUNK_BYTES // (spec.intermediate_size * (2 * spec.rank_in + spec.rank_out) * v.itemsize))
        starts = range(0, len(experts), chunk)
        parts = [product(codes, steps, index, spec, side, experts[i : i + chunk], v[i : i + chunk]) for i in starts]
        return torch.cat(parts)

    def _run_decoded(self, rows: dict[int, torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (expert, its output ``[n, R']``) for each expert's rows of h ``[n, R]``, in their dtype."""
        dtype = next(iter(rows.values())).dtype if rows else torch.float32
        for e, a, f in self._factors(list(rows), dtype):
            yield e, self._run_expert(e, rows[e], a, f)

    def _run_expert(self, expert: int, rows: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor) -> torch.Tensor:
        """``w_out @ gating(w_in @ row + in_bias[expert])`` per row; ``w_in`` has gate rows before up rows."""
        bias = self.in_bias[expert].to(rows.dtype) if self.spec.has_bias else None
        gate, up = F.linear(rows, w_in, bias).chunk(2, -1)
        return F.linear(self.gating(gate, up), w_out)


def _at_fixed_addresses(prepared: "PreparedExperts") -> "PreparedExperts":
    """Tell torch.compile, which knows this of parameters only: a CUDA graph would copy all weights in every step."""
    for tensors in map(vars, (prepared, prepared.packed, prepared.side_in, prepared.side_out)):
        for tensor in tensors.values():
            if isinstance(tensor, torch.Tensor):
                torch._dynamo.mark_static_address(tensor)
    return prepared
