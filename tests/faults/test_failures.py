"""Processes that die, code that raises, losses that are no numbers, Ctrl-C."""

import multiprocessing
import os
import random
import re
import signal
import time
import traceback
import warnings
from functools import partial

import pytest
import torch
from processes import FAULTS, Job, torchrun
from runs import AtNth, finish, raise_, result_of, undisturbed, what_is_wrong_after
from scenario import Augmented, Scenario, difference, fingerprint
from toys import At

from pytorch_accelerated import Trainer, checkpoint
from pytorch_accelerated.callbacks import (
    PreemptionCallback,
    ProgressBarCallback,
    TrainerCallback,
)
from pytorch_accelerated.errors import NonFiniteLossError
from pytorch_accelerated.tracking import InMemoryRunHistory

# --------------------------------------------------------------- processes that die


@pytest.mark.fault("one of two processes dies")
def test_the_other_process_ends_with_an_error_and_a_new_run_goes_on(tmp_path, trials):
    scenario = Scenario(num_epochs=6)
    expected, seconds = undisturbed(scenario, tmp_path / "undisturbed", 2)
    for number in range(trials.count(8)):
        folder = tmp_path / f"trial {number}"
        job = Job(finish(scenario, folder), folder / "log", 2)
        while not (folder / "states" / "step_2").exists():
            time.sleep(0.002)
        time.sleep(random.uniform(0, seconds / 3))
        victim = number % 2
        job.kill(signal.SIGKILL, rank=victim)
        codes = job.wait(60)
        assert codes[victim] == -signal.SIGKILL, "the trial is too late"
        said = "Another process of the job has ended or hangs"
        printed = job.log.read_text()
        if codes[1 - victim] != 1 or said not in printed:
            trials.add(f"exit codes {codes}: {printed[-2000:]}")
            continue
        trials.add(what_is_wrong_after(scenario, folder, expected, 2))


@pytest.mark.fault("one of two processes dies under torchrun --max-restarts")
def test_torchrun_starts_again_and_the_run_goes_on(tmp_path, trials):
    expected, _ = undisturbed(Scenario(), tmp_path / "undisturbed", 2)
    for number in range(trials.count(2)):
        folder = tmp_path / f"trial {number}"
        folder.mkdir()
        done = torchrun(
            *("--max_restarts", 2, FAULTS / "train_script.py", folder, 2 + number),
            seconds=240,
            # Without it torch's restarts on one machine hang now and then.
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )
        assert (folder / "has died").exists(), done.stderr[-2000:]
        if done.returncode:
            trials.add(done.stderr[-2000:])
        else:
            trials.add(difference(expected, result_of(folder)))


class SpoiltInWorker(Augmented):
    """Does something bad when a worker reads a certain sample."""

    def __init__(self, num_samples, main, spoil, pid_file):
        super().__init__(num_samples)
        self.main, self.spoil, self.pid_file = main, spoil, pid_file

    def __getitem__(self, index):
        if index == 5 and os.getpid() != self.main:
            self.pid_file.write_text(str(os.getpid()))
            self.spoil()
        return super().__getitem__(index)


DIED = r"\(pid\S* {pid}\) (is killed by|exited unexpectedly)"
# What a worker does, the error that follows, and what it says.
IN_WORKER = {
    "killed": (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        RuntimeError,
        [DIED, "memory of the host or container is used up"],
    ),
    "crashed": (
        lambda: os.kill(os.getpid(), signal.SIGSEGV),
        RuntimeError,
        [DIED, "num_workers=0 shows where"],
    ),
    "left": (
        lambda: os._exit(0),
        RuntimeError,
        [DIED, "exited unexpectedly", "num_workers=0 shows where"],
    ),
    "raised": (
        lambda: raise_(OSError("bad sample")),
        OSError,
        ["bad sample", "in __getitem__", "Raised by sample 5."],
    ),
    "out of memory": (
        lambda: raise_(MemoryError("too large")),
        MemoryError,
        ["too large", "host or container is used up", "Raised by sample 5."],
    ),
    "hangs": (lambda: time.sleep(1000), RuntimeError, ["timed out after 2 seconds"]),
}
WORKERS = [(1, True), (2, True), (2, False)]
ROWS = dict.fromkeys(IN_WORKER, "a loader's worker dies or raises an error")
ROWS["hangs"] = "a loader's worker hangs"


