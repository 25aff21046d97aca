"""R6 and R9: modes, left-over gradients, and clipping once per update."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated.callbacks import StepBasedEvaluationCallback, TrainerCallback
from pytorch_accelerated.errors import StopTrainingError, TrainingWarning
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.trainer import Trainer


def samples(count, inputs=1.0):
    return TensorDataset(torch.full((count, 1), inputs), torch.zeros(count, 1))


def one_weight(weight=1.0):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, weight)
    return model


def sgd(model, lr=0.25):
    return torch.optim.SGD(model.parameters(), lr=lr)


# ------------------------------------------------------------------------------ modes


def with_batch_norms():
    return nn.Sequential(
        nn.Linear(1, 2),
        nn.BatchNorm1d(2),
        nn.Dropout(),
        nn.BatchNorm1d(2),
        nn.Linear(2, 1),
    )


class KeepsModes(TrainerCallback):
    def __init__(self):
        self.training, self.evaluating = [], []

    def on_train_step_start(self, trainer, **kwargs):
        self.training.append([m.training for m in trainer.get_model()])

    def on_eval_step_start(self, trainer, **kwargs):
        self.evaluating.append([m.training for m in trainer.get_model()])


def train_with_a_frozen_batch_norm():
    model = with_batch_norms()
    model[1].eval()
    keeps = KeepsModes()
    trainer = Trainer(
        model, nn.MSELoss(), sgd(model), [StepBasedEvaluationCallback(1), keeps]
    )
    trainer.train(
        samples(8), num_epochs=2, eval_dataset=samples(4), per_device_batch_size=2
    )
    means = [model[1].running_mean.clone(), model[3].running_mean.clone()]
    return keeps.training, keeps.evaluating, [m.training for m in model], means


FROZEN = [True, False, True, True, True]


def check_modes(result):
    training, evaluating, left, (frozen_mean, mean) = result
    assert all(modes == FROZEN for modes in training)
    assert not any(any(modes) for modes in evaluating)
    assert left == FROZEN
    assert torch.equal(frozen_mean, torch.zeros(2))
    assert not torch.equal(mean, torch.zeros(2))


def test_a_frozen_batch_norm_stays_frozen_through_evaluations_amid_an_epoch():
    """Defects 12 and 46."""
    check_modes(train_with_a_frozen_batch_norm())


def test_a_frozen_batch_norm_stays_frozen_on_both_processes(on_processes):
    for result in on_processes(2, train_with_a_frozen_batch_norm):
        check_modes(result)


def test_modes_come_back_when_an_evaluation_fails():
    class Fails(Trainer):
        def calculate_eval_batch_loss(self, batch):
            raise ZeroDivisionError

    model = with_batch_norms()
    model[1].eval()
    with pytest.raises(ZeroDivisionError):
        Fails(model, nn.MSELoss(), None, ()).evaluate(samples(4))
    assert [m.training for m in model] == FROZEN


def test_evaluate_leaves_a_model_in_evaluation_mode_as_it_was():
    model = with_batch_norms().eval()
    Trainer(model, nn.MSELoss(), None, ()).evaluate(samples(4))
    assert not any(m.training for m in model.modules())


class LowRank(nn.Module):
    """Adds B @ A to a frozen weight, merged into it for evaluation, as loralib does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1), requires_grad=False)
        self.a = nn.Parameter(torch.ones(1, 1), requires_grad=False)
        self.b = nn.Parameter(torch.zeros(1, 1))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -self.b @ self.a if mode else self.b @ self.a
            self.merged = not mode
        return self

    def forward(self, inputs):
        outputs = inputs @ self.weight
        return outputs if self.merged else outputs + inputs @ self.b @ self.a


@pytest.mark.parametrize("callbacks", [(), (StepBasedEvaluationCallback(1),)])
def test_a_module_that_overrides_train_is_told_after_each_evaluation_found_61(
    callbacks,
):
    """Each update halves a weight that is merged while it is evaluated only."""
    model = nn.Sequential(LowRank())
    optimizer = torch.optim.SGD([model[0].b], lr=0.25)
    trainer = Trainer(model, nn.MSELoss(), optimizer, callbacks)
    history = trainer.train(samples(2), 3, eval_dataset=samples(1))
    trainer.evaluate(samples(1))

    assert history.get_metric_values("train_loss_epoch") == [1, 0.25, 0.25**2]
    assert history.get_metric_values("eval_loss_epoch") == [0.25, 0.25**2, 0.25**3]
    assert model[0].b.item() == 0.5**3 - 1
    assert not model[0].merged


class FreezesItsNorm(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("eval_dataset", [None, samples(2)])
def test_a_model_that_freezes_a_norm_in_train_is_asked_at_each_epoch_found_61(
    eval_dataset,
):
    model = FreezesItsNorm(*with_batch_norms())
    trainer = Trainer(model, nn.MSELoss(), sgd(model, 0.01), ())
    trainer.train(samples(8), 2, eval_dataset=eval_dataset, per_device_batch_size=4)

    assert torch.equal(model[1].running_mean, torch.zeros(2))
    assert not torch.equal(model[3].running_mean, torch.zeros(2))


def test_modes_of_an_evaluation_on_its_own_are_those_of_before_found_61():
    """Also those that the model's train() would set in another way."""
    model = FreezesItsNorm(*with_batch_norms())
    model[2].eval()
    before = [module.training for module in model.modules()]
    trainer = Trainer(model, nn.MSELoss(), None, ())
    trainer.evaluate(samples(2))
    trainer.predict(samples(2))

    assert [module.training for module in model.modules()] == before


class WithBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"backbone": with_batch_norms()})
        self.head = nn.Linear(1, 1)

    def forward(self, inputs):
        return self.head(self.body["backbone"](inputs))


