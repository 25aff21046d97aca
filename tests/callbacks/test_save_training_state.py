import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from unittest.mock import MagicMock

import pytest
import torch
from toys import At, Keeps

from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    TrainerCallback,
)
from pytorch_accelerated.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_file,
    newest,
)
from pytorch_accelerated.errors import CheckpointError, StopTrainingError
from pytorch_accelerated.state import TrainingState


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name != ".lock")


@pytest.fixture
def run(create_trainer, samples, tmp_path):
    """Train, with an update for each sample, and save a state after each epoch."""

    def run(num_epochs, resume_from=None, *, num_samples=1, **kwargs):
        folder, others = kwargs.pop("folder", tmp_path), kwargs.pop("others", ())
        accumulation = kwargs.pop("accumulation", 1)
        saving = SaveTrainingStateCallback(
            folder, **{"save_every_n_epochs": 1, **kwargs}
        )
        trainer = create_trainer([saving, *others])
        trainer.train(
            samples(num_samples),
            num_epochs,
            eval_dataset=samples(1),
            per_device_batch_size=1,
            gradient_accumulation_steps=accumulation,
            resume_from=resume_from,
        )
        return trainer

    return run


def test_an_epoch_is_saved_after_its_evaluation(run, tmp_path):
    """Defect 47: it was saved before."""
    log = Keeps("on_eval_epoch_end", lambda trainer, **_: names_in(tmp_path))
    run(2, others=[log])
    assert log.kept == [[], ["epoch_1"]]
    metrics = Checkpoint(tmp_path / "epoch_2").metrics
    assert metrics["eval_loss_epoch"] == 0.25**2


def test_states_are_saved_every_n_updates_of_the_whole_run(run, tmp_path):
    trainer = run(2, num_samples=3, save_every_n_epochs=2, save_every_n_steps=2)
    saved = ["epoch_2", "final", "step_2", "step_4", "step_6"]
    assert names_in(tmp_path) == saved
    (saving,) = trainer.callback_handler
    for name in saved:
        assert Checkpoint(tmp_path / name).saved_by == [saving.identity]
    assert saving.save_dir == tmp_path
    assert {path.name for path in saving._saved_checkpoints} == {*saved} - {"final"}
    # Saved after the update: two of them have halved the weight twice.
    weights = Checkpoint(tmp_path / "step_2").load_weights()
    assert weights["weight"].item() == 0.5**2


def test_steps_are_updates_and_not_batches(run, tmp_path):
    trainer = run(1, num_samples=5, accumulation=2, save_every_n_steps=1)
    assert names_in(tmp_path) == ["epoch_1", "final", "step_1", "step_2", "step_3"]
    (saving,) = trainer.callback_handler
    assert saving._global_step == 3


