"""Rounding of single columns to trellis codes (storage/trellis.py), for `rounding`'s feedback and refinement.

Gate and up: a column of one expert, group of rows by group of rows, is a sequence, the importance of the rows is the
weight of its errors, and the step follows from what feedback asks of the group. Down: the rows are directions, each
with steps of its own, so a sequence's errors weigh by these and by what an error of the direction does to the output.
"""

from collections.abc import Iterable

import torch

from ..storage.chains import CHAIN_DIRECTIONS, chains_of
from ..storage.steps import storable_steps
from ..storage.trellis import CODES, sequence_order, trellis_values
from .viterbi import Sequences, encode

#: Steps in units of the root mean square of the weights, by width: least error of normally distributed weights.
NORMAL_STEP = {1: 0.5557, 2: 1.857, 3: 2.261, 4: 2.619, 6: 3.127, 8: 2.315}
_TINY = 1e-30


def grid_values(windows: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Values of windows (as floats) in units of the step; ``level = 2**b - 1`` broadcasts against them."""
    return trellis_values(windows.to(torch.uint8), _width(level))


def _width(level: torch.Tensor) -> torch.Tensor:
    return (level + 1).log2().round().to(torch.int32)


def root_mean_square(w: torch.Tensor, weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Weighted along a dimension, which is kept."""
    total = weight.sum(dim, keepdim=True).clamp_min(_TINY)
    return ((w.square() * weight).sum(dim, keepdim=True) / total).sqrt()


def normal_steps(rms: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Storable steps of weights of root mean square ``rms`` at the given widths; of no meaning at width 0."""
    known = [NORMAL_STEP.get(b, 1.0) for b in range(max(CODES) + 1)]
    factors = torch.tensor(known, dtype=torch.float32, device=rms.device)
    return storable_steps(rms * factors[width.long()])


class GroupTrellis:
    """Columns of gate or up: each group of rows is a sequence, with a step that is fitted to what it has to hold.

    Args:
        possible: the widths that may occur; a kernel is compiled for just these.
    """

    grid = staticmethod(grid_values)

    def __init__(self, possible: Iterable[int] = tuple(CODES)) -> None:
        self._possible = tuple(possible)

    def column(
        self,
        target: torch.Tensor,
        step: torch.Tensor,
        level: torch.Tensor,
        row_weight: torch.Tensor | None,
        windows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Windows, steps and values of one column of every matrix.

        Args:
            target: ``[N, m]``; step: ``[N, groups]``; level: ``[N, 1]``.
            row_weight: ``[N, m]``, or None for rows of equal weight.
            windows: ``[N, m]`` as floats, from before: what is better, they with a step refitted to the target, or
                windows found anew for that step. None starts from the root mean square of the target.
        """
        found, value = torch.zeros_like(target), torch.zeros_like(target)
        at = (level[:, 0] > 0).nonzero()[:, 0]
        if not len(at):
            return found, step, value
        groups = step.shape[1]
        w = target[at].view(len(at) * groups, -1)
        weight = torch.ones_like(w) if row_weight is None else row_weight[at].view(w.shape)
        weight = weight / weight.mean(1, keepdim=True).clamp_min(_TINY)
        width = _width(level[at]).expand(-1, groups).flatten()
        before = None if windows is None else windows[at].view(w.shape)
        new, fitted = fit_rows(w, weight, width, step[at].view(-1, 1), before)
        found[at] = new.view(len(at), -1)
        value[at] = (trellis_values(new.to(torch.uint8), width[:, None]) * fitted).view(len(at), -1)
        return found, step.index_copy(0, at, fitted.view(len(at), groups)), value

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
        from bitsmoe_kernels.trellis_rounding import round_groups

        return round_groups(target, response, reference, step, level, row_weight, codes, self._possible)


def fit_rows(
    w: torch.Tensor,
    weight: torch.Tensor,
    width: torch.Tensor,
    step: torch.Tensor,
    windows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows and steps of rows that are sequences.

    Args:
        w, weight: ``[S, T]``, weights of mean 1 in every row.
        width: int ``[S]``, > 0.
        step: ``[S, 1]``: where nothing better can be fitted.
        windows: ``[S, T]`` to improve on, as floats.

    Returns:
        (windows as floats ``[S, T]``, steps ``[S, 1]``).
    """
    root = weight.sqrt()
    sequences = Sequences.rows(width, sequence_order(w.shape[1]))
    if windows is None:
        start = normal_steps(root_mean_square(w, weight, 1), width[:, None])
    else:
        old = trellis_values(windows.to(torch.uint8), width[:, None])
        start = _fitted(w, weight, old, step)
    new = encode(root * w / start, root, sequences)
    grid = trellis_values(new, width[:, None])
    fitted = _fitted(w, weight, grid, start)
    # the windows were found for the step before the fit, and a step is coarse
    fitted = torch.where(_error(w, weight, grid * fitted) < _error(w, weight, grid * start), fitted, start)
    found = new.to(w.dtype)
    if windows is not None:
        worse = _error(w, weight, grid * fitted) >= _error(w, weight, old * start)
        found, fitted = torch.where(worse, windows, found), torch.where(worse, start, fitted)
    return found, fitted


def _fitted(w: torch.Tensor, weight: torch.Tensor, grid: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Least-squares steps ``[S, 1]`` of rows of grid values; ``step`` where they are all 0 or the fit is negative."""
    weighted = weight * grid
    scale, slope = (weighted * grid).sum(1, keepdim=True), (weighted * w).sum(1, keepdim=True)
    return torch.where((scale > 0) & (slope > 0), storable_steps(slope / scale.clamp_min(_TINY)), step)


def _error(w: torch.Tensor, weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (weight * (w - value).square()).sum(1, keepdim=True)


class ChainTrellis:
    """Columns of down: sequences run along the directions of a chain (storage/chains.py); steps are kept.

    Args:
        widths: uint8 ``[N, units]`` of all units of the matrices.
        stripes: of the layout.
        stripe: which of them the columns' rows are; None for all units.
        gain: ``[m]`` of the columns' rows: what an error of each does.
        block_size: directions per unit.
        possible: the widths that may occur; a kernel is compiled for just these.
    """

    grid = staticmethod(grid_values)

    def __init__(
        self,
        widths: torch.Tensor,
        stripes: int,
        stripe: int | None,
        gain: torch.Tensor,
        block_size: int,
        possible: Iterable[int] = tuple(CODES),
    ) -> None:
        rows, apart = len(gain), 1 if stripe is None else stripes
        first, joined, width = [], [], []
        for matrix, row in enumerate(widths.tolist()):
            for units in chains_of(row, stripes, block_size):
                if stripe is None or units[0] % stripes == stripe:
                    first += [matrix * rows + unit // apart * block_size for unit in units]
                    joined.append(len(units))
                    width.append(row[units[0]])
        lengths = torch.tensor(joined, dtype=torch.int64, device="cpu") * block_size
        begin = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        number = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
        members = torch.tensor(first, dtype=torch.int64, device="cpu")[:, None] + torch.arange(block_size, device="cpu")
        place = members.flatten()[_in_stream(begin, number)]
        self.sequences = Sequences(begin, place, torch.tensor(width, dtype=torch.int32, device="cpu"))
        device = gain.device
        self._place, self._lengths, self._number = place.to(device), lengths.to(device, gain.dtype), number.to(device)
        self._root = gain.clamp_min(0).sqrt()
        self._chains = self.sequences.begin.to(device), self._place, self.sequences.width.to(device)
        self._longest, self._possible = int(lengths.max()) if len(lengths) else 0, tuple(possible)

    def _per_sequence(self, value: torch.Tensor) -> torch.Tensor:
        """Sums ``[S]`` over the sequences' places in ``value [N, m]``."""
        sums = torch.zeros_like(self._lengths)
        return sums.index_add_(0, self._number, value.flatten()[self._place])

    def _spread(self, each: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A value per sequence at all its places, 0 elsewhere, in the shape of ``like``."""
        return torch.zeros_like(like.flatten()).index_copy_(0, self._place, each[self._number]).view(like.shape)

    def column(
        self,
        target: torch.Tensor,
        step: torch.Tensor,
        level: torch.Tensor,
        row_weight: torch.Tensor | None,
        windows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Windows and values of one column of every matrix; see `GroupTrellis.column`.

        Args:
            target, step: ``[N, m]``; level: ``[N, m]`` or ``[N, 1]``.
            row_weight: None.
            windows: from before, kept where new ones are no better.
        """
        # in units of each direction's step, scaled so that a sequence's weights have mean 1
        root = self._root * step
        scale = (self._per_sequence(root.square()) / self._lengths).clamp_min(_TINY).rsqrt()
        gain = root * self._spread(scale, root)
        aim = (gain * target / step).contiguous()
        found = encode(aim, gain, self.sequences).to(target.dtype)
        grid = grid_values(found, level)
        if windows is not None:
            old = grid_values(windows, level)
            error, before = (self._per_sequence((aim - gain * g).square()) for g in (grid, old))
            better = self._spread((error < before).to(target.dtype), root) > 0
            found, grid = torch.where(better, found, windows), torch.where(better, grid, old)
        return found, step, grid * step

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
        """`rounding.round_block` by a kernel, on a GPU; the levels are those of the chains."""
        from bitsmoe_kernels.trellis_rounding import round_chains

        block = target, response, reference, step, codes
        return round_chains(*block, self._root, self._chains, self._possible, self._longest)


def _in_stream(begin: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """`sequence_order` of sequences one after the other: the place of the row at each position, int64.

    Args:
        begin: int64 ``[S + 1]`` of each; number: int64, the sequence at each position.
    """
    start = begin[number]
    position, lane = torch.arange(len(number), device=number.device) - start, (begin.diff() // 8)[number]
    return start + position % lane * 8 + position // lane


def chain_steps(columns: torch.Tensor, weight: torch.Tensor, level: torch.Tensor, group_size: int) -> torch.Tensor:
    """Steps to start from for down, ``[n, groups, R']``; of no meaning at level 0.

    Args:
        columns: ``[n, I, R']``; weight: ``[n, I]``; level: ``[n, R']``.
    """
    grouped, rho = columns.unflatten(1, (-1, group_size)), weight.unflatten(1, (-1, group_size))[..., None]
    return normal_steps(
        root_mean_square(grouped, rho, 2).squeeze(2), _width(level)[:, None].expand(-1, grouped.shape[1], -1)
    )


# -------------------------------------------------------------------------------------------------- what rounding loses


def group_error(factor: torch.Tensor, weight: torch.Tensor, width: int, group_size: int) -> torch.Tensor:
    """Weighted squared error of every direction of a gate or up factor in trellis codes of one width, ``[R]``.

    Args:
        factor: ``[I, R]``; weight: ``[I]``, ≥ 0.
    """
    directions = factor.shape[1]
    w = factor.reshape(-1, group_size, directions).transpose(1, 2).reshape(-1, group_size)
    rho = weight.view(-1, 1, group_size).expand(-1, directions, -1).reshape(w.shape)
    mean = rho.mean(1, keepdim=True).clamp_min(_TINY)
    windows, step = _fresh(w, rho / mean, width)
    error = _error(w, rho, trellis_values(windows.to(torch.uint8), width) * step)
    return error.view(-1, directions).sum(0)


def chain_error(
    factor: torch.Tensor, weight: torch.Tensor, gain: torch.Tensor, width: int, group_size: int, block_size: int
) -> torch.Tensor:
    """The same of a down factor ``[I, R']``, in chains of neighbouring units of at least half the greatest length."""
    length, directions = factor.shape
    factor = factor.contiguous()
    grouped, rho = factor.view(-1, group_size, directions), weight.view(-1, group_size, 1)
    start = normal_steps(root_mean_square(grouped, rho, 1), torch.tensor(width, device=factor.device))
    step = start.expand_as(grouped).reshape(length, directions)
    joined = max(1, CHAIN_DIRECTIONS // 2 // block_size)
    joined = joined if directions % (joined * block_size) == 0 else 1
    root = (gain.clamp_min(0).sqrt() * step).view(-1, joined * block_size)
    root = root * root.square().mean(1, keepdim=True).clamp_min(_TINY).rsqrt()
    count, chain = root.shape
    sequences = Sequences.rows(torch.full((count,), width, device="cpu"), sequence_order(chain))
    windows = encode(root * (factor / step).view(root.shape), root, sequences)
    grid = trellis_values(windows, width).view(grouped.shape)
    weighted = rho * grid
    slope, scale = (weighted * grouped).sum(1, keepdim=True), (weighted * grid).sum(1, keepdim=True)
    fitted = torch.where((scale > 0) & (slope > 0), storable_steps(slope / scale.clamp_min(_TINY)), start)
    return torch.minimum(*((rho * (grouped - s * grid).square()).sum(1) for s in (fitted, start))).sum(0)


def _fresh(w: torch.Tensor, weight: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    widths = torch.full((len(w),), width, device=w.device)
    return fit_rows(w, weight, widths, w.new_ones(len(w), 1))
