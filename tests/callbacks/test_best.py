import math

import numpy as np
import pytest
import torch

from pytorch_accelerated.callbacks import BestSoFar


def beaten(values, **kwargs):
    best = BestSoFar(**kwargs)
    return [best.update(value) for value in values], best.value


def test_a_smaller_value_is_better_by_default():
    assert beaten([2, 3, 1, 1]) == ([True, False, True, False], 1)


def test_a_greater_value_can_be_better():
    assert beaten([2, 3, 1], greater_is_better=True) == ([True, True, False], 3)


def test_an_improvement_must_exceed_the_threshold():
    assert beaten([1.0, 0.75, 0.5], threshold=0.25) == ([True, False, True], 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("greater_is_better", [True, False])
def test_what_is_not_finite_never_wins(bad, greater_is_better):
    """Defects 25 and 55: NaN as the first value blocked all others."""
    beats, value = beaten([bad, 1.0, bad], greater_is_better=greater_is_better)
    assert beats == [False, True, False]
    assert value == 1.0


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5])]
)
def test_numbers_of_numpy_and_torch_are_kept_as_plain_numbers(value):
    """Defect 25."""
    best = BestSoFar()
    assert best.update(value)
    assert type(best.value) is float
    assert best.value == 0.5
