"""R12: a run that is stopped at any update and resumed ends as if never stopped."""

import pytest
from scenario import Scenario, difference, fingerprint

from pytorch_accelerated import checkpoint

loads_again = pytest.mark.filterwarnings("ignore:To find its place")


@pytest.mark.fault("resume from every update and epoch of a run")
@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(Scenario(), id="accumulation 3"),
        pytest.param(Scenario(accumulation=1), id="no accumulation"),
        pytest.param(Scenario(num_workers=2, num_epochs=2), id="2 workers"),
        pytest.param(Scenario(precision="bf16"), id="bf16"),
        pytest.param(Scenario(saves_in_windows=True), id="in windows"),
        pytest.param(
            Scenario(saves_in_windows=True, counts_items=True),
            id="in windows of counted items",
        ),
        pytest.param(Scenario(in_memory=True), id="in memory"),
        pytest.param(Scenario(seed=None), id="no seed"),
        pytest.param(
            Scenario(own_loader=True),
            id="a loader with a generator",
            marks=loads_again,
        ),
        pytest.param(
            Scenario(own_loader=True, own_generator=False),
            id="a loader without a generator",
            marks=loads_again,
        ),
    ],
)
def test_a_run_resumed_at_any_update_ends_as_if_never_stopped(
    scenario, tmp_path, trials
):
    undisturbed = fingerprint(scenario.run(tmp_path / "whole"))
    states = checkpoint.list_checkpoints(tmp_path / "whole" / "states")
    in_windows = [each for each in states if each.path.name.startswith("window_")]
    assert bool(in_windows) == scenario.saves_in_windows
    at_updates = len(states) - len(in_windows)
    assert at_updates == undisturbed["progress"][0] + scenario.num_epochs + 1
    scenario = scenario.with_(save_every_n_steps=None, saves_in_windows=False)
    for number, state in enumerate(states):
        trainer = scenario.run(tmp_path / f"{number}", resume_from=state.path)
        trials.add(difference(undisturbed, fingerprint(trainer)))
