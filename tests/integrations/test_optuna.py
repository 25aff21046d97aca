"""A search with Optuna ends the runs that it prunes, on one process and on two."""

from pathlib import Path

import pytest
import torch
from launching import run, torchrun

from pytorch_accelerated.errors import StopTrainingError

optuna = pytest.importorskip("optuna")

SCRIPTS = str(Path(__file__).parent / "scripts")

FINISHED = (3, False, ["ended"])
PRUNED = (1, False, ["stopped", "ended"])
EXPECTED = [(0.25, *FINISHED), (0.2, *FINISHED), (0.01, *PRUNED), (0.02, *PRUNED)]


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import optuna_cases

    return optuna_cases


def test_a_pruned_run_ends_in_order_and_the_search_goes_on(cases, capsys):
    search = cases.Search()
    study = search.run()

    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED"]
    assert search.seen == EXPECTED
    assert study.trials[0].intermediate_values == {
        epoch: pytest.approx(0.25 ** (epoch + 1)) for epoch in range(3)
    }
    output = capsys.readouterr()
    assert "Pruned by Optuna after epoch 1, for its eval_loss_epoch" in output.out
    assert "Traceback" not in output.out + output.err


def test_what_is_raised_is_known_to_optuna_and_to_us(cases):
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=0.1))
    study.enqueue_trial({"lr": 0.01})
    with pytest.raises(optuna.TrialPruned) as pruned:
        cases.Search().objective(study.ask())
    assert isinstance(pruned.value, StopTrainingError)


def test_a_metric_that_is_not_recorded_is_an_error_that_lists_what_is(cases):
    trial = optuna.create_study().ask()
    with pytest.raises(ValueError, match=r"'accuracy' has not .* eval_loss_epoch, "):
        cases.Search("accuracy").objective(trial)


def test_two_processes_end_the_same_runs_at_the_same_epochs(tmp_path):
    launched = run(
        torchrun(2, "cases.py", "optuna_cases", tmp_path, "search"), tmp_path
    )
    assert launched.code == 0, launched.output[-6000:]

    main, other = (torch.load(tmp_path / f"search_{rank}.bin") for rank in (0, 1))
    assert main["states"] == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED"]
    assert main["seen"] == other["seen"] == EXPECTED
    assert "Traceback" not in launched.output
