"""The running mean of a loss."""

import json
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytorch_accelerated.means import LossTracker

ordinary_floats = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)


def float_bits(value):
    return struct.pack("<d", value)


def test_the_average_weighs_each_loss_with_its_batch_size():
    tracker = LossTracker()
    tracker.update(1.0, batch_size=3)
    tracker.update(5.0, 1)

    assert tracker.average == tracker._average == 2.0  # as scripts for 0.1.61 know it
    tracker._average = 1.0
    assert tracker.loss_value == 5.0
    assert tracker.total_loss == 8.0
    assert tracker.running_count == 4
    assert tracker.totals() == (8.0, 4.0)


def test_tensors_numbers_and_tensor_sizes_may_be_mixed():
    tracker = LossTracker()
    tracker.update(1.0, 3)
    tracker.update(torch.tensor(5.0), 1)
    tracker.update(torch.tensor(2.0), torch.tensor(4))
    tracker.update(4.0, torch.tensor(2))
    tracker.update(0.5, 2)

    # 3 + 5 + 8 + 8 + 1 over 3 + 1 + 4 + 2 + 2
    assert tracker.totals() == (25.0, 12.0)
    assert tracker.average == 25.0 / 12.0


@pytest.mark.parametrize("empty_loss", [math.nan, 3.0, torch.tensor(math.nan)])
def test_an_empty_batch_adds_nothing(empty_loss):
    """Defect 45: a batch size of 0 was a ZeroDivisionError."""
    tracker = LossTracker()
    assert math.isnan(tracker.average), "and not a perfect loss"
    tracker.update(empty_loss, batch_size=0)
    assert math.isnan(tracker.average)

    tracker.update(2.0, batch_size=4)
    assert tracker.average == 2.0


@given(
    st.lists(st.tuples(ordinary_floats, st.integers(1, 4096)), min_size=1, max_size=30),
    st.booleans(),
)
def test_sums_are_taken_from_left_to_right_in_float64(batches, as_tensors):
    """Defect 45: totals passed through float32."""
    tracker, total, count = LossTracker(), 0.0, 0
    for loss, size in batches:
        as_float32 = torch.tensor(loss, dtype=torch.float32)
        total += as_float32.item() * size
        count += size
        tracker.update(as_float32 if as_tensors else as_float32.item(), size)

    assert float_bits(tracker.totals()[0]) == float_bits(total)
    assert tracker.average == total / count


def test_sums_begun_in_inference_mode_go_on_outside_of_it():
    tracker = LossTracker()
    with torch.inference_mode():
        tracker.update(torch.tensor(1.0), torch.tensor(2))
    tracker.update(torch.tensor(4.0), torch.tensor(1))
    assert tracker.average == 2.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_updates_never_wait_for_a_real_gpu():
    tracker = LossTracker()
    loss = torch.tensor(2.0, device="cuda", dtype=torch.bfloat16)
    size = torch.tensor(3, device="cuda")
    tracker.load_state_dict({"total_loss": 1.0, "running_count": 1.0})
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            tracker.update(loss, 2)
            tracker.update(loss, size)
            tracker.update(1.0, size)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tracker.totals() == (1.0 + 12.0 + 18.0 + 9.0, 1.0 + 6.0 + 18.0)


@given(
    st.lists(st.tuples(ordinary_floats, st.integers(1, 512)), min_size=2, max_size=20),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_tracking_goes_on_exactly_from_its_state(
    batches, loss_tensors, size_tensors, data
):
    def update(tracker, loss, size):
        tracker.update(
            torch.tensor(loss) if loss_tensors else loss,
            torch.tensor(size) if size_tensors else size,
        )

    stop = data.draw(st.integers(0, len(batches)))
    uninterrupted, first_half = LossTracker(), LossTracker()
    for loss, size in batches:
        update(uninterrupted, loss, size)
    for loss, size in batches[:stop]:
        update(first_half, loss, size)

    state = json.loads(json.dumps(first_half.state_dict()))
    resumed = LossTracker()
    resumed.update(9.0, 9)
    resumed.load_state_dict(state)
    for loss, size in batches[stop:]:
        update(resumed, loss, size)

    assert float_bits(resumed.average) == float_bits(uninterrupted.average)
    assert resumed.totals() == uninterrupted.totals()
