"""What cannot work is refused with advice, before any weight has moved."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader
from toys import At, ones, overriding

from pytorch_accelerated.schedulers import CosineLrScheduler
from pytorch_accelerated.trainer import Trainer

NOTHING = ones(0)


@pytest.fixture
def refuses(samples):
    """Check that train() refuses its arguments, and that nothing has changed."""

    def refuses(trainer, error, message, dataset=None, num_epochs=1, **kwargs):
        before = [parameter.clone() for parameter in trainer.model.parameters()]
        with pytest.raises(error, match=message):
            trainer.train(
                samples(4) if dataset is None else dataset, num_epochs, **kwargs
            )
        after = list(trainer.model.parameters())
        assert all(map(torch.equal, before, after))

    return refuses


def set_to(name, value):
    return lambda trainer: setattr(trainer, name, value)


def parameters_as(form):
    return lambda trainer: setattr(
        trainer, "optimizer", form(trainer.model.parameters())
    )


A_LIST_IS_NO_OPTIMIZER = (
    r"must be a torch.optim.Optimizer, got <(list_iterator|generator) .*>\. "
    r"Create it: .*AdamW\(model.parameters\(\), lr="
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            set_to("optimizer", torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)),
            ValueError,
            "holds no parameter of the model. Create it from the parameters of this mo",
        ),
        (
            lambda trainer: trainer.model.requires_grad_(False),
            ValueError,
            r"nothing to train. Unfreeze.*ModelFreezer",
        ),
        (
            set_to("optimizer", None),
            ValueError,
            "needs an optimizer; the trainer was created with None",
        ),
        (
            set_to("optimizer", torch.optim.SGD),
            TypeError,
            "optimizer must be a .*, got <class .*SGD'>. Create it",
        ),
        (
            set_to("loss_func", nn.MSELoss),
            TypeError,
            r"got the class MSELoss. Create it: MSELoss\(...\)",
        ),
        (
            set_to("loss_func", None),
            ValueError,
            "loss_func is None, and the batch is not a mapping",
        ),
        # found 104
        (parameters_as(iter), TypeError, A_LIST_IS_NO_OPTIMIZER),
        # found 105
        (
            parameters_as(torch.optim.LBFGS),
            ValueError,
            r"LBFGS.*closure.*override optimizer_step to pass one",
        ),
        (
            parameters_as(lambda parameters: ScheduleFree(parameters, lr=0.25)),
            ValueError,
            r"ScheduleFree .*optimizer\.train\(\) in train_epoch_start",
        ),
    ],
)
def test_what_a_trainer_cannot_train_with(
    create_trainer, refuses, change, error, message
):
    trainer = create_trainer()
    change(trainer)

    refuses(trainer, error, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_epochs": -1}, "num_epochs must be a whole number of at least 0, got -1"),
        ({"max_num_train_steps": 0}, "max_num_train_steps must be .* at least 1, got"),
        ({"gradient_clip_value": 0}, "gradient_clip_value must be greater than 0"),
        ({"gradient_clip_norm": -1.0}, "got -1.0. To train without clipping, leave"),
        (
            {"gradient_clip_value": 1.0, "gradient_clip_norm": 2.0},
            "Both gradient_clip_value=1.0 and gradient_clip_norm=2.0 .* choose one",
        ),
        ({"per_device_batch_size": 0}, "batch_size should be a positive integer"),
        # defect 59: 0 was a division by zero, and -2 was accepted
        *(
            (
                {"gradient_accumulation_steps": value},
                f"gradient_accumulation_steps must be .* at least 1, got {value}",
            )
            for value in (0, -2, 1.5)
        ),
        # defect 59: without a batch, a loss of NaN was recorded silently
        ({"dataset": NOTHING}, "train_dataset is empty: there is nothing to take a"),
        ({"eval_dataset": NOTHING}, "eval_dataset is empty"),
        (
            {"train_dataloader_kwargs": {"drop_last": True}, "max_num_train_steps": 2},
            "no batches.*drop_last leaves out the only batch. Use more data or a smal",
        ),
        (
            {
                "dataset": DataLoader([(torch.ones(1), torch.zeros(1))]),
                "train_dataloader_kwargs": {"num_workers": 2},
                "collate_fn": list,
            },
            r"loader arguments were given too: \['num_workers', 'collate_fn'\]. Give "
            "them to the DataLoader",
        ),
    ],
)
def test_arguments_that_make_no_run(create_trainer, refuses, arguments, message):
    refuses(create_trainer(), ValueError, message, **arguments)


def test_no_dataset(create_trainer):
    """Defect 37: evaluate() without a dataset was a TypeError of DataLoader."""
    with pytest.raises(ValueError, match="needs a train_dataset or a DataLoader, got"):
        create_trainer().train(None, num_epochs=1)
    with pytest.raises(ValueError, match="A dataset or a DataLoader is needed"):
        create_trainer().evaluate()
    with pytest.raises(ValueError, match="dataset is empty"):
        create_trainer().evaluate(NOTHING)


@pytest.mark.parametrize(
    "create",
    [
        partial(StepLR, step_size=1),
        partial(CosineLrScheduler, total_num_epochs=1, num_update_steps_per_epoch=1),
    ],
)
def test_a_scheduler_in_place_of_what_makes_one(create_trainer, refuses, create):
    trainer = create_trainer()
    scheduler = create(trainer.optimizer)

    refuses(
        trainer,
        TypeError,
        rf"Pass functools.partial\({type(scheduler).__name__}, ...\) with all",
        create_scheduler_fn=scheduler,
    )


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (StepLR, r"missing .*'step_size'.* functools.partial\(StepLR, \.\.\.\)"),
        (partial(OneCycleLR, epochs=1), r"'max_lr'.* functools.partial\(OneCycleLR"),
        (lambda: None, "is called with the optimizer alone.*too many positional"),
    ],
)
def test_a_scheduler_that_needs_more_than_the_optimizer_found_104(
    create_trainer, refuses, create, message
):
    refuses(create_trainer(), TypeError, message, create_scheduler_fn=create)


def test_a_batch_that_the_default_step_cannot_take_apart(create_trainer, refuses):
    refuses(
        create_trainer(),
        TypeError,
        r"got a dict with the keys \['image', 'label'\]. Override "
        "calculate_train_batch_loss and calculate_eval_batch_loss",
        dataset=[{"image": torch.ones(1), "label": torch.zeros(1)}] * 4,
    )


@pytest.mark.parametrize(
    ("loss_func", "error", "message"),
    [
        (
            lambda outputs, targets: outputs.pow(2).mean().detach(),
            ValueError,
            "the loss has no graph. Was it detached",
        ),
        (
            lambda outputs, targets: outputs.mean().item(),
            TypeError,
            "the loss is a float",
        ),
        (
            lambda outputs, targets: {"mse": outputs.pow(2).mean()},
            TypeError,
            r"the loss is a dict with the keys \['mse'\]. Return one tensor as 'loss', "
            "such as the sum",
        ),
        (
            nn.MSELoss(reduction="none"),
            ValueError,
            r"the loss has shape \(4, 1\). Reduce it to a mean",
        ),
    ],
)
def test_a_loss_that_cannot_be_trained_with(
    create_trainer, refuses, loss_func, error, message
):
    trainer = create_trainer()
    trainer.loss_func = loss_func

    refuses(trainer, error, message)


@pytest.mark.parametrize(
    ("loss_func", "error", "message"),
    [
        (
            lambda outputs, targets: {"mse": outputs.pow(2).mean()},
            TypeError,
            r"got a dict\. .*calculate_eval_batch_loss",
        ),
        (
            nn.MSELoss(reduction="none"),
            ValueError,
            r"shape \(2, 1\). Reduce it to the mean",
        ),
    ],
)
def test_a_loss_that_cannot_be_evaluated_found_104(
    create_trainer, samples, loss_func, error, message
):
    with pytest.raises(error, match=message):
        create_trainer(loss_func=loss_func).evaluate(samples(2))


def test_a_step_that_forgets_to_return_something(create_trainer, refuses):
    refuses(
        create_trainer(
            trainer_class=overriding(
                calculate_train_batch_loss=lambda self, batch: None
            )
        ),
        TypeError,
        "must return a dictionary with 'loss', a scalar with a graph, and 'batch_size'",
    )


def test_an_optimizer_that_calculates_the_loss_in_an_override_found_105(
    create_trainer, samples
):
    class WithClosure(Trainer):
        def calculate_train_batch_loss(self, batch):
            self.batch = batch
            return super().calculate_train_batch_loss(batch)

        def optimizer_step(self):
            def closure():
                self.optimizer.zero_grad()
                loss = self.model(self.batch[0]).square().mean()
                loss.backward()
                return loss

            self.optimizer.step(closure)

    trainer = create_trainer(trainer_class=WithClosure)
    # Along the gradient, 2, at first: 1 - 0.25 * 2.
    trainer.optimizer = torch.optim.LBFGS(
        trainer.model.parameters(), lr=0.5, max_iter=1
    )
    trainer.train(samples(1), 1)

    assert trainer.model.weight.item() == 0.5


class ScheduleFree(torch.optim.SGD):
    """Has two sets of weights, as optimizers without a schedule do."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.eval()

    def train(self):
        self.param_groups[0]["train_mode"] = True

    def eval(self):
        self.param_groups[0]["train_mode"] = False

    def step(self, closure=None):
        assert self.param_groups[0]["train_mode"]
        super().step(closure)


def test_an_optimizer_whose_modes_are_set_by_hooks_or_callbacks_found_105(
    create_trainer, samples
):
    class SetsModes(Trainer):
        def train_epoch_start(self):
            super().train_epoch_start()
            self.optimizer.train()

        def eval_epoch_start(self):
            super().eval_epoch_start()
            self.optimizer.eval()

    sets_modes = At(
        on_train_epoch_start=lambda trainer, **_: trainer.optimizer.train(),
        on_eval_epoch_start=lambda trainer, **_: trainer.optimizer.eval(),
    )
    for arguments in ({"trainer_class": SetsModes}, {"callbacks": [sets_modes]}):
        trainer = create_trainer(**arguments)
        trainer.optimizer = ScheduleFree(trainer.model.parameters(), lr=0.25)
        trainer.train(samples(1), 2, eval_dataset=samples(1))

        assert trainer.model.weight.item() == 0.25
