"""R6 and R9: modes, left-over gradients, and clipping once per update."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from toys import At, Keeps, create_trainer, one_weight, ones

from pytorch_accelerated.callbacks import StepBasedEvaluationCallback
from pytorch_accelerated.errors import StopTrainingError, TrainingWarning
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.trainer import Trainer

# ------------------------------------------------------------------------------ modes


def with_batch_norms():
    return nn.Sequential(
        nn.Linear(1, 2),
        nn.BatchNorm1d(2),
        nn.Dropout(),
        nn.BatchNorm1d(2),
        nn.Linear(2, 1),
    )


def modes_of_layers(trainer, **kwargs):
    return [layer.training for layer in trainer.get_model()]


def train_with_a_frozen_batch_norm():
    model = with_batch_norms()
    model[1].eval()
    training = Keeps("on_train_step_start", modes_of_layers)
    evaluating = Keeps("on_eval_step_start", modes_of_layers)
    callbacks = [StepBasedEvaluationCallback(1), training, evaluating]
    trainer = create_trainer(callbacks, model=model)
    trainer.train(ones(8), 2, ones(4), per_device_batch_size=2)
    means = [model[1].running_mean.clone(), model[3].running_mean.clone()]
    return training.kept, evaluating.kept, modes_of_layers(trainer), means


FROZEN = [True, False, True, True, True]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_frozen_batch_norm_stays_frozen_through_evaluations_amid_an_epoch(
    on_processes, num_processes
):
    """Defects 12 and 46."""
    for training, evaluating, left, (frozen_mean, mean) in on_processes(
        num_processes, train_with_a_frozen_batch_norm
    ):
        assert all(modes == FROZEN for modes in training)
        assert not any(any(modes) for modes in evaluating)
        assert left == FROZEN
        assert torch.equal(frozen_mean, torch.zeros(2))
        assert not torch.equal(mean, torch.zeros(2))


def test_modes_come_back_when_an_evaluation_fails():
    def fail(trainer, **kwargs):
        raise ZeroDivisionError

    model = with_batch_norms()
    model[1].eval()
    trainer = create_trainer([At(on_eval_step_end=fail)], model=model)
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate(ones(4))
    assert modes_of_layers(trainer) == FROZEN


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
    trainer = create_trainer(callbacks, model=model)
    history = trainer.train(ones(2), 3, eval_dataset=ones(1))
    trainer.evaluate(ones(1))

    assert history.get_metric_values("train_loss_epoch") == [1, 0.25, 0.25**2]
    assert history.get_metric_values("eval_loss_epoch") == [0.25, 0.25**2, 0.25**3]
    assert model[0].b.item() == 0.5**3 - 1
    assert not model[0].merged


class FreezesItsNorm(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("eval_dataset", [None, ones(2)])
def test_a_model_that_freezes_a_norm_in_train_is_asked_at_each_epoch_found_61(
    eval_dataset,
):
    model = FreezesItsNorm(*with_batch_norms())
    trainer = create_trainer(model=model, lr=0.01)
    trainer.train(ones(8), 2, eval_dataset=eval_dataset, per_device_batch_size=4)

    assert torch.equal(model[1].running_mean, torch.zeros(2))
    assert not torch.equal(model[3].running_mean, torch.zeros(2))


def test_modes_of_an_evaluation_on_its_own_are_those_of_before_found_61():
    """Also those that the model's train() would set in another way."""
    own = FreezesItsNorm(*with_batch_norms())
    own[2].eval()
    for model in (own, with_batch_norms().eval()):
        before = [module.training for module in model.modules()]
        trainer = create_trainer(model=model)
        trainer.evaluate(ones(2))
        trainer.predict(ones(2))

        assert [module.training for module in model.modules()] == before


class WithBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"backbone": with_batch_norms()})
        self.head = nn.Linear(1, 1)

    def forward(self, inputs):
        return self.head(self.body["backbone"](inputs))


def train_on_a_backbone(model, trainer_class=Trainer):
    trainer = create_trainer(model=model, lr=0.01, trainer_class=trainer_class)
    trainer.train(ones(4), 1)
    trainer.train(ones(4), 1)


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
    """Defect 29: by the user, or by a run that was stopped inside a window."""
    model = one_weight()
    model.weight.grad = torch.tensor([[100.0]])
    create_trainer(model=model).train(ones(1), 1)
    assert model.weight.item() == 0.5

    def stop_once(trainer, **kwargs):
        trainer.callback_handler.clear_callbacks()
        raise StopTrainingError("in the middle of a window")

    trainer = create_trainer([At(on_train_step_end=stop_once)])
    arguments = {"per_device_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer.train(ones(2), 1, **arguments)
    assert trainer.model.weight.item() == 1.0
    trainer.train(ones(2), 1, **arguments)
    assert trainer.model.weight.item() == 0.5


# --------------------------------------------------------------------------- clipping


def train_on_opposed(num_processes=1, **clip):
    """Train on gradients of 8 and -7 for a weight of 1, whose mean is 0.5."""
    keeps = Keeps("on_train_update_end", lambda trainer, **_: trainer.gradient_norm)
    trainer = create_trainer([keeps])
    trainer.train(
        TensorDataset(torch.ones(2, 1), torch.tensor([[-3.0], [4.5]])),
        1,
        per_device_batch_size=1,
        gradient_accumulation_steps=2 // num_processes,
        train_dataloader_kwargs={"shuffle": False},
        **clip,
    )
    return trainer.model.weight.item(), keeps.kept


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
