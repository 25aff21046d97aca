"""The grid of uses: wherever the data comes from, each sample counts once.

A use is a kind of data, and a way to train on it. Sample n is the number n, so that it
is counted what each process saw, and the gradient of the n-th weight of the model says
how much of an update sample n had. The tables of ``docs/correctness.md`` are made from
:data:`USES`; to write them anew, run this file.
"""

import random
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    TensorDataset,
    get_worker_info,
)
from torch.utils.data.datapipes.iter import IterableWrapper
from toys import At

from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.errors import StopTrainingError, TrainingWarning
from pytorch_accelerated.trainer import Trainer

DOCS = Path(__file__).parents[2] / "docs" / "correctness.md"

BATCH_SIZE, NUM_EPOCHS, SEED = 2, 2, 5
TRAIN, EVAL, INNER = 0, 20, 40  # the first number of what is trained, evaluated, ...
NUM_WEIGHTS = 60


# ------------------------------------------------------------------- kinds of data


HERE = {"num_workers": 0}  # whether workers would pay is not measured each time


def columns(numbers):
    """The numbers, and a loss for each by which their sum tells them all."""
    numbers = torch.tensor(list(numbers))
    return numbers, 2.0 ** numbers.double()


def sample(number):
    return tuple(column[0] for column in columns([number]))


def in_memory(numbers):
    return TensorDataset(*columns(numbers)), {}


class Samples(Dataset):
    def __init__(self, numbers):
        self.numbers = numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return sample(self.numbers[index])


def map_style(numbers, **kwargs):
    return Samples(numbers), HERE | kwargs


class Backwards(Sampler):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(range(self.count - 1, -1, -1))