def test_states_are_saved_every_n_minutes(run, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(
        "pytorch_accelerated.callbacks.checkpointing.time.monotonic", lambda: now[0]
    )

    def be_slow(trainer, **kwargs):
        now[0] += 40

    slow = At(on_train_step_start=be_slow)
    run(1, num_samples=5, others=[slow], save_every_n_minutes=1)
    assert names_in(tmp_path) == ["epoch_1", "final", "step_2", "step_4"]


def test_a_resumed_run_goes_on_with_the_numbers(run, tmp_path):
    """Defect 8: they started again at 0, and overwrote older directories."""
    run(1, num_samples=3)
    trainer = run(
        *(2, tmp_path / "epoch_1"),
        num_samples=3,
        save_every_n_epochs=None,
        save_every_n_steps=2,
    )
    assert names_in(tmp_path) == ["epoch_1", "final", "step_4", "step_6"]
    assert trainer.load_training_state(tmp_path / "step_6")["global_step"] == 6


def test_only_the_newest_are_kept(run, tmp_path):
    trainer = run(3, num_samples=2, save_every_n_steps=3, max_checkpoints=2)
    assert names_in(tmp_path) == ["epoch_3", "final", "step_6"]
    (saving,) = trainer.callback_handler
    kept = [path.name for path in saving._saved_checkpoints]
    assert sorted(kept) == ["epoch_3", "step_6"]


def test_auto_goes_on_with_the_run_that_started_last(run, tmp_path):
    """A longer run in the same folder, with more updates, is not newer."""
    run(4)
    (tmp_path / "final").rename(tmp_path / "kept")
    run(2, overwrite=True)
    assert newest(tmp_path).path.name == "final"
    assert run(3, resume_from="auto").num_updates == 3
    assert [each.path.name for each in list_checkpoints(tmp_path)] == [
        *("epoch_4", "kept", "epoch_1", "epoch_2", "epoch_3", "final")
    ]


def test_the_best_epochs_are_kept_besides_the_newest(train_with_scores, tmp_path):
    saving = SaveTrainingStateCallback(
        tmp_path,
        save_every_n_epochs=1,
        save_every_n_steps=1,
        save_at_end=False,
        max_checkpoints=1,
        keep_best=2,
        watch_metric="score",
        greater_is_better=True,
    )
    train_with_scores([saving], [5, 1, 7, float("nan"), 2, 3])
    assert names_in(tmp_path) == ["epoch_1", "epoch_3", "epoch_6"]


def test_the_best_epochs_of_an_earlier_run_are_known(train_with_scores, tmp_path):
    def run(scores, **kwargs):
        saving = SaveTrainingStateCallback(
            tmp_path,
            save_every_n_epochs=1,
            save_at_end=False,
            max_checkpoints=1,
            keep_best=1,
            watch_metric="score",
        )
        train_with_scores([saving], scores, **kwargs)

    run([1, 0, 2])
    run([None, None, None, 3, 4], resume_from="auto")
    assert names_in(tmp_path) == ["epoch_2", "epoch_5"]


def test_a_state_that_cannot_be_deleted_is_a_warning(run, monkeypatch):
    def refuse(path):
        raise PermissionError("not yours")

    monkeypatch.setattr(
        "pytorch_accelerated.checkpoint.directory.remove_folder", refuse
    )
    with pytest.warns(UserWarning, match="epoch_1 could not be deleted .not yours"):
        run(2, max_checkpoints=1)


def test_it_can_be_called_by_hand_with_only_the_step(tmp_path):
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_steps=2)
    trainer = MagicMock(scheduler=None, optimizer=None)
    trainer.callback_handler.state_dict.return_value = {}
    trainer.get_model.return_value = torch.nn.Linear(1, 1)
    for step in range(5):
        saving.on_train_step_end(trainer, step=step)
    saved = [call.args[0] for call in trainer.save_training_state.call_args_list]
    assert saved == [tmp_path / "step_2", tmp_path / "step_4"]
    assert saving._global_step == 5
    assert trainer.save_training_state.call_args.kwargs == {
        "checkpoint_kwargs": {"global_step": 4}
    }


def test_the_final_state_is_the_last_and_not_the_best(train_with_scores, tmp_path):
    best = SaveBestModelCallback(tmp_path / "best.pt", watch_metric="score")
    saving = SaveTrainingStateCallback(tmp_path / "states")
    trainer = train_with_scores([best, saving], [0, 1, 2])
    assert trainer.get_model().weight.item() == 0.5
    final = Checkpoint(tmp_path / "states" / "final").load_weights()
    assert final["weight"].item() == 0.5**3


def test_the_state_of_callbacks_listed_later_is_that_of_the_saved_epoch(
    train_with_scores, tmp_path
):
    """Defect 47: counters and the best value were not saved."""
    saving = SaveTrainingStateCallback(tmp_path / "states", save_every_n_epochs=1)
    stopping = EarlyStoppingCallback(5, watch_metric="score")
    best = SaveBestModelCallback(tmp_path / "best.pt", watch_metric="score")
    train_with_scores([saving, stopping, best], [3, 1, 2, 2])

    stopping = EarlyStoppingCallback(5, watch_metric="score")
    best = SaveBestModelCallback(tmp_path / "best.pt", watch_metric="score")
    train_with_scores(
        [stopping, best],
        [None, None, None, 2, 2],
        resume_from=tmp_path / "states" / "epoch_3",
    )
    assert stopping.early_stopping_patience_counter == 3
    assert (best.best_metric, best.best_metric_epoch) == (1, 2)


