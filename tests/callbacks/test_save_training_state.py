import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    TrainerCallback,
)
from pytorch_accelerated.checkpoint import Checkpoint, list_checkpoints, newest
from pytorch_accelerated.errors import CheckpointError, StopTrainingError
from pytorch_accelerated.state import TrainingState


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name != ".lock")


class EventLog(TrainerCallback):
    """Writes down the events, and which training states exist at them."""

    def __init__(self, folder):
        self.folder, self.seen = folder, {}

    def on_train_step_start(self, trainer, **kwargs):
        self.seen["step", trainer.num_steps] = names_in(self.folder)

    def on_eval_epoch_end(self, trainer, **kwargs):
        self.seen["eval", trainer.run_history.current_epoch] = names_in(self.folder)


def test_an_epoch_is_saved_after_its_evaluation(create_trainer, samples, tmp_path):
    """Defect 47: it was saved before."""
    log = EventLog(tmp_path)
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1)
    trainer = create_trainer([saving, log])
    trainer.train(samples(1), num_epochs=2, eval_dataset=samples(1))
    assert log.seen["eval", 1] == []
    assert log.seen["eval", 2] == ["epoch_1"]
    metrics = Checkpoint(tmp_path / "epoch_2").metrics
    assert metrics["eval_loss_epoch"] == 0.25**2


def test_states_are_saved_every_n_updates_of_the_whole_run(
    create_trainer, samples, weight_of, tmp_path
):
    saving = SaveTrainingStateCallback(
        tmp_path, save_every_n_epochs=2, save_every_n_steps=2
    )
    assert names_in(tmp_path) == []
    create_trainer([saving]).train(samples(3), num_epochs=2, per_device_batch_size=1)
    saved = ["epoch_2", "final", "step_2", "step_4", "step_6"]
    assert names_in(tmp_path) == saved
    assert {path.name for path in saving._saved_checkpoints} == {*saved} - {"final"}
    assert saving.save_dir == tmp_path
    # Saved after the update: two of them have halved the weight twice.
    weights = Checkpoint(tmp_path / "step_2").load_weights()
    assert weights["weight"].item() == 0.5**2


def test_steps_are_updates_and_not_batches(create_trainer, samples, tmp_path):
    saving = SaveTrainingStateCallback(
        tmp_path, save_every_n_steps=1, save_at_end=False
    )
    create_trainer([saving]).train(
        samples(5),
        num_epochs=1,
        per_device_batch_size=1,
        gradient_accumulation_steps=2,
    )
    assert names_in(tmp_path) == ["step_1", "step_2", "step_3"]
    assert saving._global_step == 3


def test_states_are_saved_every_n_minutes(
    create_trainer, samples, tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(
        "pytorch_accelerated.callbacks.checkpointing.time.monotonic", lambda: now[0]
    )

    class Slow(TrainerCallback):
        def on_train_step_start(self, trainer, **kwargs):
            now[0] += 40

    saving = SaveTrainingStateCallback(
        tmp_path, save_every_n_minutes=1, save_at_end=False
    )
    create_trainer([saving, Slow()]).train(
        samples(5), num_epochs=1, per_device_batch_size=1
    )
    assert names_in(tmp_path) == ["step_2", "step_4"]


def test_a_resumed_run_goes_on_with_the_numbers(create_trainer, samples, tmp_path):
    """Defect 8: they started again at 0, and overwrote older directories."""
    create_trainer([SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1)]).train(
        samples(3), num_epochs=1, per_device_batch_size=1
    )
    saving = SaveTrainingStateCallback(
        tmp_path, save_every_n_steps=2, save_at_end=False
    )
    trainer = create_trainer([saving])
    trainer.train(
        samples(3),
        num_epochs=2,
        per_device_batch_size=1,
        resume_from=tmp_path / "epoch_1",
    )
    assert names_in(tmp_path) == ["epoch_1", "final", "step_4", "step_6"]
    assert trainer.load_training_state(tmp_path / "step_6")["global_step"] == 6


def test_only_the_newest_are_kept(create_trainer, samples, tmp_path):
    saving = SaveTrainingStateCallback(
        tmp_path, save_every_n_epochs=1, save_every_n_steps=3, max_checkpoints=2
    )
    create_trainer([saving]).train(samples(2), num_epochs=3, per_device_batch_size=1)
    assert names_in(tmp_path) == ["epoch_3", "final", "step_6"]


