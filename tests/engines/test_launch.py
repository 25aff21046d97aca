import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pytorch_accelerated.engines.launch import precision_of_its_own, use_precision


@pytest.fixture(autouse=True)
def fresh_state():
    """Let Accelerate's state of the process be as at its start, and put it back."""
    shared = AcceleratorState._shared_state
    before = dict(shared)
    shared.clear()
    yield
    shared.clear()
    shared.update(before)


def create(precision=None):
    with precision_of_its_own(precision):
        return Accelerator(mixed_precision=precision)


def test_the_launcher_says_what_is_meant_by_nothing(monkeypatch):
    create("no")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")

    assert create().mixed_precision == "bf16"
    assert create("no").mixed_precision == "no"


def test_the_precision_of_an_accelerator_of_the_user_is_taken_over():
    Accelerator(mixed_precision="bf16")

    assert create().mixed_precision == "bf16"
    assert create().mixed_precision == "bf16"
    assert create("no").mixed_precision == "no"


def test_a_run_of_an_earlier_accelerator_uses_its_own_precision_again():
    first, second = create("bf16"), create("no")
    assert first.mixed_precision == "no"  # of the process, and so of all of them

    use_precision("bf16")
    assert first.mixed_precision == "bf16"

    use_precision("no")
    assert second.mixed_precision == "no"
