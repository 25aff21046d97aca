import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset
from toys import At, create_trainer, seeded

from pytorch_accelerated.callbacks import (
    SaveTrainingStateCallback,
    TrainerCallback,
    UnfreezeCallback,
)
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.trainer import Trainer

PLAN = {2: -2, 4: 0}
generator = torch.Generator().manual_seed(0)
DATA = TensorDataset(
    torch.randn(8, 2, generator=generator), torch.randn(8, 1, generator=generator)
)


class Frozen(TrainerCallback):
    """Notes in each epoch which layers are frozen, and which have moved."""

    def __init__(self, model):
        self.model, self.frozen, self.moved = model, [], []

    def on_train_update_end(self, trainer, **kwargs):
        self.frozen.append([not m.weight.requires_grad for m in self.model])

    def on_train_epoch_start(self, trainer, **kwargs):
        self.before = [m.weight.clone() for m in self.model]

    def on_train_epoch_end(self, trainer, **kwargs):
        pairs = zip(self.before, self.model, strict=True)
        self.moved.append([not torch.equal(w, m.weight) for w, m in pairs])


def create(*callbacks, plan=PLAN, holds_all=False, lr=None):
    model = seeded(
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    )
    freezer = ModelFreezer(model)
    freezer.freeze()
    held = model.parameters() if holds_all else freezer.get_trainable_parameters()
    watch = Frozen(model)
    trainer = create_trainer(
        [*callbacks, UnfreezeCallback(freezer, plan, lr=lr), watch],
        model=model,
        optimizer=torch.optim.SGD(held, lr=0.1, momentum=0.9),
        seed=0,
    )
    return trainer, watch


@pytest.mark.parametrize("holds_all", [True, False])
def test_each_epoch_trains_what_is_due(holds_all, capsys):
    trainer, watch = create(holds_all=holds_all)

    trainer.train(DATA, num_epochs=4)

    expected = [[False, False, True], [False, True, True]] * 2
    expected = [expected[0], expected[1], expected[1], [True] * 3]
    assert watch.moved == expected
    assert watch.frozen == [[not moved for moved in epoch] for epoch in expected]
    assert len(trainer.optimizer.param_groups) == (1 if holds_all else 2)
    output = capsys.readouterr().out
    assert (
        output == "Unfreezing the layer groups [1]\nUnfreezing the layer groups [0]\n"
    )


def test_the_new_group_has_its_learning_rate_which_a_schedule_of_torch_follows():
    trainer, _ = create(lr=0.02)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.1, 0.02]

    def schedule(optimizer):
        return OneCycleLR(optimizer, max_lr=[1.0, 0.5], total_steps=4)

    trainer.train(DATA, num_epochs=4, create_scheduler_fn=schedule)
    assert trainer.last_lr[1] == pytest.approx(trainer.last_lr[0] / 2)


@pytest.mark.parametrize("step", range(1, 8))
def test_a_resumed_run_has_unfrozen_what_the_whole_one_had(tmp_path, step):
    def run(*callbacks, **kwargs):
        trainer, _ = create(*callbacks)
        trainer.train(DATA, num_epochs=4, per_device_batch_size=4, **kwargs)
        return trainer.model

    whole = run(SaveTrainingStateCallback(tmp_path, save_every_n_steps=1))
    resumed = run(resume_from=tmp_path / f"step_{step}")

    for (name, one), other in zip(
        whole.named_parameters(), resumed.parameters(), strict=True
    ):
        assert other.requires_grad, name
        assert torch.equal(one, other), name


def test_added_after_the_trainer_it_works_and_once_more_in_the_next_run():
    trainer, watch = create()
    unfreeze = trainer.callback_handler.callbacks.pop(0)
    del trainer.optimizer.param_groups[1]
    trainer.callback_handler.add_callback(unfreeze)

    trainer.train(DATA, num_epochs=2)
    unfreeze.freezer.freeze()
    trainer.train(DATA, num_epochs=2)

    assert watch.moved == [[False, False, True], [False, True, True]] * 2


def test_it_sets_modes_only_when_it_unfreezes():
    def sleep(trainer, **kwargs):
        if trainer.run_history.current_epoch == 3:
            trainer.model[1].eval()

    trainer, _ = create(At(on_train_epoch_start=sleep))
    trainer.train(DATA, num_epochs=3)
    assert not trainer.model[1].training


def test_a_plan_that_does_not_fit_the_model_is_refused():
    with pytest.raises(IndexError, match=r"no layer group -4\. The model has 3"):
        create(plan={2: -4})
    trainer, _ = create(plan={})
    freezer = ModelFreezer(nn.Linear(2, 1))
    with pytest.raises(ValueError, match="another model than the trainer"):
        Trainer(trainer.model, None, trainer.optimizer, [UnfreezeCallback(freezer, {})])


def test_a_trainer_that_only_evaluates_needs_no_optimizer():
    model = nn.Linear(2, 1)
    callback = UnfreezeCallback(ModelFreezer(model), {2: 0})
    metrics = Trainer(model, nn.MSELoss(), None, [callback]).evaluate(DATA)
    assert metrics["evaluation_loss"] > 0
