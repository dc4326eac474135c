"""`benchmarks/prediction.py`: tables are read, and a factor is found again."""

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


def test_every_model_counts_the_same() -> None:
    """However many sizes of it were measured: factors 1 and 4 have the geometric mean 2."""
    many = [Loss("many", 2.0, cost, cost) for cost in (0.3, 1.0, 4.0)]
    assert fit(many) == pytest.approx(1.0)
    assert fit([*many, Loss("one", 2.0, 0.5, 2.0)]) == pytest.approx(2.0)
