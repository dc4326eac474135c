"""What calibration must know about a layer, from its routed tokens only (method.md section 1).

No token is sent through an expert that the router did not pick. Routing weights enter squared, because the layer
multiplies an expert's output error by the routing weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ..errors import CalibrationError
from .distributed import Ranks
from .gating import Gating
from .layer import DenseExperts, Matrices
from .numerics import all_finite

#: How far an expert's share of the tokens, as calibration saw it, is believed: text in use routes differently. The
#: logarithm of the share is pulled towards the average expert's, by 1 - `_TEMPER` of the way (the posterior mean when
#: both the shares and what the text does to them are log-normal), with `_SPREAD` average experts' tokens added to all,
#: so that an expert which calibration hardly reached is not given up.
_SPREAD, _TEMPER = 0.02, 0.85

#: An expert with as many tokens as this many times the width of its second moment trusts its own moment by half.
_PRIOR_STRENGTH = 0.25

#: One calibration row in so many is held out; below so many rows none.
_HELD_SHARE, _LEAST_ROWS = 8, 4


def held_rows(rows: int) -> list[bool]:
    """Which of so many calibration rows are held out: an eighth of them, evenly spread; one of 4 to 7, none of fewer.

    Neighbouring tokens of a text are alike, so whole rows are.
    """
    held = max(rows // _HELD_SHARE, int(rows >= _LEAST_ROWS))
    return [(row + 1) * held // rows > row * held // rows for row in range(rows)]


@dataclass(frozen=True)
class RoutedTokens:
    """Inputs of one MoE layer over the calibration rows, sorted by expert.

    A *pair* is a (token, expert) that the router chose.

    Attributes:
        x: ``[T, H]``, any float dtype: the layer's input.
        token: int64 ``[P]``, token of each pair, pairs in order of expert.
        weight: float32 ``[P]``, ``p**2`` of each pair times the token's loss weight.
        counts: pairs per expert, length E.
        held: bool ``[T]``, tokens of the rows that are kept out of every statistic (`held_rows`) and judge what the
            others decide; None where there are too few rows for that.
    """

    x: torch.Tensor
    token: torch.Tensor
    weight: torch.Tensor
    counts: tuple[int, ...]
    held: torch.Tensor | None = None

    @classmethod
    def from_router(
        cls,
        x: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        num_experts: int,
        token_weight: torch.Tensor | None = None,
        rows: int = 1,
    ) -> "RoutedTokens":
        """Sort the router's choices by expert.

        Args:
            x: ``[T, H]``.
            top_k_index: integer ``[T, k]``.
            top_k_weights: ``[T, k]``.
            num_experts: E.
            token_weight: ``[T]``, how much an error of the layer's output at this token matters; None for 1.
            rows: how many rows of equal length the tokens are, one after another.

        Raises:
            CalibrationError: on NaN or infinity in the inputs or routing weights.
        """
        if not bool(all_finite(x)):
            raise CalibrationError("its calibration inputs hold NaN or infinity; calibrate in bfloat16 or float32")
        if not bool(all_finite(top_k_weights)):
            raise CalibrationError("its routing weights hold NaN or infinity; calibrate in bfloat16 or float32")
        expert, order = torch.sort(top_k_index.flatten(), stable=True)
        token = order // top_k_index.shape[1]
        weight = top_k_weights.flatten()[order].to(torch.float32).square()
        if token_weight is not None:
            weight = weight * token_weight.to(weight)[token]
        counts = torch.bincount(expert, minlength=num_experts)
        kept_out = held_rows(rows)
        held = None
        if any(kept_out):
            row = torch.arange(len(x), device=x.device) * rows // len(x)
            held = torch.tensor(kept_out, device=x.device)[row]
        return cls(x, token, weight, tuple(counts.tolist()), held)

    def fitted(self) -> "RoutedTokens":
        """The pairs of the rows that statistics are taken from, with the inputs of all."""
        return self if self.held is None else self._only(~self.held)

    def held_out(self) -> "RoutedTokens | None":
        """The pairs of the rows that are held out, None where none is."""
        return None if self.held is None else self._only(self.held)

    def _only(self, chosen: torch.Tensor) -> "RoutedTokens":
        kept = chosen[self.token]
        expert = torch.repeat_interleave(torch.tensor(self.counts, device=kept.device))
        counts = torch.bincount(expert[kept], minlength=len(self.counts))
        return RoutedTokens(self.x, self.token[kept], self.weight[kept], tuple(counts.tolist()))

    def of(self, experts: Sequence[int]) -> "RoutedTokens":
        """The pairs of some experts alone, which are numbered anew, in the order given."""
        pairs = self.pairs(experts)
        token, weight = (torch.cat([every[one] for one in pairs]) for every in (self.token, self.weight))
        return RoutedTokens(self.x, token, weight, tuple(self.counts[e] for e in experts))

    def pairs(self, experts: Sequence[int]) -> list[slice]:
        """Slice of the pairs of each of the given experts."""
        ends = list(accumulate(self.counts, initial=0))
        return [slice(ends[e], ends[e + 1]) for e in experts]

    @property
    def token_weights(self) -> torch.Tensor:
        """``Σ_e p_e**2`` of each token (times its loss weight), float32 ``[T]``."""
        total = torch.zeros(len(self.x), dtype=torch.float32, device=self.x.device)
        return total.index_add_(0, self.token, self.weight)


def second_moment(x: torch.Tensor, weight: torch.Tensor, chunk: int = 16384) -> torch.Tensor:
    """``Σ_t weight_t x_t x_tᵀ`` in float32, ``[n, n]`` for ``x [T, n]``; accumulated in chunks of rows."""
    moment = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    for rows, w in zip(x.split(chunk), weight.split(chunk), strict=True):
        scaled = rows.to(torch.float32) * w.sqrt()[:, None]
        moment.addmm_(scaled.T, scaled)
    return moment


def prior_share(counts: Sequence[int], width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """α_e, the share of the layer's common moment in expert e's, float32 ``[E]`` (method.md section 1).

    α falls with the tokens an expert saw relative to the ``width`` of the moment to be estimated; 1 without tokens.
    """
    seen = torch.tensor(counts, dtype=torch.float32, device=device)
    return _PRIOR_STRENGTH * width / (seen + _PRIOR_STRENGTH * width)


def shrink(own: torch.Tensor, common: torch.Tensor, mass: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Pull experts' moments towards the common one, at equal mass.

    Args:
        own: ``[n, w, w]`` moments of some experts, or ``[n, w]`` their diagonals.
        common: ``[w, w]`` (or ``[w]``) the layer's moment per unit of mass.
        mass: ``[n]``, summed weights of each expert's pairs (what its moment would weigh with the common shape).
        share: ``[n]``, α of each.
    """
    shape = (-1, *([1] * (own.ndim - 1)))
    return (own * (1 - share).view(shape)).addcmul_((share * mass).view(shape), common)


