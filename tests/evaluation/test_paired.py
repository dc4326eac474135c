"""Paired differences against their definitions and against resampling."""

import doctest
import math

import pytest
import torch
from scipy.stats import ttest_rel

from bitsmoe_modifier.evaluation import paired as module
from bitsmoe_modifier.evaluation.paired import mean, paired


def test_the_examples_of_the_docstrings():
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("seed", range(5))
def test_mcnemar_is_the_tail_of_fair_coins_and_the_error_that_of_the_paired_t_test(seed):
    gen = torch.Generator().manual_seed(seed)
    reference = (torch.rand(60, generator=gen) < 0.6).double()
    flips = torch.rand(60, generator=gen) < 0.3
    model = torch.where(flips, 1 - reference, reference)
    found = paired(model.tolist(), reference.tolist())
    gained, lost = int(((model == 1) & (reference == 0)).sum()), int(((model == 0) & (reference == 1)).sum())
    assert (found.only_model, found.only_reference) == (gained, lost)
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    assert found.p_value == pytest.approx(min(1.0, 2 * tail / 2**n))
    assert found.difference / found.stderr == pytest.approx(ttest_rel(model, reference).statistic)


def test_the_standard_error_is_that_of_resampled_items():
    gen = torch.Generator().manual_seed(0)
    scores = (torch.rand(400, generator=gen) < 0.64).double()
    resampled = scores[torch.randint(400, (4000, 400), generator=gen)].mean(1).std()
    # the spread of 4000 draws is known to about 1 / sqrt(8000), 1.1 %
    assert mean(scores.tolist()).stderr == pytest.approx(float(resampled), rel=0.05)


def test_equal_answers_say_nothing():
    found = paired([1, 0, 1], [1, 0, 1])
    assert (found.difference, found.p_value) == (0, 1)


def test_scores_that_are_not_right_or_wrong_have_no_mcnemar():
    assert paired([0.5, 1.0], [0.25, 1.0]).p_value is None


def test_different_items_are_refused():
    with pytest.raises(ValueError, match="zip"):
        paired([1, 0], [1])