@pytest.fixture(scope="module")
def undisturbed_weights(tmp_path_factory):
    return undisturbed(Scenario(), tmp_path_factory.mktemp("undisturbed"))[0]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.fault(row)) for kind, row in ROWS.items()],
)
def test_a_worker_that_fails_ends_the_run_with_an_error_and_a_new_run_goes_on(
    kind, tmp_path, trials, undisturbed_weights
):
    jobs = []
    for num_workers, persistent in WORKERS:
        folder = tmp_path / f"{num_workers} {persistent}"
        scenario = Scenario(
            num_workers=num_workers,
            loader_kwargs=(("persistent_workers", persistent),),
            # Its handlers are those of the workers too.
            callbacks=(PreemptionCallback,),
        )
        run = partial(fail_in_worker, scenario, folder, kind)
        jobs.append((scenario, folder, Job(run, folder / "log", own_group=True)))
    for scenario, folder, job in jobs:
        wrong = job.wait_or_explain(60) or job.wait_for_group()
        trials.add(wrong or what_is_wrong_after(scenario, folder, undisturbed_weights))


def fail_in_worker(scenario, folder, kind):
    spoil, error, texts = IN_WORKER[kind]

    class WithSpoiltData(Scenario):
        def train_dataset(self):
            main, pid_file = os.getpid(), folder / "pid"
            return SpoiltInWorker(self.num_samples, main, spoil, pid_file)

    # What safetensors does when torch raises its error in the middle of it.
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")
    if kind == "hangs":
        timeout = (*scenario.loader_kwargs, ("timeout", 2))
        scenario = scenario.with_(loader_kwargs=timeout)
    scenario = WithSpoiltData(**vars(scenario))
    trainer = scenario.create_trainer(folder)
    with pytest.raises(error) as caught:
        scenario.run(folder, trainer=trainer)
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    pid = (folder / "pid").read_text()
    assert all(re.search(text.format(pid=pid), told) for text in texts), told
    assert "The run ended in epoch 1 (training), after " in told
    # The error, which is still here, does not keep the workers.
    assert multiprocessing.active_children() == []
    assert type(trainer.model) is torch.nn.Sequential


def is_noted(text, error):
    """Say whether a note of an error has a text."""
    return text in "\n".join(error.__notes__)


# ----------------------------------------------------------------- code that raises

EVENTS = [
    *("on_training_run_start", "on_train_epoch_start", "on_train_step_start"),
    *("on_train_update_end", "on_train_step_end", "on_train_epoch_end"),
    *("on_eval_epoch_start", "on_eval_step_start", "on_eval_step_end"),
    *("on_eval_epoch_end", "on_training_run_epoch_end", "on_training_run_end"),
    "on_before_save",
]
HOOKS = [
    *("training_run_start", "train_epoch_start", "calculate_train_batch_loss"),
    *("backward_step", "optimizer_step", "scheduler_step", "optimizer_zero_grad"),
    *("train_epoch_end", "eval_epoch_start", "calculate_eval_batch_loss"),
    *("eval_epoch_end", "training_run_epoch_end", "training_run_end"),
]
ERRORS = [OSError("broken"), KeyboardInterrupt(), SystemExit(3)]