def expert_moments(
    inputs: Callable[[int, slice], torch.Tensor], tokens: RoutedTokens, experts: Sequence[int], width: int
) -> torch.Tensor:
    """Second moments of the inputs that each expert sees, float32 ``[n, width, width]``.

    Args:
        inputs: (expert, slice of pairs) to the pairs' inputs ``[pairs, width]``, float32.
        tokens: the layer's routed tokens.
        experts: which experts.
        width: of the inputs.
    """
    moments = torch.zeros(len(experts), width, width, dtype=torch.float32, device=tokens.x.device)
    for moment, expert, pairs in zip(moments, experts, tokens.pairs(experts), strict=True):
        if pairs.stop > pairs.start:
            scaled = inputs(expert, pairs) * tokens.weight[pairs].sqrt()[:, None]
            torch.mm(scaled.T, scaled, out=moment)
    return moments


def down_moments(
    experts: DenseExperts,
    tokens: RoutedTokens,
    h: torch.Tensor,
    gate_up: Callable[[int], torch.Tensor],
    ids: range,
) -> tuple[torch.Tensor, torch.Tensor]:
    """E[ẑ ẑᵀ] and E[(z - ẑ) ẑᵀ] of some experts, float32 ``[n, I, I]``, summed over their pairs' weights.

    z are the unquantized activations, ẑ those of the rounded gate and up.

    Args:
        experts: the layer's dense experts.
        tokens: its routed tokens.
        h: their inputs in the coordinates of those, float32 ``[T, R]``.
        gate_up: from an expert to its rounded factors, float32 ``[2I, R]``.
        ids: which experts.
    """
    width = experts.down.shape[2]
    moments = torch.zeros(len(ids), width, width, dtype=torch.float32, device=h.device)
    lost = torch.zeros_like(moments)
    for moment, cross, expert, pairs in zip(moments, lost, ids, tokens.pairs(ids), strict=True):
        if pairs.stop > pairs.start:
            token, root = tokens.token[pairs], tokens.weight[pairs].sqrt()[:, None]
            exact = experts.activations(expert, tokens.x[token].to(torch.float32)) * root
            rounded = experts.activations(expert, h[token], gate_up(expert)) * root
            torch.mm(rounded.T, rounded, out=moment)
            torch.mm((exact - rounded).T, rounded, out=cross)
    return moments, lost


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's calibration statistics (method.md section 1).

    Attributes:
        input_moment: C = Σ_e C[e], float32 ``[H, H]``.
        row_importance: ρ, float32 ``[E, 2I]``: squared output error per squared error of a gate or up activation.
        down_moment_diagonal: diag Z[e] at the unquantized activations, shrunk and boosted, float32 ``[E, I]``.
        down_output_moment: Σ_e W_down[e] Z[e] W_down[e]ᵀ, float32 ``[H, H]``.
        mass: summed pair weights per expert, float32 ``[E]``; experts without tokens get their prior's.
        slope_ratio: E[∂z/∂gate ∂z/∂up] / E[(∂z/∂up)²], float32 ``[E, I]``: what one unit of error in a gate activation
            is worth in units of the up activation beside it, shrunk towards 0.
        boost: by how much costs of an expert exceed what its own tokens make them (`_TEMPER`), float32 ``[E]``.
        peak_output: largest routed output norm ‖W_down z‖ of each expert, float32 ``[E]`` (super experts); zeros where
            it was not asked for.
    """

    input_moment: torch.Tensor
    row_importance: torch.Tensor
    down_moment_diagonal: torch.Tensor
    down_output_moment: torch.Tensor
    slope_ratio: torch.Tensor
    mass: torch.Tensor
    boost: torch.Tensor
    peak_output: torch.Tensor


def activate(
    x: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None, gating: Gating
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z of one expert with its derivatives.

    Args:
        x: ``[pairs, H]``; gate_up: ``[2I, H]``; bias: ``[2I]`` or None; all float32.

    Returns:
        (z, ∂z/∂gate, ∂z/∂up), each ``[pairs, I]``. The gating is elementwise: one backward pass of the sum gives both.
    """
    with torch.enable_grad():
        gate, up = torch.nn.functional.linear(x, gate_up, bias).chunk(2, dim=1)
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        z = gating(gate, up)
        slope_gate, slope_up = torch.autograd.grad(z.sum(), (gate, up))
    return z.detach(), slope_gate, slope_up