def fail(trainer):
    raise RuntimeError("broken")


def stop(trainer):
    raise StopTrainingError("enough")


def interrupt(trainer):
    trainer.interrupted = True


@pytest.mark.parametrize(
    ("ending", "saved"), [(fail, []), (stop, ["final"]), (interrupt, ["step_1"])]
)
def test_what_is_saved_at_the_end_depends_on_how_a_run_ends(
    run, tmp_path, ending, saved
):
    """Of one that was interrupted, a step to resume from."""
    with pytest.raises(RuntimeError) if ending is fail else nullcontext():
        run(1, save_every_n_epochs=None, others=[At(on_train_epoch_end=ending)])
    assert names_in(tmp_path) == saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save_every_n_epochs": 0}, "save_every_n_epochs must be at least 1, got 0"),
        ({"save_every_n_steps": 0}, "save_every_n_steps must be at least 1, got 0"),
        ({"max_checkpoints": 0}, "max_checkpoints must be at least 1, got 0"),
        ({"save_every_n_minutes": 0}, "save_every_n_minutes must be above 0, got 0"),
        ({"keep_best": 2}, "keep_best=2 has no meaning while all are kept"),
    ],
)
def test_arguments_without_meaning_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SaveTrainingStateCallback(**arguments)


# ------------------------------------------------------- whose states are in a folder


def test_a_fresh_run_does_not_start_among_the_states_of_another_found_83(
    create_trainer, samples, run, tmp_path
):
    """found 83: it counted, replaced and deleted them."""
    run(5)
    before = {name: Checkpoint(tmp_path / name).run_id for name in names_in(tmp_path)}

    saving = SaveTrainingStateCallback(
        tmp_path, save_every_n_epochs=1, max_checkpoints=1
    )
    trainer = create_trainer([saving])
    with pytest.raises(
        CheckpointError,
        match=r"holds training states of another run \(epoch_4, epoch_5, final\).*"
        r"resume_from='auto'.*another folder.*overwrite=True",
    ):
        trainer.train(samples(1), num_epochs=2)

    assert trainer.model.weight.item() == 1.0
    assert {n: Checkpoint(tmp_path / n).run_id for n in names_in(tmp_path)} == before
    assert not (tmp_path / ".lock").exists()


def test_a_run_that_may_overwrite_deletes_nothing_of_another_found_83(run, tmp_path):
    first = run(5)._run_id
    second = run(2, max_checkpoints=1, overwrite=True)._run_id

    ids = {name: Checkpoint(tmp_path / name).run_id for name in names_in(tmp_path)}
    assert ids == {
        **dict.fromkeys(("epoch_3", "epoch_4", "epoch_5"), first),
        **dict.fromkeys(("epoch_2", "final"), second),
    }


def test_a_resumed_run_is_the_one_that_it_goes_on_from_found_83(run, samples, tmp_path):
    """So are further runs of its trainer; a state of another name is the user's."""
    states = tmp_path / "states"
    run(2, folder=states, max_checkpoints=2)
    shutil.copytree(states / "final", tmp_path / "backup")
    (states / "epoch_1").rename(states / "kept")
    # of this very run: nothing to refuse
    trainer = run(3, tmp_path / "backup", folder=states, max_checkpoints=2)
    assert names_in(states) == ["epoch_2", "epoch_3", "final", "kept"]
    trainer.train(samples(1), num_epochs=1)
    assert names_in(states) == ["epoch_1", "epoch_3", "final", "kept"]