def train_on_a_backbone(model, trainer_class=Trainer):
    trainer = trainer_class(model, nn.MSELoss(), sgd(model, 0.01), ())
    trainer.train(samples(4), 1)
    trainer.train(samples(4), 1)


def test_a_backbone_that_arrives_in_evaluation_mode_is_warned_of_found_61():
    model = WithBackbone()
    model.body["backbone"].eval()
    with pytest.warns(TrainingWarning, match=r"body\.backbone .*\.train\(\)") as caught:
        train_on_a_backbone(model)

    assert len(caught) == 1
    assert not model.body["backbone"].training


def freeze(model, **kwargs):
    ModelFreezer(model, **kwargs).freeze(set_modules_as_eval=True)


def set_norms_to_evaluation(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()


def set_what_knows_no_modes_to_evaluation(model):
    model.head = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.0)).eval()


@pytest.mark.parametrize(
    "prepare",
    [
        freeze,
        partial(freeze, freeze_batch_norms=True),
        set_norms_to_evaluation,
        lambda model: model.body.requires_grad_(False).eval(),
        set_what_knows_no_modes_to_evaluation,
        nn.Module.eval,
    ],
)
def test_what_was_put_into_evaluation_mode_on_purpose_is_not_warned_of_found_61(
    prepare,
):
    model = WithBackbone()
    prepare(model)
    train_on_a_backbone(model)


def test_a_backbone_whose_mode_is_set_by_a_hook_is_not_warned_of_found_61():
    class SetsMode(Trainer):
        def train_epoch_start(self):
            super().train_epoch_start()
            self.model.body.eval()

    train_on_a_backbone(WithBackbone(), SetsMode)


# -------------------------------------------------------------------------- gradients


def test_a_gradient_that_was_left_does_not_enter_the_first_update():
    """Defect 29."""
    model = one_weight()
    model.weight.grad = torch.tensor([[100.0]])
    Trainer(model, nn.MSELoss(), sgd(model), ()).train(samples(1), 1)
    assert model.weight.item() == 0.5


class StopsInsideAWindow(TrainerCallback):
    is_armed = True

    def on_train_step_end(self, trainer, batch, batch_output, **kwargs):
        if self.is_armed:
            self.is_armed = False
            raise StopTrainingError("in the middle of a window")


def test_the_gradient_of_a_run_stopped_inside_a_window_does_not_enter_the_next():
    """Defect 29."""
    model = one_weight()
    trainer = Trainer(model, nn.MSELoss(), sgd(model), [StopsInsideAWindow()])
    arguments = {"per_device_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer.train(samples(2), 1, **arguments)
    assert model.weight.item() == 1.0
    trainer.train(samples(2), 1, **arguments)
    assert model.weight.item() == 0.5


# --------------------------------------------------------------------------- clipping


class KeepsNorms(TrainerCallback):
    def __init__(self):
        self.norms = []

    def on_train_update_end(self, trainer, **kwargs):
        self.norms.append(trainer.gradient_norm)


def opposed():
    """Two samples whose gradients for a weight of 1 are 8 and -7: their mean is 0.5."""
    return TensorDataset(torch.ones(2, 1), torch.tensor([[-3.0], [4.5]]))


def train_on_opposed(num_processes=1, **clip):
    model, keeps = one_weight(), KeepsNorms()
    trainer = Trainer(model, nn.MSELoss(), sgd(model), [keeps])
    trainer.train(
        opposed(),
        1,
        per_device_batch_size=1,
        gradient_accumulation_steps=2 // num_processes,
        train_dataloader_kwargs={"shuffle": False},
        **clip,
    )
    return model.weight.item(), keeps.norms


@pytest.mark.parametrize(
    ("clip", "weight"),
    [
        ({}, 1 - 0.25 * 0.5),
        ({"gradient_clip_value": 1.0}, 1 - 0.25 * 0.5),
        ({"gradient_clip_norm": 1.0}, 1 - 0.25 * 0.5),
        ({"gradient_clip_value": 0.1}, 1 - 0.25 * 0.1),
        ({"gradient_clip_norm": 0.1}, 1 - 0.25 * 0.1),
    ],
)
def test_the_gradient_of_the_whole_window_is_clipped_once(on_processes, clip, weight):
    """Defect 4: each part was clipped, which turned the sign of the sum."""
    one = train_on_opposed(**clip)
    for result, norms in (one, *on_processes(2, lambda: train_on_opposed(2, **clip))):
        assert result == pytest.approx(weight, rel=1e-5)
        if "gradient_clip_norm" in clip:
            # Before clipping, and left on the device.
            assert [norm.item() for norm in norms] == pytest.approx([0.5])
        else:
            assert norms == [None]
