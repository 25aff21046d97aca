import inspect
import warnings

import pytest
from torch import nn

from pytorch_accelerated.errors import TrainingWarning, warn
from pytorch_accelerated.trainer import Trainer


def test_a_warning_points_at_the_line_of_the_user():
    """Not at a line of the library, however many of its calls are in between."""
    fp16 = {"mixed_precision": "fp16"}
    with pytest.warns(TrainingWarning, match="no effect on a CPU") as caught:
        Trainer(nn.Linear(1, 1), None, None, [], accelerator_kwargs=fp16)
    line = inspect.currentframe().f_lineno - 1
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)


def test_one_line_makes_all_warnings_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        with pytest.raises(TrainingWarning, match="something"):
            warn("something")