def test_states_of_an_earlier_run_count(create_trainer, samples, tmp_path):
    """Defect 41: after a restart, older directories were not counted."""

    def run(num_epochs, **kwargs):
        saving = SaveTrainingStateCallback(
            tmp_path, save_every_n_epochs=1, save_at_end=False, max_checkpoints=2
        )
        create_trainer([saving]).train(samples(1), num_epochs=num_epochs, **kwargs)
        return names_in(tmp_path)

    assert run(2) == ["epoch_1", "epoch_2"]
    assert run(3, resume_from="auto") == ["epoch_2", "epoch_3"]
    # With a resume from an older one, what it writes then is the newest.
    assert run(3, resume_from=tmp_path / "epoch_2") == ["epoch_2", "epoch_3"]


def test_auto_goes_on_with_the_run_that_started_last(create_trainer, samples, tmp_path):
    """A longer run in the same folder, with more updates, is not newer."""

    def run(num_epochs, overwrite=False, **kwargs):
        saving = SaveTrainingStateCallback(
            tmp_path, save_every_n_epochs=1, overwrite=overwrite
        )
        trainer = create_trainer([saving])
        trainer.train(samples(1), num_epochs=num_epochs, **kwargs)
        return trainer.num_updates

    run(4)
    (tmp_path / "final").rename(tmp_path / "kept")
    run(2, overwrite=True)
    assert newest(tmp_path).path.name == "final"
    assert run(3, resume_from="auto") == 3
    assert [each.path.name for each in list_checkpoints(tmp_path)] == [
        *("epoch_4", "kept", "epoch_1", "epoch_2", "epoch_3", "final")
    ]


def test_a_second_run_does_not_delete_what_it_has_just_written(
    create_trainer, samples, tmp_path
):
    """Defect 41: the checkpoint just written, epoch_1, was deleted."""
    saving = SaveTrainingStateCallback(
        tmp_path, save_every_n_epochs=1, save_at_end=False, max_checkpoints=2
    )
    trainer = create_trainer([saving])
    trainer.train(samples(1), num_epochs=3)
    trainer.train(samples(1), num_epochs=1)
    assert names_in(tmp_path) == ["epoch_1", "epoch_3"]
    assert saving._saved_checkpoints == [tmp_path / "epoch_3", tmp_path / "epoch_1"]
    trainer.train(samples(1), num_epochs=1)
    assert saving._saved_checkpoints == [tmp_path / "epoch_3", tmp_path / "epoch_1"]


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


def test_what_it_has_not_written_is_never_deleted(create_trainer, samples, tmp_path):
    trainer = create_trainer()
    trainer.train(samples(1), num_epochs=1)
    trainer.save_training_state(tmp_path / "epoch_best")
    (tmp_path / "epoch_7").mkdir()
    (tmp_path / "epoch_7" / "notes.txt").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    trainer.save_training_state(tmp_path / "elsewhere" / "state")
    (tmp_path / "epoch_8").symlink_to(tmp_path / "elsewhere" / "state")

    saving = SaveTrainingStateCallback(
        tmp_path, save_every_n_epochs=1, save_at_end=False, max_checkpoints=1
    )
    create_trainer([saving]).train(samples(1), num_epochs=2)
    assert names_in(tmp_path) == [
        "elsewhere",
        "epoch_2",
        "epoch_7",
        "epoch_8",
        "epoch_best",
        "notes.txt",
    ]


def test_a_state_that_cannot_be_deleted_is_a_warning(
    create_trainer, samples, tmp_path, monkeypatch
):
    def refuse(path):
        raise PermissionError("not yours")

    monkeypatch.setattr(
        "pytorch_accelerated.checkpoint.directory.remove_folder", refuse
    )
    saving = SaveTrainingStateCallback(
        tmp_path, save_every_n_epochs=1, max_checkpoints=1
    )
    with pytest.warns(UserWarning, match="epoch_1 could not be deleted .not yours"):
        create_trainer([saving]).train(samples(1), num_epochs=2)


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


class Fail(TrainerCallback):
    def on_train_epoch_end(self, trainer, **kwargs):
        raise RuntimeError("broken")


class Stop(TrainerCallback):
    def on_train_epoch_end(self, trainer, **kwargs):
        raise StopTrainingError("enough")


class Interrupt(TrainerCallback):
    def on_train_epoch_end(self, trainer, **kwargs):
        trainer.interrupted = True


@pytest.mark.parametrize(
    ("ending", "saved"), [(Fail, []), (Stop, ["final"]), (Interrupt, ["step_1"])]
)
def test_what_is_saved_at_the_end_depends_on_how_a_run_ends(
    create_trainer, samples, tmp_path, ending, saved
):
    """Of one that was interrupted, a step to resume from."""
    trainer = create_trainer([SaveTrainingStateCallback(tmp_path), ending()])
    with pytest.raises(RuntimeError) if ending is Fail else nullcontext():
        trainer.train(samples(1), num_epochs=1)
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
    create_trainer, samples, tmp_path
):
    """found 83: it counted, replaced and deleted them."""
    create_trainer([SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1)]).train(
        samples(1), num_epochs=5
    )
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


