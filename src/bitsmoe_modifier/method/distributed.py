"""Several processes that calibrate one model together (torchrun): who has which rows, who computes what.

Every process runs its share of the calibration rows through its copy of the model. A layer's captured inputs then meet
on every process, which holds no more than a single process would; each measures and rounds its share of the layer's
experts, sums are exchanged, and the first process packs what all have rounded and sends it to the others. Rows are
dealt out batch by batch and meet in their original order, so that the number of processes changes no more than the
order in which sums over experts, and over the survey's tokens, are taken.

Collective calls run in a gloo group of their own, whose timeout bears that one process works for long while the others
wait. A process that dies closes its connections, which ends the calls of all others with an error.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import BitsMoEError, CalibrationError

_PATIENCE = datetime.timedelta(days=7)

T = TypeVar("T")
Inputs = tuple[torch.Tensor, ...]


class Ranks:
    """The processes of this job. One process is a job, too: then nothing here communicates."""

    def __init__(self, alone: bool = False) -> None:
        active = not alone and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        self.size = dist.get_world_size() if active else 1
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.size > 1 else None

    @classmethod
    def alone(cls) -> "Ranks":
        """This process without the others of its job."""
        return cls(alone=True)

    @property
    def first(self) -> bool:
        """Whether this process is the one that decides and packs."""
        return self.rank == 0

    def mine(self, count: int) -> range:
        """This process's share of ``count`` things in order (experts, tokens)."""
        return self._share_of(self.rank, count)

    def _share_of(self, rank: int, count: int) -> range:
        return range(rank * count // self.size, (rank + 1) * count // self.size)

    def everyones(self, value: T) -> list[T]:
        """The values that all processes pass, in order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the tensors that all processes pass."""
        if self.size == 1:
            return tensor
        summed = tensor.cpu().contiguous().clone()
        dist.all_reduce(summed, group=self._group)
        return summed.to(tensor.device)

    def compute(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on the first process, on all of them; its tensors should be on the CPU.

        Raises:
            BitsMoEError: on all processes, when the first one raised it.
        """
        if self.size == 1:
            return make()
        outcome: list[Any] = [None]
        if self.first:
            try:
                outcome = [make()]
            except BitsMoEError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if isinstance(outcome[0], BitsMoEError):
            raise outcome[0]
        return outcome[0]

    def concatenated(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the first process, one after the other, the tensors ``[n]`` that all pass; on the others their own.

        They are of one dtype and of any lengths.
        """
        lengths = self.everyones(len(tensor))
        if not self.first:
            if len(tensor):
                dist.send(_bytes(tensor), 0, group=self._group)
            return tensor
        parts = [tensor]
        for rank, length in enumerate(lengths[1:], 1):
            if length:
                part = torch.empty(length, dtype=tensor.dtype, device="cpu")
                dist.recv(_bytes(part), rank, group=self._group)
                parts.append(part.to(tensor.device))
        return torch.cat(parts)

    def collect(self, batches: list[Inputs]) -> list[Inputs]:
        """All processes' batches on every process, as a single one would have captured them.

        Args:
            batches: tuples of tensors ``[tokens, ...]``, equal in number, dtype and trailing sizes everywhere.
        """
        if self.size == 1:
            return batches
        lengths = self.everyones([len(batch[0]) for batch in batches])
        columns = [list(column) for column in zip(*batches, strict=True)]
        shares = [self._broadcast(rank, lengths[rank], columns) for rank in range(self.size)]
        return [batch for batch in chain.from_iterable(zip_longest(*shares)) if batch is not None]

    def _broadcast(self, rank: int, lengths: Sequence[int], columns: list[list[torch.Tensor]]) -> list[Inputs]:
        """One process's batches on all of them; ``columns`` are this one's, which tell dtypes and sizes."""
        made = []
        for column in columns:
            like = column[0]
            whole = torch.empty(sum(lengths), *like.shape[1:], dtype=like.dtype, device="cpu")
            if rank == self.rank:
                whole = torch.cat(column).cpu().contiguous()
            dist.broadcast(_bytes(whole), rank, group=self._group)
            made.append(whole.to(like.device).split(list(lengths)))
        return list(zip(*made, strict=True))


@contextlib.contextmanager
def torchrun_job(device: str) -> Iterator[Ranks]:
    """The job that torchrun started this process for, while the block lasts; elsewhere a job of this one process.

    Args:
        device: that the processes compute on; of "cuda", each takes the one of its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Ranks()
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


def share(batches: Sequence[T], ranks: Ranks | None = None) -> list[T]:
    """This process's part of the calibration batches: every n-th of them, for n processes.

    Raises:
        CalibrationError: when there are fewer batches than processes.
    """
    ranks = ranks or Ranks()
    if len(batches) < ranks.size:
        raise CalibrationError(
            f"{len(batches)} calibration batches are too few for {ranks.size} processes; use more rows, "
            "smaller batches or fewer processes"
        )
    return list(batches[ranks.rank :: ranks.size])


def check_shares(digests: Sequence[dict[str, Any]]) -> None:
    """Refuse processes that calibrate with the same rows.

    Args:
        digests: `fingerprint.rows_digest` of every process.

    Raises:
        CalibrationError: saying how to deal the rows out.
    """
    found = [digest["sha256"] for digest in digests]
    if len(set(found)) < len(found):
        raise CalibrationError(
            f"{len(found)} processes calibrate with the same rows, as llm-compressor's own loaders give them; pass "
            "each a dataloader over bitsmoe_modifier.method.distributed.share(batches)"
        )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes on the CPU (gloo knows few dtypes); shares memory where it can."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8)