class Observed:
    """A run with a bar, handlers and folders, and what it leaves of them."""

    def __init__(self, tmp_path, *callbacks, **changes):
        self.heard = []
        self.bars = ProgressBarCallback()
        listening = At(
            on_training_run_end=lambda trainer, **kwargs: self.heard.append("end"),
            on_exception=lambda trainer, exception, **k: self.heard.append(exception),
        )
        own = (PreemptionCallback, self.bars, listening, *callbacks)
        # Another run goes on in the folder before this trainer does again.
        kwargs = {"save_kwargs": (("overwrite", True),), **changes}
        self.scenario = Scenario(callbacks=own, **kwargs)
        self.folder = tmp_path
        self.trainer = self.scenario.create_trainer(tmp_path)

    def raises(self, error):
        """Run; check that it raises the error, and that it leaves all in order."""
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(type(error)) as caught:
            self.scenario.run(self.folder, trainer=self.trainer)
        assert caught.value is error
        assert self.heard.count(error) == 1
        assert signal.getsignal(signal.SIGTERM) == before
        assert self.bars.pbar is None
        assert self.bars.eval_pbar is None
        assert type(self.trainer.model) is torch.nn.Sequential
        assert not (self.folder / "states" / ".lock").exists()
        return caught.value

    def goes_on(self):
        """Resume what was saved before, in a new trainer, and use the old one again."""
        resumed = Scenario().run(self.folder, resume_from="auto")
        assert resumed.run_history.current_epoch == 4
        self.scenario.run(self.folder, trainer=self.trainer)


@pytest.mark.fault("a hook, callback or tracker raises")
@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("where", [*EVENTS, *HOOKS])
def test_an_error_in_any_event_or_hook_leaves_everything_in_order(
    where, error, tmp_path, trials, monkeypatch
):
    breaking = [AtNth(where, lambda _: raise_(error))] if where in EVENTS else []
    run = Observed(tmp_path, *breaking)
    if not breaking:
        monkeypatch.setattr(run.trainer, where, lambda *args, **kwargs: raise_(error))
    raised = run.raises(error)
    if breaking and isinstance(error, Exception):
        assert is_noted(f"Raised by the callback AtNth in the event {where}", raised)
    assert run.heard.count("end") == 1
    monkeypatch.undo()
    run.goes_on()
    trials.add(None)


@pytest.mark.fault("a hook, callback or tracker raises")
@pytest.mark.parametrize("while_cleaning_up", ERRORS, ids=repr)
def test_an_error_while_cleaning_up_after_another_leaves_everything_in_order(
    while_cleaning_up, tmp_path, trials, capsys
):
    error = ValueError("the first one")
    breaking = AtNth("on_exception", lambda _: raise_(while_cleaning_up))
    run = Observed(tmp_path, AtNth("on_train_step_end", lambda _: raise_(error)))
    run.trainer.callback_handler.callbacks.insert(0, breaking)
    if isinstance(while_cleaning_up, Exception):
        run.raises(error)
        assert "While cleaning up after an error: OSError" in capsys.readouterr().out
    else:
        # Someone wants to leave at once: that goes first, and hides nothing.
        run.heard.append(while_cleaning_up)
        assert run.raises(while_cleaning_up).__context__ is error
        assert error in run.heard
    run.goes_on()
    trials.add(None)


class BrokenHistory(InMemoryRunHistory):
    """Raises an error when one of its attributes is asked for, once it is broken."""

    is_broken = False

    def __init__(self, attribute, error):
        super().__init__()
        self.attribute, self.error = attribute, error

    def __getattribute__(self, name):
        get = super().__getattribute__
        if get("is_broken") and name == get("attribute"):
            raise get("error")
        return get(name)


@pytest.mark.fault("a hook, callback or tracker raises")
@pytest.mark.parametrize(
    "attribute",
    ["update_metric", "get_metric_values", "_increment_epoch", "current_epoch"],
)
def test_an_error_in_the_run_history_leaves_everything_in_order(
    attribute, tmp_path, trials, capsys
):
    error = OSError("the tracker's server is gone")

    def break_it(trainer):
        trainer.run_history.is_broken = True

    run = Observed(tmp_path, AtNth("on_train_step_end", break_it), save_best=False)
    run.trainer.run_history = BrokenHistory(attribute, error)
    raised = run.raises(error)
    assert traceback.extract_tb(raised.__traceback__)[-1].name == "__getattribute__"
    if attribute == "current_epoch":  # not even the error can be told where it was
        assert "While cleaning up after an error: OSError" in capsys.readouterr().out
    else:
        assert is_noted("The run ended in epoch 1 (", raised)
    run.trainer.run_history = InMemoryRunHistory()
    run.scenario = Scenario(callbacks=run.scenario.callbacks[:-1], save_best=False)
    run.scenario.run(tmp_path, trainer=run.trainer)
    trials.add(None)


