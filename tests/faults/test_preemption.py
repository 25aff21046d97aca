"""R14: a signal ends a run in order, on all processes together, to be resumed."""

import itertools
import os
import random
import signal
import threading
import time

import pytest
from processes import Job
from runs import (
    AtNth,
    finish,
    result_of,
    undisturbed,
    wait_until_it_writes,
    what_is_wrong_after,
)
from scenario import Augmented, Scenario, difference

from pytorch_accelerated import checkpoint
from pytorch_accelerated.callbacks import PreemptionCallback, TrainerCallback

SCENARIO = Scenario(save_every_n_steps=None, callbacks=(PreemptionCallback,))


def test_a_signal_at_the_very_end_is_not_lost_on_the_script(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    late = AtNth("on_training_run_end", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    trainer = SCENARIO.with_(callbacks=(late, PreemptionCallback)).run(tmp_path)
    assert trainer.interrupted
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoint.newest(tmp_path / "states").path.name == "final"


def test_a_second_signal_is_handled_as_it_was_before_the_run(tmp_path):
    received = []
    before = signal.signal(
        signal.SIGTERM, lambda number, frame: received.append(number)
    )

    class Impatient(TrainerCallback):
        def on_train_epoch_start(self, trainer, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)  # by the job and by its launcher
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            assert not received
            preemption = trainer.callback_handler.callbacks[-2]
            preemption._received_at -= 2  # seconds go by
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        SCENARIO.with_(callbacks=(PreemptionCallback, Impatient)).run(tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received


def test_off_the_main_thread_it_warns_and_does_nothing(tmp_path):
    trainers = []

    def run():
        with pytest.warns(UserWarning, match="main thread"):
            trainers.append(SCENARIO.with_(num_epochs=1).run(tmp_path))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert trainers[0].num_updates == 4


def test_names_that_are_no_signals_are_refused():
    with pytest.raises(ValueError, match="'SIGTERM', got 'TERM'"):
        PreemptionCallback(["TERM"])


SAVING = SCENARIO.with_(save_every_n_steps=2, num_workers=1)


class SignalledInWait(Augmented):
    """A worker signals its process while that waits for a sample."""

    def __init__(self, num_samples, number, mark):
        super().__init__(num_samples)
        self.number, self.mark, self.main = number, mark, os.getpid()

    def __getitem__(self, index):
        if index == 5 and os.getpid() != self.main and not self.mark.exists():
            self.mark.touch()
            time.sleep(0.2)  # until what was loaded ahead is used up
            os.kill(self.main, self.number)
            time.sleep(0.2)
        return super().__getitem__(index)


PLACES = {
    "step": ("on_train_step_start", 5),
    "update": ("on_train_update_end", 2),
    "last step of an epoch": ("on_train_step_end", 11),
    "end of an epoch": ("on_training_run_epoch_end", 1),
    "evaluation": ("on_eval_step_start", 2),
    "save": ("on_before_save", 1),
    "wait for data": None,
}


def interrupted_in(place, number, processes, folder):
    """Return a scenario in which some processes get a signal in a certain place."""

    def send(trainer):
        if trainer._accelerator.process_index in processes:
            os.kill(os.getpid(), number)
            (folder / "updates").write_text(str(trainer.num_updates))

    if PLACES[place] is not None:
        event, count = PLACES[place]
        return SAVING.with_(callbacks=(PreemptionCallback, AtNth(event, send, count)))

    class WaitsForData(Scenario):
        def train_dataset(self):
            return SignalledInWait(self.num_samples, number, folder / "mark")

    return WaitsForData(**vars(SAVING))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What the undisturbed runs of one and two processes end with."""
    return {
        number: undisturbed(SAVING, tmp_path_factory.mktemp("undisturbed"), number)[0]
        for number in (1, 2)
    }


@pytest.mark.fault("SIGTERM or SIGUSR1 in a step, evaluation, save, wait for data")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_anywhere_ends_the_run_to_be_resumed_exactly(
    place, number, expected, tmp_path, trials
):
    some = itertools.cycle([{0, 1}, {0}, {1}])
    turn = list(PLACES).index(place) + (number == signal.SIGUSR1)
    of_two = next(itertools.islice(some, turn, None))
    for num_processes, processes in ((1, {0}), (2, of_two)):
        folder = tmp_path / f"{num_processes}"
        folder.mkdir()
        scenario = interrupted_in(place, number, processes, folder)
        job = Job(finish(scenario, folder), folder / "log", num_processes)
        assert set(job.wait()) == {143}, job.log.read_text()[-2000:]
        newest = checkpoint.newest(folder / "states")
        assert newest.path.name.startswith("step_")
        if PLACES[place] is not None:
            num_more = 0 if place == "evaluation" else 1
            sent_after = int((folder / "updates").read_text())
            assert newest.num_updates <= sent_after + num_more
        undisturbed_one = expected[num_processes]
        wrong = what_is_wrong_after(SAVING, folder, undisturbed_one, num_processes)
        trials.add(wrong)


@pytest.mark.fault("SIGTERM at a random instant")
@pytest.mark.parametrize("num_processes", [1, 2])
def test_sigterm_at_random_instants(num_processes, tmp_path, trials):
    scenario = SCENARIO.with_(num_epochs=12)
    expected, seconds = undisturbed(scenario, tmp_path / "undisturbed", num_processes)
    for number in range(trials.count(20)):
        folder = tmp_path / f"trial {number}"
        job = Job(finish(scenario, folder), folder / "log", num_processes)
        wait_until_it_writes(job, folder)
        time.sleep(random.uniform(0.02, 0.6 * seconds))
        to_all = num_processes == 1 or random.random() < 0.5
        job.kill(signal.SIGTERM, None if to_all else random.randrange(num_processes))
        trials.add(what_is_wrong(job, scenario, folder, expected, num_processes))


def what_is_wrong(job, scenario, folder, expected, num_processes):
    codes = set(job.wait())
    if codes == {0}:
        return difference(expected, result_of(folder))  # it was faster
    newest = checkpoint.newest(folder / "states")
    if newest.path.name in (f"epoch_{scenario.num_epochs}", "final"):
        # The run was over, and signals are handled as before it.
        is_right = codes <= {0, 143, -signal.SIGTERM}
    else:
        is_right = codes == {143} and newest.path.name.startswith("step_")
    if not is_right:
        log = job.log.read_text()[-2000:]
        return f"exit codes {codes}, and {newest} is the newest: {log}"
    return what_is_wrong_after(scenario, folder, expected, num_processes)
