"""`benchmarks/prediction.py`: tables are read, and a power law is found again."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from prediction import Loss, fit, read

PAGE = """
| model | bits | KLD |
|---|---|---|
| other | 1 | 2 |

| model | bits | costs x1000 | predicted x1000 | measured x1000 |
|---|---|---|---|---|
| a b | 1.25 | 2.0 | 1 | 4.5 (calibration text) |
| c | 2 | 0.5 | 1 | 0.25 |

| c | 3 | 1 | 1 | 1 |
"""


def test_only_tables_of_costs_are_read() -> None:
    assert read(PAGE) == [Loss("a b", 1.25, 2.0, 4.5), Loss("c", 2.0, 0.5, 0.25)]


def test_a_power_law_is_found() -> None:
    factor, power = fit([Loss("m", 2.0, cost, 1.8 * cost**1.26) for cost in (0.3, 1.0, 4.0)])
    assert (factor, power) == pytest.approx((1.8, 1.26))