def test_the_death_of_a_worker_amid_a_save_is_no_reason_to_save_without_the_schedule(
    tmp_path,
):
    def create_scheduler():
        scheduler = Trainer.create_scheduler(trainer)
        # torch raises its error wherever the main thread happens to be.
        error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        scheduler.state_dict = lambda: raise_(error)
        return scheduler

    scenario = Scenario(save_best=False)
    trainer = scenario.create_trainer(tmp_path)
    trainer.create_scheduler = create_scheduler
    with pytest.raises(RuntimeError, match="pid 7"):
        scenario.run(tmp_path, trainer=trainer)
    assert checkpoint.newest(tmp_path / "states") is None


# ----------------------------------------------------------- losses that are no numbers


class SpoilWeights(TrainerCallback):
    """Makes the weights of one process infinite, and so its loss from then on."""

    def __init__(self, num_updates, process):
        self.num_updates, self.process = num_updates, process

    def on_train_step_start(self, trainer, **kwargs):
        is_here = trainer._accelerator.process_index == self.process
        if is_here and trainer.num_updates == self.num_updates:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(float("inf"))


def state_is_finite(folder):
    for state in checkpoint.list_checkpoints(folder / "states"):
        weights = state.load_weights()
        if not all(torch.isfinite(each).all() for each in weights.values()):
            return False
    for name in ("best.pt", "ema.pt"):
        if (folder / name).exists():
            weights = checkpoint.load_file(folder / name)["model_state_dict"]
            if not all(torch.isfinite(each).all() for each in weights.values()):
                return False
    return True


@pytest.mark.fault("the loss becomes NaN, on one process or on one of two")
@pytest.mark.parametrize(("num_processes", "process"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("num_updates", [3, 6])
def test_nothing_is_saved_of_a_run_whose_loss_is_not_finite(
    num_updates, num_processes, process, tmp_path, trials
):
    spoiling = SpoilWeights(num_updates, process)
    scenario = Scenario(callbacks=(spoiling,), save_every_n_steps=2)
    if num_processes == 2:
        scenario = scenario.with_(num_epochs=6, patience=9)

    def run():
        try:
            scenario.run(tmp_path)
        except NonFiniteLossError:
            raise SystemExit(7) from None

    job = Job(run, tmp_path / "log", num_processes)
    codes = job.wait(60)
    if codes != [7] * num_processes:
        trials.add(f"exit codes {codes}: {job.log.read_text()[-2000:]}")
    elif not state_is_finite(tmp_path):
        trials.add("something that is not finite was saved")
    else:
        newest = checkpoint.newest(tmp_path / "states")
        late = newest is not None and newest.num_updates > num_updates
        trials.add(f"{newest} was saved" if late else None)


# ----------------------------------------------------------- writing in the background


def test_a_run_that_writes_in_the_background_saves_the_same(tmp_path):
    scenario = Scenario(max_checkpoints=2)
    asynchronous = scenario.with_(save_kwargs=(("asynchronous", True),))
    expected = fingerprint(scenario.run(tmp_path / "at once"))
    assert (
        difference(expected, fingerprint(asynchronous.run(tmp_path / "later"))) is None
    )
    names = [
        [state.path.name for state in checkpoint.list_checkpoints(folder / "states")]
        for folder in (tmp_path / "at once", tmp_path / "later")
    ]
    assert names[0] == names[1] == ["step_12", "epoch_3", "final"]
    resumed = scenario.run(
        tmp_path / "again", resume_from=tmp_path / "later" / "states" / "step_12"
    )
    assert difference(expected, fingerprint(resumed)) is None