def collect_statistics(
    tokens: RoutedTokens,
    gate_up: Matrices,
    down: Matrices,
    gating: Gating,
    in_bias: torch.Tensor | None = None,
    metric: torch.Tensor | None = None,
    ranks: Ranks | None = None,
    peaks: bool = False,
) -> LayerStatistics:
    """Statistics of one layer with its unquantized experts.

    Args:
        tokens: the layer's routed tokens.
        gate_up: ``[E, 2I, H]``, any float dtype.
        down: ``[E, H, I]``.
        gating: elementwise gate function.
        in_bias: ``[E, 2I]`` or None.
        metric: ``[H, H]``, the loss's curvature in the layer's output; None for the identity (squared output error).
        ranks: the processes that measure together, all with the same tokens; None for this one alone.
        peaks: measure `LayerStatistics.peak_output`, which takes a product per token and expert that nothing else does.

    Raises:
        CalibrationError: naming the expert whose activations are not finite.
    """
    ranks = ranks or Ranks.alone()
    num_experts, hidden, width = down.shape
    device = tokens.x.device
    importance = torch.zeros(num_experts, 2 * width, dtype=torch.float32, device=device)
    diagonal = torch.zeros(num_experts, width, dtype=torch.float32, device=device)
    ratio = torch.zeros_like(diagonal)
    output_moment = torch.zeros(hidden, hidden, dtype=torch.float32, device=device)
    mass = torch.zeros(num_experts, dtype=torch.float32, device=device)
    peak = torch.zeros_like(mass)
    mine, rows = ranks.mine(num_experts), ranks.mine(len(tokens.x))
    for expert, pairs in zip(mine, tokens.pairs(mine), strict=True):
        if pairs.stop == pairs.start:
            continue
        weight = tokens.weight[pairs]
        w_down = down[expert].to(torch.float32)
        bias = None if in_bias is None else in_bias[expert].to(torch.float32)
        z, slope_gate, slope_up = activate(
            tokens.x[tokens.token[pairs]].to(torch.float32), gate_up[expert].to(torch.float32), bias, gating
        )
        column_energy = (w_down * (w_down if metric is None else metric @ w_down)).sum(0).clamp_min(0)
        mass[expert] = weight.sum()
        share = weight / mass[expert].clamp_min(torch.finfo(torch.float32).tiny)
        up_energy = share @ slope_up.square()
        importance[expert, :width] = (share @ slope_gate.square()) * column_energy
        importance[expert, width:] = up_energy * column_energy
        ratio[expert] = (share @ (slope_gate * slope_up)) / up_energy.clamp_min(torch.finfo(torch.float32).tiny)
        diagonal[expert] = weight @ z.square()
        if peaks:
            peak[expert] = (z @ w_down.T).norm(dim=1).max()
        collected = torch.cat([diagonal[expert], importance[expert], ratio[expert], peak[expert, None]])
        if not bool(all_finite(collected)):
            raise CalibrationError(
                f"expert {expert}: its activations overflow; check the weights and the calibration text"
            )
        output_moment += _output_moment(z * weight.sqrt()[:, None], w_down)
    own = slice(rows.start, rows.stop)
    input_moment = second_moment(tokens.x[own], tokens.token_weights[own])
    importance, diagonal, output_moment, ratio, mass, peak, input_moment = map(
        ranks.total, (importance, diagonal, output_moment, ratio, mass, peak, input_moment)
    )
    if not bool(all_finite(input_moment) & all_finite(output_moment)):
        raise CalibrationError("the squares of its inputs or outputs overflow; check weights and calibration text")
    return _with_prior(
        LayerStatistics(input_moment, importance, diagonal, output_moment, ratio, mass, torch.ones_like(mass), peak),
        tokens.counts,
    )


