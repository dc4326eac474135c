"""Stored steps: the byte of format version 2 against what docs/format.md says of it."""

import numpy as np
import pytest
import torch

from bitsmoe_modifier.storage.steps import GREATEST_STEP, LEAST_STEP, step_values, storable_steps, stored_steps

EVERY = torch.arange(256, dtype=torch.uint8)


def test_every_byte_is_a_step() -> None:
    code = EVERY.numpy().astype(np.float64)
    expected = (1 + code % 8 / 8) * 2.0 ** (code // 8 - 23)
    values = step_values(EVERY)
    assert values.dtype == torch.float32
    assert values.double().tolist() == expected.tolist()
    assert (float(values[0]), float(values[-1])) == (LEAST_STEP, GREATEST_STEP)
    assert torch.equal(stored_steps(values, torch.uint8), EVERY)
    assert torch.equal(storable_steps(values), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_steps_go_to_the_nearest(dtype: torch.dtype) -> None:
    steps = torch.logspace(-8, 3, 4001, dtype=torch.float64).to(dtype)
    rounded = storable_steps(steps)
    distance = (step_values(EVERY)[None].double() - steps.double()[:, None]).abs()
    assert torch.equal((rounded.double() - steps.double()).abs(), distance.amin(1))


def test_ties_go_to_even_and_the_range_ends() -> None:
    between = torch.tensor([17 / 16, 19 / 16, 31 / 16])
    assert storable_steps(between).tolist() == [1.0, 1.25, 2.0]
    assert storable_steps(torch.tensor([0.0, 1e-30, 1e9])).tolist() == [LEAST_STEP, LEAST_STEP, GREATEST_STEP]


def test_steps_of_version_1_are_kept() -> None:
    steps = torch.rand(64).half()
    assert torch.equal(step_values(steps), steps.float())
    assert torch.equal(stored_steps(steps.float(), torch.float16), steps)