def test_going_on_from_elsewhere_is_no_leave_to_replace_states_found_83(run, tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    run(1, folder=mine)
    run(1, folder=theirs)
    with pytest.raises(CheckpointError, match="of another run"):
        run(2, mine / "final", folder=theirs)


def test_auto_starts_afresh_where_nothing_is_whole_found_83(run, tmp_path):
    run(1, save_every_n_epochs=None)
    (tmp_path / "final" / "run.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="passed over"):
        run(1, "auto")
    Checkpoint(tmp_path / "final").verify()


def test_states_of_the_published_version_are_another_run_s_found_83(run, tmp_path):
    legacy = tmp_path / "epoch_1"
    legacy.mkdir()
    for name in ("model.safetensors", "random_states_0.pkl"):
        (legacy / name).write_bytes(b"theirs")
    with pytest.raises(CheckpointError, match=r"another run \(epoch_1\)"):
        run(1)
    assert (legacy / "model.safetensors").read_bytes() == b"theirs"


@pytest.mark.parametrize("keeper_is_first", [True, False])
def test_of_two_callbacks_in_a_folder_one_may_keep_all_found_83(
    create_trainer, samples, tmp_path, keeper_is_first
):
    """found 83: after a resume, those of the one that keeps all were deleted."""

    def run(num_epochs, is_reversed=False):
        callbacks = [
            SaveTrainingStateCallback(tmp_path, save_every_n_epochs=2),
            SaveTrainingStateCallback(
                tmp_path, save_every_n_epochs=1, max_checkpoints=1
            ),
        ]
        if keeper_is_first == is_reversed:
            callbacks.reverse()
        create_trainer(callbacks).train(
            samples(1), num_epochs=num_epochs, resume_from="auto"
        )
        return names_in(tmp_path)

    assert run(5) == ["epoch_2", "epoch_4", "epoch_5", "final"]
    assert run(7, is_reversed=True) == [
        *("epoch_2", "epoch_4", "epoch_6", "epoch_7", "final")
    ]


def test_a_failed_write_in_the_background_is_no_state_of_another_callback(
    create_trainer, samples, tmp_path
):
    """Each callback hears of the write that it began, and none lists what is not."""
    first, second = (
        SaveTrainingStateCallback(
            tmp_path / name, save_every_n_steps=1, save_at_end=False, asynchronous=True
        )
        for name in ("first", "second")
    )

    in_the_way = At(
        on_training_run_start=lambda trainer: (
            tmp_path / "first" / "step_1"
        ).write_text("mine")
    )
    with pytest.warns(UserWarning, match="step_1 is a file") as caught:
        create_trainer([first, second, in_the_way]).train(samples(1), num_epochs=2)
    assert len(caught) == 1
    assert names_in(tmp_path / "second") == ["step_1", "step_2"]
    Checkpoint(tmp_path / "first" / "step_2").verify()


def test_what_is_written_in_the_background_is_the_state_of_its_update(
    run, tmp_path, monkeypatch
):
    write, is_over = TrainingState.write, threading.Event()

    def write_late(self, *args):
        is_over.wait(10)
        write(self, *args)

    def at_update(trainer, num_updates, **kwargs):
        if num_updates == 2:
            is_over.set()

    monkeypatch.setattr(TrainingState, "write", write_late)
    run(2, others=[At(on_train_update_end=at_update)], asynchronous=True)
    weights = Checkpoint(tmp_path / "epoch_1").load_weights()
    assert weights["weight"].item() == 0.5


# ------------------------------------------------------------------ saves that fail


@pytest.mark.parametrize("on_save_error", ["warn", "raise"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_ends_the_run_only_where_it_is_to_found_88(
    run, tmp_path, asynchronous, on_save_error
):
    """found 88: in the background it prevented the final state."""
    (tmp_path / "epoch_2").write_text("mine")

    def train():
        run(2, asynchronous=asynchronous, on_save_error=on_save_error)

    if on_save_error == "raise":
        with pytest.raises(CheckpointError, match="epoch_2 is a file"):
            train()
        return
    with pytest.warns(UserWarning, match="not saved; the run goes on.*is a file"):
        train()
    assert names_in(tmp_path) == ["epoch_1", "epoch_2", "final"]
    Checkpoint(tmp_path / "final").verify()


# ------------------------------------------------------------ what cannot be stored


class Halving(torch.optim.lr_scheduler.LRScheduler):
    """A schedule of a user's, that keeps a function."""

    def __init__(self, optimizer):
        self.factor = lambda epoch: 0.5**epoch
        super().__init__(optimizer)

    def get_lr(self):
        return [self.factor(self.last_epoch) * lr for lr in self.base_lrs]


class Odd(TrainerCallback):
    """Has a state with an object in it, from an event on."""

    state = MappingProxyType({})

    def __init__(self, since):
        setattr(self, since, self.begin)

    def begin(self, trainer, **kwargs):
        self.state = {"mine": object()}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.mark.parametrize("on_save_error", ["warn", "raise"])
def test_a_schedule_that_cannot_be_stored_is_refused_at_the_start_found_86(
    create_trainer, samples, tmp_path, on_save_error
):
    """found 86: it was, a line per save, and no state could be resumed from."""
    saving = SaveTrainingStateCallback(tmp_path, on_save_error=on_save_error)
    trainer = create_trainer([saving])
    with pytest.raises(
        CheckpointError, match=r"state of the scheduler\['factor'\] is a .*function"
    ):
        trainer.train(samples(1), 1, create_scheduler_fn=Halving)
    assert trainer.num_updates == 0
    assert names_in(tmp_path) == []


def test_a_schedule_that_cannot_be_stored_is_left_out_of_a_single_file(
    create_trainer, samples, tmp_path, capsys
):
    path = tmp_path / "model.pt"
    saves = At(on_training_run_end=lambda trainer: trainer.save_checkpoint(path))
    has_none = type("HasNone", (Halving,), {"state_dict": lambda self: 1 / 0})
    for scheduler, reason in ((Halving, "sched"), (has_none, "division by zero")):
        create_trainer([saves]).train(samples(1), 1, create_scheduler_fn=scheduler)
        printed = capsys.readouterr().out
        assert f"The state of the scheduler is not saved: {reason}" in printed
        assert load_file(path).keys() == {"model_state_dict", "optimizer_state_dict"}


@pytest.mark.parametrize(
    ("since", "num_updates"),
    [
        ("on_training_run_start", 0),
        ("on_train_update_end", 1),
        ("on_train_epoch_end", 4),
    ],
)
def test_a_callback_s_state_that_cannot_be_stored_is_found_early_found_87(
    create_trainer, samples, tmp_path, since, num_updates
):
    """found 87: it ended the run at the first save, whatever on_save_error said."""
    saving = SaveTrainingStateCallback(
        tmp_path, save_every_n_epochs=1, save_at_end=False
    )
    trainer = create_trainer([Odd(since), saving])

    def train():
        trainer.train(samples(2), 2, per_device_batch_size=1)

    message = r"\['Odd'\]\['mine'\] is a builtins\.object"
    if since == "on_train_epoch_end":  # as any save that fails
        with pytest.warns(UserWarning, match="goes on.*" + message):
            train()
    else:
        with pytest.raises(CheckpointError, match=message):
            train()
    assert trainer.num_updates == num_updates
    assert names_in(tmp_path) == []


class OddSGD(torch.optim.SGD):
    """Keeps an object beside each weight from its first update on."""

    def step(self, closure=None):
        super().step(closure)
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["mine"] = object()


def test_an_optimizer_s_state_is_looked_at_after_the_first_update_found_87(
    create_trainer, samples, tmp_path
):
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1)
    trainer = create_trainer([saving])
    trainer.optimizer = OddSGD(trainer.model.parameters(), lr=0.25)
    with pytest.raises(
        CheckpointError, match=r"state of the optimizer\['state'\]\[0\]\['mine'\]"
    ):
        trainer.train(samples(9), num_epochs=1, per_device_batch_size=1)
    assert trainer.num_updates == 1