class BatchesOfItsOwn(Backwards):
    """Likewise its own iterator, of batches."""

    def __len__(self):
        return -(-self.count // BATCH_SIZE)

    def __iter__(self):
        self.rest = list(range(self.count))
        return self

    def __next__(self):
        if not self.rest:
            raise StopIteration
        batch, self.rest = self.rest[:BATCH_SIZE], self.rest[BATCH_SIZE:]
        return batch


class Drawn(Backwards):
    """Draws its order from torch's global generator."""

    def __iter__(self):
        return iter(torch.randperm(self.count).tolist())


def sampler(numbers):
    return map_style(numbers, sampler=Backwards(len(numbers)))


def drawn_sampler(numbers):
    return map_style(numbers, sampler=Drawn(len(numbers)))


def drawn_batches(numbers):
    return BatchSampler(Drawn(len(numbers)), BATCH_SIZE, drop_last=False)


def batch_sampler(numbers):
    return map_style(numbers, batch_sampler=drawn_batches(numbers))


def batches_of_its_own(numbers):
    return map_style(numbers, batch_sampler=BatchesOfItsOwn(len(numbers)))


class ByLists(Samples):
    """Makes a batch of a list of indices."""

    def __getitem__(self, indices):
        return columns(self.numbers[index] for index in indices)


def lists_of_indices(numbers):
    batches = drawn_batches(numbers)
    return DataLoader(ByLists(numbers), batch_size=None, sampler=batches), {}


def ready_loader(numbers):
    return DataLoader(Samples(numbers), BATCH_SIZE, shuffle=True), {}


def process_and_number():
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def distributed_sampler(numbers):
    rank, num_processes = process_and_number()
    data = Samples(numbers)
    split = DistributedSampler(data, num_processes, rank, seed=1)
    return DataLoader(data, BATCH_SIZE, sampler=split), {}


class Stream(IterableDataset):
    def __init__(self, numbers):
        self.numbers = numbers

    def __iter__(self):
        return map(sample, self.numbers)


class OwnIterator(Stream):
    """Starts again each time it is asked for its iterator, which it is itself."""

    def __iter__(self):
        self.rest = list(self.numbers)
        return self

    def __next__(self):
        if not self.rest:
            raise StopIteration
        return sample(self.rest.pop(0))


class ShuffledStream(Stream):
    """Draws its order from global generators at its first sample, as most do."""

    def __iter__(self):
        numbers = list(self.numbers)
        random.shuffle(numbers)
        offset = int(torch.randint(len(numbers), ()))
        yield from map(sample, numbers[offset:] + numbers[:offset])


class StreamOfWorkers(Stream):
    """Each worker reads its part."""

    def __iter__(self):
        worker = get_worker_info()
        return map(sample, self.numbers[worker.id :: worker.num_workers])


def stream_with_worker(numbers):
    return Stream(numbers), {"num_workers": 1}


def stream_with_workers(numbers):
    return DataLoader(StreamOfWorkers(numbers), BATCH_SIZE, num_workers=2), {}


def data_pipe(numbers):
    return IterableWrapper([sample(number) for number in numbers]), {}


def sharded_pipe(numbers):
    return data_pipe(numbers)[0].sharding_filter(), {}


class SizedStream(Stream):
    def __len__(self):
        return len(self.numbers)


class StreamWithPlace(Stream):
    """Goes on from where it was."""

    def __init__(self, numbers):
        super().__init__(numbers)
        self.num_read = 0

    def __iter__(self):
        while self.num_read < len(self.numbers):
            self.num_read += 1
            yield sample(self.numbers[self.num_read - 1])
        self.num_read = 0

    def state_dict(self):
        return {"num_read": self.num_read}

    def load_state_dict(self, state):
        self.num_read = state["num_read"]


class SplitStream(Stream):
    is_split_by_process = True

    def __iter__(self):
        rank, num_processes = process_and_number()
        return map(sample, self.numbers[rank::num_processes])


class ReadyBatches:
    def __init__(self, numbers):
        self.numbers = numbers

    def __iter__(self):
        for first in range(0, len(self.numbers), BATCH_SIZE):
            yield columns(self.numbers[first : first + BATCH_SIZE])


class SplitBatches(ReadyBatches):
    is_split_by_process = True

    def __init__(self, numbers):
        rank, num_processes = process_and_number()
        super().__init__(numbers[rank::num_processes])


def just(kind):
    """Return what makes data of this kind, which needs no arguments of a loader."""
    return lambda numbers: (kind(numbers), {})


# ------------------------------------------------------------------- ways to train


class Numbered(nn.Module):
    """Answers a sample with its number, and notes which it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUM_WEIGHTS, dtype=torch.float64))
        self.trained = [[]]
        self.evaluated = [[]]

    def forward(self, numbers):
        seen = self.trained if self.training else self.evaluated
        seen[-1].extend(numbers.tolist())
        weight = self.weight[numbers]
        return numbers + weight - weight.detach()


def loss_of(outputs, targets):
    """Return the mean of the targets, with a gradient of 1 / n for each sample."""
    return (targets + outputs - outputs.detach()).mean()


class Plain(Trainer):
    """As it comes."""

    def __init__(self, callbacks=(), **kwargs):
        model = Numbered()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        callbacks = [Counts(), *callbacks]
        super().__init__(model, loss_of, optimizer, callbacks, seed=SEED, **kwargs)
        self.counts = {}  # by epoch, how much of the updates each sample had
        self.shown = {}  # by epoch, what this process was shown in training
        self.inner = []  # what was evaluated or predicted by a callback

    def train_epoch_start(self):
        super().train_epoch_start()
        model, epoch = self.get_model(), self.run_history.current_epoch
        model.trained.append([])
        self.shown[epoch] = model.trained[-1]
        self.counts[epoch] = torch.zeros(NUM_WEIGHTS, dtype=torch.float64)

    def eval_epoch_start(self):
        super().eval_epoch_start()
        self.get_model().evaluated.append([])


class Counts(TrainerCallback):
    def on_training_run_start(self, trainer, **kwargs):
        self.weight = trainer.get_model().weight.detach().clone()
        self.num_samples = trainer.num_samples_seen

    def on_train_update_end(self, trainer, **kwargs):
        weight = trainer.get_model().weight.detach().clone()
        num_samples = trainer.num_samples_seen - self.num_samples
        epoch = trainer.run_history.current_epoch
        trainer.counts[epoch] += (self.weight - weight) * num_samples
        self.weight, self.num_samples = weight, trainer.num_samples_seen


class OwnStep(Plain):
    def calculate_train_batch_loss(self, batch):
        numbers, targets = batch
        loss = loss_of(self.model(numbers), targets)
        return {"loss": loss, "batch_size": len(numbers)}


class OwnPasses(Plain):
    """As such overrides were written for 0.1.61."""

    def _perform_forward_and_backward_passes(self, batch, step):
        output = self.calculate_train_batch_loss(batch)
        self._update_loss_tracker(output["loss"], output["batch_size"])
        self.callback_handler.call_event(
            "on_train_step_end", self, batch_output=output, batch=batch, step=step
        )
        self.backward_step(output["loss"])


class OwnEpoch(Plain):
    def _run_train_epoch(self, train_dl):
        self.train_epoch_start()
        for batch in train_dl:
            self.backward_step(self.calculate_train_batch_loss(batch)["loss"])
            self.optimizer_step()
            self.optimizer_zero_grad()
        self.train_epoch_end()


class OwnEpochOfOurSteps(Plain):
    def _run_train_epoch(self, train_dl):
        self.train_epoch_start()
        for step, batch in enumerate(train_dl):
            self._perform_forward_and_backward_passes(batch, step)
            self.optimizer_step()
            self.optimizer_zero_grad()
        self.train_epoch_end()


def numbers_from(first, count=7):
    return range(first, first + count)


def in_callback(how, callbacks=(), **kwargs):
    """Evaluate or predict after each update, and note what."""

    def note(trainer, **kwargs):
        model = trainer.get_model()
        outer, model.evaluated = model.evaluated, [[]]
        inner = how(trainer)
        trainer.inner.append([*chain(*model.evaluated)] if inner is None else inner)
        model.evaluated = outer

    return Plain([At(on_train_update_end=note), *callbacks], **kwargs)


def evaluate_another(trainer):
    trainer.evaluate(Samples(numbers_from(INNER)), BATCH_SIZE, HERE)


def evaluate_the_same(trainer):
    trainer._run_eval_epoch(trainer._eval_dataloader, is_intermediate=True)


def predict_another(trainer):
    # On all processes the same, so the first one tells.
    predictions = trainer.predict(Samples(numbers_from(INNER)), BATCH_SIZE, HERE)
    return predictions.tolist() if process_and_number()[0] == 0 else []


SPLIT_BATCHES = DataLoaderConfiguration(split_batches=True)


# --------------------------------------------------------- the grid, and what is right


class Outcome(NamedTuple):
    """What is right, in the words of the docs, and what the user is told."""

    text: str
    warning: str | None = None
    error: str | None = None


ONCE = Outcome("once")
LOADS_AGAIN = Outcome("once, warned", warning="To find its place, the run loads")
UNCOUNTED = "made no update that the trainer could count"  # on_train_update_end waits
WARNS_OF_UPDATES = Outcome("once, warned", warning=UNCOUNTED)
BETWEEN_EPOCHS = Outcome("once, between epochs, warned", warning=UNCOUNTED)
REFUSED_READY = Outcome("refused", error="is_split_by_process = True")
REFUSED_SETTING = Outcome(
    "refused", error="divide the batch size by the number of processes"
)

ACTIONS = ["train", "evaluate", "predict", "resume"]


class Use(NamedTuple):
    """A row of the grid; what is not said is that each sample counts once."""

    name: str
    data: Callable[[range], tuple[Any, dict[str, Any]]] = map_style
    way: Callable[..., Plain] = Plain
    one: dict[str, Outcome] | None = None
    several: dict[str, Outcome] | None = None
    # Odd, so that the last step has one sample for two processes, or of 11 three. Even
    # where the user has shared the samples, or gives losses their weight.
    count: int = 9
    in_order: bool = True

    def outcome(self, num_processes, action):
        outcomes = self.one if num_processes == 1 else self.several
        return (outcomes or {}).get(action, ONCE)

    def on_all(self, **outcomes):
        return self._replace(one=outcomes, several=outcomes)


def all_actions(outcome):
    return dict.fromkeys(ACTIONS, outcome)


FROM_START = {"resume": LOADS_AGAIN}


def loaded_again(name, data, count=9, in_order=False):
    """Data that a run which goes on has to load again from the start."""
    return Use(name, data, count=count, in_order=in_order).on_all(**FROM_START)


DATA = [
    Use("a map-style dataset"),
    Use("a `TensorDataset`", in_memory),
    loaded_again("`sampler=`", sampler),
    loaded_again("`sampler=` that draws from torch's generator", drawn_sampler, 11),
    loaded_again("`batch_sampler=`", batch_sampler),
    loaded_again("`batch_sampler=` that is its own iterator", batches_of_its_own),
    loaded_again("a ready `DataLoader`", ready_loader),
    loaded_again(
        "a ready `DataLoader` with a `DistributedSampler`", distributed_sampler, 10
    ),
    loaded_again("a stream", just(Stream), in_order=True),
    loaded_again("a stream that is its own iterator", just(OwnIterator), in_order=True),
    loaded_again("a stream with a length", just(SizedStream), 11, in_order=True),
    Use("a stream with a `state_dict()`", just(StreamWithPlace)),
    loaded_again("a stream marked as split by process", just(SplitStream), 10),
    Use(
        "ready batches",
        just(ReadyBatches),
        one=FROM_START,
        several=all_actions(REFUSED_READY),
    ),
    loaded_again("ready batches marked as split by process", just(SplitBatches), 10),
    Use(
        "`DataLoaderConfiguration(split_batches=True)`",
        way=partial(Plain, accelerator_kwargs={"dataloader_config": SPLIT_BATCHES}),
        several=all_actions(REFUSED_SETTING),
    ),
]

# Of no other kind in the docs than those above.
MORE_DATA = [
    loaded_again("a ready `DataLoader` of lists of indices", lists_of_indices),
    loaded_again("a stream that draws its order", just(ShuffledStream)),
    loaded_again("a stream with a worker", stream_with_worker),
    loaded_again("a stream with two workers", stream_with_workers),
    loaded_again("a data pipe", data_pipe),
    loaded_again("a data pipe with a sharding filter", sharded_pipe, 10),
]

OWN_EPOCH = {"train": WARNS_OF_UPDATES, "resume": BETWEEN_EPOCHS}

WAYS = [
    Use("own `calculate_train_batch_loss`", way=OwnStep),
    Use(
        "own `_perform_forward_and_backward_passes`, as for 0.1.61",
        way=OwnPasses,
        count=10,
    ),
    Use(
        "own `_run_train_epoch`, a loop over the loader", way=OwnEpoch, count=10
    ).on_all(**OWN_EPOCH),
    Use(
        "own `_run_train_epoch` that calls the trainer's step",
        way=OwnEpochOfOurSteps,
        count=10,
    ).on_all(**OWN_EPOCH),
    Use("`evaluate()` in a callback", way=partial(in_callback, evaluate_another)),
    Use(
        "`_run_eval_epoch()` in a callback", way=partial(in_callback, evaluate_the_same)
    ),
    Use("`predict()` in a callback", way=partial(in_callback, predict_another)),
]

USES = [*DATA, *WAYS]


# -------------------------------------------------------- a cell, run on each process


def stops(is_amid, folder):
    """Save and stop after the first update of the second epoch, or before it."""

    def stop(trainer, **kwargs):
        if trainer.run_history.current_epoch == 1 + is_amid:
            trainer.save_training_state(folder)
            raise StopTrainingError("stops here")

    event = "on_train_update_end" if is_amid else "on_training_run_epoch_end"
    return At(**{event: stop})


def train(use, folder, callbacks=(), **kwargs):
    torch.manual_seed(process_and_number()[0])
    trainer = use.way(callbacks)
    data, train_kwargs = use.data(numbers_from(TRAIN, use.count))
    eval_data, eval_kwargs = use.data(numbers_from(EVAL, use.count))
    trainer.train(
        data,
        NUM_EPOCHS,
        eval_data,
        BATCH_SIZE,
        train_dataloader_kwargs=train_kwargs,
        eval_dataloader_kwargs=eval_kwargs,
        **kwargs,
    )
    history = trainer.run_history
    return {
        "counts": {epoch: counts.tolist() for epoch, counts in trainer.counts.items()},
        "shown": trainer.shown,
        "evaluated": trainer.model.evaluated[1:],
        "inner": trainer.inner,
        "num_samples_seen": trainer.num_samples_seen,
        "metrics": {
            name: list(history.get_metric_values(name))
            for name in ("train_loss_epoch", "eval_loss_epoch")
            if name in history.get_metric_names()
        },
    }


def on_data(method, use):
    trainer = use.way()
    data, kwargs = use.data(numbers_from(EVAL, use.count))
    result = getattr(trainer, method)(data, BATCH_SIZE, dataloader_kwargs=kwargs)
    return result, trainer


def evaluate(use, folder):
    metrics, trainer = on_data("evaluate", use)
    return {"evaluated": trainer.model.evaluated[1:], "metrics": metrics}


def predict(use, folder):
    return {"predictions": on_data("predict", use)[0].tolist()}


def resume(use, folder):
    is_amid = use.outcome(1, "resume") is not BETWEEN_EPOCHS
    parts = [train(use, folder, [stops(is_amid, folder)])]
    torch.manual_seed(99)
    parts.append(train(use, folder, resume_from=folder))
    return {"parts": parts}


def run_cell(use, action, folder):
    """Return what was seen, and what the user was told."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            cell = globals()[action](use, folder / f"{use.name} {action}")
        except Exception as error:
            cell = {"error": f"{type(error).__name__}: {error}"}
    told = [str(w.message) for w in caught if issubclass(w.category, TrainingWarning)]
    return {"warnings": told, "error": None, **cell}


# ----------------------------------------------------------------- what is looked for


def check_cell(use, action, cells):
    """Check what all processes saw against what is right."""
    outcome = use.outcome(len(cells), action)
    for cell in cells:
        assert bool(cell["error"]) == bool(outcome.error), cell["error"]
        assert (outcome.error or "") in (cell["error"] or "")
        assert bool(cell["warnings"]) == bool(outcome.warning), cell["warnings"]
        assert all(outcome.warning in text for text in cell["warnings"])
    if not outcome.error:
        globals()[f"check_{action}"](use, cells)


def check_train(use, cells):
    check_trained(use, [[cell] for cell in cells])


def check_resume(use, cells):
    check_trained(use, [cell["parts"] for cell in cells])


def check_trained(use, processes):
    """Check the parts of a run, on all processes."""
    numbers = numbers_from(TRAIN, use.count)
    epochs = range(1, NUM_EPOCHS + 1)
    shown = {epoch: Counter() for epoch in epochs}
    for parts in processes:
        counts = torch.zeros(NUM_EPOCHS, NUM_WEIGHTS, dtype=torch.float64)
        for part in parts:
            for epoch in part["shown"]:
                shown[epoch].update(part["shown"][epoch])
                counts[epoch - 1] += torch.tensor(part["counts"][epoch])
        if not counts_itself(use):
            expected = torch.zeros(NUM_WEIGHTS, dtype=torch.float64)
            expected[list(numbers)] = 1
            for of_epoch in counts:
                torch.testing.assert_close(of_epoch, expected)
            assert parts[-1]["num_samples_seen"] == NUM_EPOCHS * use.count
            for loss in parts[-1]["metrics"]["train_loss_epoch"]:
                check_mean(loss, numbers)
        for loss in parts[-1]["metrics"]["eval_loss_epoch"]:
            check_mean(loss, numbers_from(EVAL, use.count))
        assert len(parts[-1]["metrics"]["eval_loss_epoch"]) == NUM_EPOCHS
    for of_epoch in shown.values():
        # A process without a sample is shown one that counts for nothing.
        repeated = of_epoch - Counter(numbers)
        assert set(of_epoch) == set(numbers)
        assert repeated.total() <= (len(processes) - 1 if use.count % 2 else 0)
    evaluated, inner = (
        [list(chain(*(part[name] for part in parts))) for parts in processes]
        for name in ("evaluated", "inner")
    )
    check_each_once(evaluated, numbers_from(EVAL, use.count), NUM_EPOCHS)
    if any(inner):
        is_another = INNER in chain(*(seen[0] for seen in inner))
        numbers = numbers_from(INNER) if is_another else numbers_from(EVAL, use.count)
        check_each_once(inner, numbers)


def counts_itself(use):
    return isinstance(use.way, type) and "_run_train_epoch" in vars(use.way)


def check_each_once(processes, numbers, times=None):
    """Check evaluations, each of which is shared by the processes."""
    assert times is None or len(processes[0]) == times
    for shares in zip(*processes, strict=True):
        assert sorted(chain(*shares)) == list(numbers)


def check_mean(loss, numbers):
    """Check a mean of losses of which each has a bit of its own."""
    assert loss * len(numbers) == pytest.approx(sum(2.0**n for n in numbers), rel=1e-9)


def check_evaluate(use, cells):
    numbers = numbers_from(EVAL, use.count)
    check_each_once([cell["evaluated"] for cell in cells], numbers, 1)
    for cell in cells:
        check_mean(cell["metrics"]["evaluation_loss"], numbers)


def check_predict(use, cells):
    for cell in cells:
        numbers = cell["predictions"]
        in_order = numbers if use.in_order else sorted(numbers)
        assert in_order == list(numbers_from(EVAL, use.count))


# ------------------------------------------------------- all kinds of data, in all ways


def in_way(data, way):
    """Return the use of a kind of data in another way than the plain one."""

    def outcomes(num_processes):
        of_data = {a: data.outcome(num_processes, a) for a in ACTIONS}
        is_refused = of_data["train"].error is not None
        return of_data if is_refused else {**of_data, **(way.one or {})}

    return way._replace(
        name=f"{data.name}, {way.name}",
        data=data.data,
        count=9 if data.count % 2 and way.count % 2 else 10,
        in_order=data.in_order,
        one=outcomes(1),
        several=outcomes(2),
    )


KINDS = [use for use in DATA if use.way is Plain]
CROSSED = [in_way(data, way) for way in WAYS for data in KINDS]


# ------------------------------------------------------------------------- the tests


GRIDS = {"data": DATA, "more data": MORE_DATA, "ways": WAYS, "crossed": CROSSED}
CELLS = pytest.mark.parametrize(
    ("grid", "use", "action"),
    [
        pytest.param(
            grid,
            use,
            action,
            id=f"{use.name}-{action}",
            marks=[pytest.mark.slow] if grid == "crossed" else [],
        )
        for grid, uses in GRIDS.items()
        for use in uses
        for action in ACTIONS
    ],
)


@CELLS
def test_one_process(grid, use, action, tmp_path):
    check_cell(use, action, [run_cell(use, action, tmp_path)])


ON_TWO = {}  # what was seen in the cells of a grid, by its name


@CELLS
def test_two_processes(grid, use, action, on_processes, tmp_path):
    def run_all():
        return {
            (use.name, action): run_cell(use, action, tmp_path)
            for use in GRIDS[grid]
            for action in ACTIONS
        }

    if grid not in ON_TWO:  # all of its cells are run in one pair of processes
        ON_TWO[grid] = on_processes(2, run_all, timeout_seconds=240)
    check_cell(use, action, [process[use.name, action] for process in ON_TWO[grid]])


# -------------------------------------------------------------- the tables of the docs

START, END = "<!-- from tests/promises/test_uses.py -->", "<!-- up to here -->"


def tables():
    return "\n".join(
        f"**{title}**\n\n{table(num_processes)}\n"
        for title, num_processes in (("One process", 1), ("Several processes", 2))
    )


def table(num_processes):
    rows = [["", *ACTIONS], ["---"] * (len(ACTIONS) + 1)]
    rows += [
        [use.name, *(use.outcome(num_processes, action).text for action in ACTIONS)]
        for use in USES
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parts_of_docs():
    before, rest = DOCS.read_text().split(START)
    shown, after = rest.split(END)
    return before, shown, after


def test_the_docs_show_the_grid():
    assert parts_of_docs()[1].strip() == tables().strip(), f"run {__file__}"


if __name__ == "__main__":
    before, _, after = parts_of_docs()
    DOCS.write_text(f"{before}{START}\n\n{tables()}\n{END}{after}")
