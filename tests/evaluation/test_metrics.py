"""Metrics against direct computations in float64."""

import math

import pytest
import torch

from bitsmoe_modifier.evaluation.metrics import TokenMetrics, chunks, summarize, token_metrics


def direct_kld(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL divergence position by position, from probabilities."""
    out = []
    for r, q in zip(reference.double(), logits.double(), strict=True):
        p, q = torch.softmax(r, 0), torch.softmax(q, 0)
        out.append(sum(a * (a / b).log() for a, b in zip(p, q, strict=True) if a > 0))
    return torch.stack(out)


@pytest.mark.parametrize("vocabulary", [2, 7, 101])
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0], ids=["flat", "usual", "peaked"])
def test_token_metrics_match_a_direct_computation(vocabulary, scale):
    gen = torch.Generator().manual_seed(vocabulary)
    reference, logits = (scale * torch.randn(23, vocabulary, generator=gen) for _ in range(2))
    target = torch.randint(vocabulary, (23,), generator=gen)
    found = token_metrics(logits, reference, target)
    # float32 sums of up to 101 terms around 20 * scale
    torch.testing.assert_close(found.kld.double(), direct_kld(reference, logits), rtol=1e-4, atol=1e-5)
    nll = -torch.log(torch.softmax(logits.double(), 1)[torch.arange(23), target])
    torch.testing.assert_close(found.nll.double(), nll, rtol=1e-5, atol=1e-5)
    theirs = -torch.log(torch.softmax(reference.double(), 1)[torch.arange(23), target])
    torch.testing.assert_close(found.excess.double(), nll - theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.agree, reference.argmax(1) == logits.argmax(1))


def test_equal_models_have_no_divergence():
    logits = torch.randn(5, 11)
    found = token_metrics(logits, logits, torch.zeros(5, dtype=torch.int64))
    assert found.kld.abs().max() == 0
    assert found.agree.all()


def test_impossible_tokens_of_the_reference_count_nothing():
    reference = torch.tensor([[0.0, 0.0, -torch.inf]])
    logits = torch.zeros(1, 3)
    found = token_metrics(logits, reference, torch.tensor([0]))
    assert found.kld.item() == pytest.approx(math.log(3 / 2), rel=1e-6)


def test_divergence_has_a_direction():
    narrow, wide = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    target = torch.tensor([0])
    assert token_metrics(wide, narrow, target).kld.item() == pytest.approx(math.log(3), rel=0.01)
    assert token_metrics(narrow, wide, target).kld.item() > 2 * math.log(3)


def test_logits_of_low_precision_are_measured_in_float32():
    logits, reference = torch.randn(4, 50).bfloat16(), torch.randn(4, 50).bfloat16()
    target = torch.arange(4)
    low, high = token_metrics(logits, reference, target), token_metrics(logits.float(), reference.float(), target)
    assert torch.equal(low.kld, high.kld)


def test_summary_matches_numpy_statistics():
    import numpy as np

    gen = torch.Generator().manual_seed(0)
    kld = torch.rand(6, 17, generator=gen)
    nll = torch.rand(6, 17, generator=gen)
    agree = torch.rand(6, 17, generator=gen) > 0.3
    excess = torch.rand(6, 17, generator=gen)
    found = summarize(TokenMetrics(nll, kld, agree, excess))
    values = kld.double().numpy()
    assert found.tokens == 102
    assert found.kld_mean == pytest.approx(values.mean())
    assert found.kld_median == pytest.approx(np.median(values))
    assert found.kld_p90 == pytest.approx(np.quantile(values, 0.9))
    assert found.kld_stderr == pytest.approx(values.mean(1).std(ddof=1) / math.sqrt(6))
    assert found.kld_rows == pytest.approx(values.mean(1).tolist())
    assert found.perplexity == pytest.approx(math.exp(nll.double().mean()))
    assert found.top1_agreement == pytest.approx(agree.double().mean())
    assert found.top1_stderr == pytest.approx(agree.double().mean(1).numpy().std(ddof=1) / math.sqrt(6))
    spread = excess.double().mean(1).numpy().std(ddof=1) / math.sqrt(6)
    assert found.perplexity_stderr == pytest.approx(found.perplexity * spread)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_summary_of_few_positions(n):
    values = torch.arange(float(n)).view(1, n)
    found = summarize(TokenMetrics(values, values, values > -1, values))
    assert (found.kld_stderr, found.perplexity_stderr, found.top1_stderr) == (None, None, None)
    assert found.kld_median == pytest.approx((n - 1) / 2)
    assert found.kld_p90 == pytest.approx(0.9 * (n - 1))


@pytest.mark.parametrize(
    ("n", "vocabulary", "megabytes"), [(10, 2**20, 64), (1, 5, 64), (7, 2**26, 64), (40, 2**18, 8)]
)
def test_chunks_cover_all_positions_within_the_memory(n, vocabulary, megabytes):
    parts = list(chunks(n, vocabulary, megabytes))
    assert [i for part in parts for i in range(n)[part]] == list(range(n))
    for part in parts:
        length = part.stop - part.start
        assert length == 1 or 4 * vocabulary * length <= megabytes * 2**20
