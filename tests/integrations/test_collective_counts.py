"""How often the library makes processes wait for each other, beyond DDP's averaging."""

import pytest
import torch
from launching import run, torchrun

CASES = (
    *("plain", "default_callbacks", "accumulated", "clipped", "counted_items"),
    *("callback_of_updates", "training_states"),
)


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counts")
    launched = run(torchrun(2, "cases.py", "counting_cases", folder, *CASES), folder)
    assert launched.code == 0, launched.output[-6000:]

    def read(name):
        content = torch.load(folder / f"{name}_0.bin")
        if isinstance(content, str):
            pytest.fail(content)
        return content

    return read


@pytest.mark.parametrize("case", ["plain", "accumulated", "clipped", "training_states"])
def test_no_update_costs_a_collective_of_ours(counts, case):
    assert counts(case)["per_update"] == 0


@pytest.mark.parametrize("case", ["counted_items", "callback_of_updates"])
def test_an_update_costs_one_collective_where_processes_must_agree(counts, case):
    assert counts(case)["per_update"] == 1


def test_the_default_callbacks_cost_less_than_one_collective_per_update(counts):
    assert counts("default_callbacks")["per_update"] < 1


@pytest.mark.parametrize("case", CASES)
def test_what_is_exchanged_does_not_grow_with_the_model(counts, case):
    assert counts(case)["largest"] == 1


def test_an_epoch_costs_a_fixed_number_of_collectives(counts):
    """The table in docs/scaling.md: 7 agreements and 2 exchanges of losses."""
    assert counts("plain")["per_epoch"] == 9
    assert counts("default_callbacks")["per_epoch"] <= 12