def test_a_run_that_may_overwrite_deletes_nothing_of_another_found_83(
    create_trainer, samples, tmp_path
):
    def run(num_epochs, **kwargs):
        saving = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1, **kwargs)
        create_trainer([saving]).train(samples(1), num_epochs=num_epochs)
        return Checkpoint(tmp_path / "final").run_id

    first = run(5)
    second = run(2, max_checkpoints=1, overwrite=True)

    ids = {name: Checkpoint(tmp_path / name).run_id for name in names_in(tmp_path)}
    assert ids == {
        **dict.fromkeys(("epoch_3", "epoch_4", "epoch_5"), first),
        **dict.fromkeys(("epoch_2", "final"), second),
    }


def test_further_runs_of_a_trainer_go_on_in_its_folder_found_83(
    create_trainer, samples, tmp_path
):
    """As with images that grow from run to run."""
    saving = SaveTrainingStateCallback(
        tmp_path, save_every_n_epochs=1, max_checkpoints=1
    )
    trainer = create_trainer([saving])
    trainer.train(samples(1), num_epochs=2)
    trainer.train(samples(2), num_epochs=1, reset_run_history=False)
    assert names_in(tmp_path) == ["epoch_3", "final"]


def test_a_resumed_run_is_the_one_that_it_goes_on_from_found_83(
    create_trainer, samples, tmp_path
):
    def run(num_epochs, resume_from=None):
        saving = SaveTrainingStateCallback(
            tmp_path / "states", save_every_n_epochs=1, max_checkpoints=2
        )
        trainer = create_trainer([saving])
        trainer.train(samples(1), num_epochs=num_epochs, resume_from=resume_from)
        return trainer

    run(2)
    shutil.copytree(tmp_path / "states" / "final", tmp_path / "backup")
    trainer = run(3, tmp_path / "backup")  # of this very run: nothing to refuse
    assert names_in(tmp_path / "states") == ["epoch_2", "epoch_3", "final"]
    trainer.train(samples(1), num_epochs=1)
    assert names_in(tmp_path / "states") == ["epoch_1", "epoch_3", "final"]


def test_going_on_from_elsewhere_is_no_leave_to_replace_states_found_83(
    create_trainer, samples, tmp_path
):
    for name in ("mine", "theirs"):
        create_trainer([SaveTrainingStateCallback(tmp_path / name)]).train(
            samples(1), num_epochs=1
        )
    saving = SaveTrainingStateCallback(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="of another run"):
        create_trainer([saving]).train(
            samples(1), num_epochs=2, resume_from=tmp_path / "mine" / "final"
        )


def test_auto_starts_afresh_where_nothing_is_whole_found_83(
    create_trainer, samples, tmp_path
):
    create_trainer([SaveTrainingStateCallback(tmp_path)]).train(samples(1), 1)
    (tmp_path / "final" / "run.pt").write_bytes(b"")
    trainer = create_trainer([SaveTrainingStateCallback(tmp_path)])
    with pytest.warns(UserWarning, match="passed over"):
        trainer.train(samples(1), num_epochs=1, resume_from="auto")
    Checkpoint(tmp_path / "final").verify()


def test_states_of_the_published_version_are_another_run_s_found_83(
    create_trainer, samples, tmp_path
):
    legacy = tmp_path / "epoch_1"
    legacy.mkdir()
    for name in ("model.safetensors", "random_states_0.pkl"):
        (legacy / name).write_bytes(b"theirs")
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1)
    with pytest.raises(CheckpointError, match=r"another run \(epoch_1\)"):
        create_trainer([saving]).train(samples(1), num_epochs=1)
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


def test_two_callbacks_that_delete_keep_what_the_other_one_needs_found_83(
    create_trainer, samples, tmp_path
):
    def run(num_epochs):
        often, seldom = (
            SaveTrainingStateCallback(
                tmp_path, save_every_n_epochs=every, max_checkpoints=2
            )
            for every in (1, 3)
        )
        create_trainer([often, seldom]).train(
            samples(1), num_epochs=num_epochs, resume_from="auto"
        )
        return names_in(tmp_path)

    assert run(5) == ["epoch_3", "epoch_4", "epoch_5", "final"]
    assert run(10) == ["epoch_10", "epoch_6", "epoch_9", "final"]


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

    class InTheWay(TrainerCallback):
        def on_training_run_start(self, trainer, **kwargs):
            (tmp_path / "first" / "step_1").write_text("mine")

    with pytest.warns(UserWarning, match="step_1 is a file") as caught:
        create_trainer([first, second, InTheWay()]).train(samples(1), num_epochs=2)
    assert len(caught) == 1
    assert names_in(tmp_path / "second") == ["step_1", "step_2"]
    assert first._saved_checkpoints == [tmp_path / "first" / "step_2"]


