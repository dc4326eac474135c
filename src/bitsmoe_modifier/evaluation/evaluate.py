"""Measure a checkpoint against the recorded predictions of the unquantized model."""

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ..errors import BitsMoEError, CheckpointError
from ..loading.decoding import load_decoded, misread_experts
from ..loading.source import load_source
from ..sources.classes import load_published
from ..sources.precision import is_low_precision_source
from .metrics import Summary, TokenMetrics, chunks, summarize, token_metrics
from .reference import Reference


def load_model(path: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A checkpoint of any kind, for evaluation: as the class that its config.json names.

    Where transformers would read packed experts wrongly they are decoded by `decoding` instead.

    Raises:
        CheckpointError: when weights would be made up (`load_published`).
        BitsMoEError: when the device cannot hold the model.
    """
    try:
        return _loaded(path, dtype).to(device).eval()
    except torch.OutOfMemoryError as error:
        raise BitsMoEError(
            f"{path}: {device} cannot hold the whole model in {str(dtype).removeprefix('torch.')}; give --device cpu "
            f"--dtype bfloat16 ({str(error).splitlines()[0]})"
        ) from error


def _loaded(path: str, dtype: torch.dtype) -> Any:
    if is_low_precision_source(Path(path)):
        return load_source(Path(path), dtype)
    if misread_experts(Path(path)):
        return load_decoded(Path(path), dtype)
    return load_published(path, dtype=dtype)


@torch.no_grad()
def evaluate(
    model: Any, rows: torch.Tensor, reference: Reference, batch_size: int, desc: str = "Evaluating"
) -> Summary:
    """Perplexity of ``model`` on the rows, and how far its predictions are from the reference's.

    In memory at a time: the logits of one batch, and float32 log-probabilities of 64 MB worth of positions.

    Args:
        model: a causal language model of transformers.
        rows: int64 ``[n, T]``, the first rows of those that the reference was recorded on.
        reference: recorded predictions.
        batch_size: rows per forward pass.
        desc: title of the progress bar.

    Raises:
        CheckpointError: when a prediction is not a number, with which no mean is one.
    """
    device = model.device
    reference = reference.to(device)
    parts: list[TokenMetrics] = []
    with tqdm(total=len(rows), desc=desc, unit="row") as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            logits = model(input_ids=batch.to(device), use_cache=False).logits[:, :-1].flatten(0, 1)
            target = batch[:, 1:].flatten().to(device)
            at = slice(start, start + len(batch))
            for part in chunks(len(target), reference.vocabulary):
                theirs = reference.logits(at, part).to(device)
                parts.append(token_metrics(logits[part], theirs, target[part]))
            bar.update(len(batch))
    measured = _joined(parts, len(rows))
    lost = int((~measured.kld.isfinite()).sum())
    if lost:
        raise CheckpointError(
            f"the predictions of {lost} of {measured.kld.numel()} positions have no divergence (NaN or infinity): "
            "weights are damaged, or numbers leave the range of what is computed in; try another --dtype"
        )
    return summarize(measured)


@torch.no_grad()
def evaluate_reference(rows: torch.Tensor, reference: Reference, batch_size: int) -> Summary:
    """The reference's own figures, from what was recorded: no forward pass, and by definition no divergence."""
    parts = []
    for start in tqdm(range(0, len(rows), batch_size), desc="Reference's perplexity"):
        batch = rows[start : start + batch_size]
        target = batch[:, 1:].flatten()
        for part in chunks(len(target), reference.vocabulary):
            logits = reference.logits(slice(start, start + len(batch)), part).float()
            parts.append(cross_entropy(logits, target[part].to(logits.device), reduction="none").cpu())
    nll = torch.cat(parts).view(len(rows), -1)
    return summarize(
        TokenMetrics(nll, torch.zeros_like(nll), torch.ones_like(nll, dtype=torch.bool), torch.zeros_like(nll))
    )


def _joined(parts: list[TokenMetrics], rows: int) -> TokenMetrics:
    """Consecutive positions put together as ``[rows, positions]``."""
    return TokenMetrics(
        nll=torch.cat([p.nll for p in parts]).view(rows, -1),
        kld=torch.cat([p.kld for p in parts]).view(rows, -1),
        agree=torch.cat([p.agree for p in parts]).view(rows, -1),
        excess=torch.cat([p.excess for p in parts]).view(rows, -1),
    )
