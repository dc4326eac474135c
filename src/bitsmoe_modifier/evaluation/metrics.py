"""How far a model's predictions are from the unquantized model's: per token, then over a text.

The primary figure is the Kullback-Leibler divergence KL(P ‖ Q) = Σ_v P(v) (log P(v) − log Q(v)) in nats, P the
unquantized model's next-token distribution and Q the quantized one's. It compares the whole distribution at every
position, so it separates models long before perplexity does, which looks at one token of the distribution and where a
wrong model can be right by chance. Mean, median and 90th percentile are given because the mean is carried by few
positions. Top-1 agreement is the share of positions where both models would say the same token.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class TokenMetrics:
    """What is measured at every position.

    Attributes:
        nll: float32 ``[...]``, −log Q(next token), nats.
        kld: float32 ``[...]``, KL(P ‖ Q), nats.
        agree: bool ``[...]``, whether both models' likeliest tokens are the same.
        excess: float32 ``[...]``, ``nll`` less that of P, nats.
    """

    nll: torch.Tensor
    kld: torch.Tensor
    agree: torch.Tensor
    excess: torch.Tensor


def token_metrics(logits: torch.Tensor, reference: torch.Tensor, target: torch.Tensor) -> TokenMetrics:
    """Compare two models' logits at some positions.

    Args:
        logits: the quantized model's, any float dtype ``[n, V]``.
        reference: the unquantized model's, any float dtype ``[n, V]``.
        target: the token that follows, int64 ``[n]``.
    """
    q = torch.log_softmax(logits.float(), -1)
    p = torch.log_softmax(reference.float(), -1)
    # where P is 0 the term is 0, also if log P is −inf
    kld = (p.exp() * torch.where(p == -torch.inf, 0.0, p - q)).sum(-1)
    nll, theirs = (-logs.gather(-1, target[:, None])[:, 0] for logs in (q, p))
    agree = q.argmax(-1) == p.argmax(-1)
    return TokenMetrics(nll=nll.cpu(), kld=kld.cpu(), agree=agree.cpu(), excess=(nll - theirs).cpu())


@dataclass(frozen=True)
class Summary:
    """The figures of one model over a text.

    Standard errors are over rows (positions of a row are not independent); None for one row.

    Attributes:
        tokens: positions measured.
        perplexity: exp of the mean negative log-likelihood.
        perplexity_stderr: standard error of its distance from the unquantized model's: both read the same text, so what
            the text itself scatters is not in it.
        kld_mean, kld_median, kld_p90: of KL(P ‖ Q) over positions, nats.
        kld_stderr: of ``kld_mean``.
        kld_rows: the mean of every row, nats: two runs on the same rows are compared row by row (`columns.kld_error`).
        top1_agreement: share of positions, 0 to 1.
        top1_stderr: of it.
    """

    tokens: int
    perplexity: float
    perplexity_stderr: float | None
    kld_mean: float
    kld_median: float
    kld_p90: float
    kld_stderr: float | None
    kld_rows: tuple[float, ...]
    top1_agreement: float
    top1_stderr: float | None


def _stderr(values: torch.Tensor) -> float | None:
    """Of the mean of ``[rows, positions]``, over rows; None where it is not finite."""
    found = values.double().mean(1).std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return found if math.isfinite(found) else None


def summarize(measured: TokenMetrics) -> Summary:
    """Reduce metrics ``[rows, positions]`` to the figures of the report."""
    kld = measured.kld.double()
    median, p90 = np.quantile(kld.numpy(), (0.5, 0.9))  # torch.quantile stops at 2²⁴ values
    perplexity, spread = measured.nll.double().mean().exp().item(), _stderr(measured.excess)
    return Summary(
        tokens=kld.numel(),
        perplexity=perplexity,
        perplexity_stderr=None if spread is None else perplexity * spread,  # of the logarithm's: first order
        kld_mean=kld.mean().item(),
        kld_median=float(median),
        kld_p90=float(p90),
        kld_stderr=_stderr(kld),
        kld_rows=tuple(kld.mean(1).tolist()),
        top1_agreement=measured.agree.double().mean().item(),
        top1_stderr=_stderr(measured.agree),
    )


def chunks(n: int, vocabulary: int, megabytes: int = 64) -> Iterator[slice]:
    """Slices of ``n`` positions, each small enough for a float32 ``[positions, vocabulary]`` of so many megabytes."""
    size = max(1, megabytes * 2**20 // (4 * vocabulary))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