def _output_moment(z: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
    """``Σ_t (W z_t)(W z_t)ᵀ``, ``[H, H]``, of ``z [T, I]``: by way of Σ z zᵀ where that is the smaller of the two."""
    if len(z) > z.shape[1]:
        return w_down @ (z.T @ z) @ w_down.T
    output = z @ w_down.T
    return output.T @ output


def _with_prior(statistics: LayerStatistics, counts: Sequence[int]) -> LayerStatistics:
    """Shrink the per-expert vectors towards the layer's average; experts without tokens take the average."""
    mass, width = statistics.mass, statistics.down_moment_diagonal.shape[1]
    share = prior_share(counts, width, mass.device)
    tiny = torch.finfo(torch.float32).tiny
    total = mass.sum().clamp_min(tiny)
    mass = torch.where(mass > 0, mass, _SPREAD * total / len(counts))
    seen = (mass * len(counts) / total).clamp_min(tiny)
    boost = torch.where(statistics.mass > 0, (seen + _SPREAD) ** _TEMPER / seen, _SPREAD**_TEMPER / seen)
    average_importance = (statistics.mass[:, None] * statistics.row_importance).sum(0, keepdim=True) / total
    floor = average_importance.mean() * 1e-3
    importance = statistics.row_importance * (1 - share)[:, None] + average_importance * share[:, None]
    common = statistics.down_moment_diagonal.sum(0) / total
    return LayerStatistics(
        statistics.input_moment,
        importance.clamp_min(floor),
        shrink(statistics.down_moment_diagonal, common, mass, share) * boost[:, None],
        statistics.down_output_moment,
        statistics.slope_ratio * (1 - share)[:, None],
        mass,
        boost,
        statistics.peak_output,
    )