def test_what_is_written_in_the_background_is_the_state_of_its_update(
    run, tmp_path, monkeypatch
):
    write, is_over = TrainingState.write, threading.Event()

    def write_late(self, *args):
        is_over.wait(10)
        write(self, *args)

    class NextUpdate(TrainerCallback):
        def on_train_update_end(self, trainer, num_updates, **kwargs):
            if num_updates == 2:
                is_over.set()

    monkeypatch.setattr(TrainingState, "write", write_late)
    run(2, others=[NextUpdate()], asynchronous=True)
    weights = Checkpoint(tmp_path / "epoch_1").load_weights()
    assert weights["weight"].item() == 0.5


# ------------------------------------------------------------------ saves that fail


@pytest.mark.parametrize("on_save_error", ["warn", "raise"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_ends_the_run_only_where_it_is_to_found_88(
    create_trainer, samples, tmp_path, asynchronous, on_save_error
):
    """found 88: in the background it prevented the final state."""

    class InTheWay(TrainerCallback):
        def on_training_run_start(self, trainer, **kwargs):
            (tmp_path / "epoch_2").write_text("mine")

    saving = SaveTrainingStateCallback(
        tmp_path,
        save_every_n_epochs=1,
        asynchronous=asynchronous,
        on_save_error=on_save_error,
    )
    trainer = create_trainer([saving, InTheWay()])
    if on_save_error == "raise":
        with pytest.raises(CheckpointError, match="epoch_2 is a file"):
            trainer.train(samples(1), num_epochs=2)
        return
    with pytest.warns(UserWarning, match="not saved; the run goes on.*is a file"):
        trainer.train(samples(1), num_epochs=2)
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
    """Has a state with an object in it, from a moment on."""

    def __init__(self, since="start"):
        self.since, self.state = since, {}

    def on_training_run_start(self, trainer, **kwargs):
        self.note("start")

    def on_train_update_end(self, trainer, **kwargs):
        self.note("first update")

    def on_train_epoch_end(self, trainer, **kwargs):
        self.note("epoch")

    def note(self, moment):
        if moment == self.since:
            self.state = {"mine": object()}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class NumUpdates(TrainerCallback):
    def __init__(self):
        self.count = 0

    def on_train_update_end(self, trainer, **kwargs):
        self.count += 1


@pytest.mark.parametrize("on_save_error", ["warn", "raise"])
def test_a_schedule_that_cannot_be_stored_is_refused_at_the_start_found_86(
    create_trainer, samples, tmp_path, on_save_error
):
    """found 86: it was, a line per save, and no state could be resumed from."""
    saving = SaveTrainingStateCallback(tmp_path, on_save_error=on_save_error)
    counting = NumUpdates()
    trainer = create_trainer([saving, counting])
    with pytest.raises(
        CheckpointError, match=r"state of the scheduler\['factor'\] is a .*function"
    ):
        trainer.train(samples(1), 1, create_scheduler_fn=Halving)
    assert counting.count == 0
    assert names_in(tmp_path) == []

    create_trainer([counting]).train(samples(1), 1, create_scheduler_fn=Halving)
    assert counting.count == 1


@pytest.mark.parametrize(
    ("since", "num_updates"), [("start", 0), ("first update", 1), ("epoch", 4)]
)
def test_a_callback_s_state_that_cannot_be_stored_is_found_early_found_87(
    create_trainer, samples, tmp_path, since, num_updates
):
    """found 87: it ended the run at the first save, whatever on_save_error said."""
    saving = SaveTrainingStateCallback(
        tmp_path, save_every_n_epochs=1, save_at_end=False
    )
    counting = NumUpdates()
    trainer = create_trainer([Odd(since), saving, counting])

    def train():
        trainer.train(samples(2), 2, per_device_batch_size=1)

    message = r"\['Odd'\]\['mine'\] is a builtins\.object"
    if since == "epoch":  # as any save that fails
        with pytest.warns(UserWarning, match="goes on.*" + message):
            train()
    else:
        with pytest.raises(CheckpointError, match=message):
            train()
    assert counting.count == num_updates
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
    counting = NumUpdates()
    trainer = create_trainer([saving, counting])
    trainer.optimizer = OddSGD(trainer.model.parameters(), lr=0.25)
    with pytest.raises(
        CheckpointError, match=r"state of the optimizer\['state'\]\[0\]\['mine'\]"
    ):
        trainer.train(samples(9), num_epochs=1, per_device_batch_size=1)
    assert counting.count == 1
