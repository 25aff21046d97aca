"""torch.compile, through Accelerate's settings and by the user."""

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from torch._dynamo.utils import counters
from train import create_data

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import ModelEmaCallback
from pytorch_accelerated.checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, inputs):
        return inputs + torch.tanh(self.layer(inputs))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 1)

    def forward(self, inputs):
        for block in self.blocks:
            inputs = block(inputs)
        return self.head(self.norm(inputs))


def create_trainer(model, callbacks=(), **accelerator_kwargs):
    return Trainer(
        model,
        loss_func=nn.MSELoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        callbacks=callbacks,
        seed=3,
        accelerator_kwargs=accelerator_kwargs,
    )


def train(trainer, num_epochs=2, **kwargs):
    """Train on batches of 4, of which the last has 2; evaluate on 4 and 3."""
    return trainer.train(
        create_data(22),
        num_epochs=num_epochs,
        eval_dataset=create_data(7),
        per_device_batch_size=4,
        **kwargs,
    )


def settings(**kwargs):
    # "eager" compiles everything but machine code, which takes the longest.
    return {"dynamo_plugin": TorchDynamoPlugin(backend="eager", **kwargs)}


def num_graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def plain_weights():
    model = Network()
    train(create_trainer(model))
    AcceleratorState._reset_state(reset_partial_state=True)
    return model.state_dict()


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


# torch looks at the gradients of tensors that the compiled blocks hand to each other
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("compiled_by", ["user", "settings", "regional settings"])
def test_a_compiled_model_trains_to_the_same_weights_and_saves_plain_names(
    tmp_path, plain_weights, compiled_by
):
    model = given = Network()
    if compiled_by == "user":
        given = torch.compile(model, backend="eager")
        trainer = create_trainer(given)
    else:
        regional = compiled_by == "regional settings"
        trainer = create_trainer(model, **settings(use_regional_compilation=regional))
    states = []

    class SavesInTheRun:
        def on_train_epoch_end(self, trainer, **kwargs):
            trainer.save_checkpoint(tmp_path / "model.pt")
            trainer.save_training_state(tmp_path / "state")
            states.append(trainer.last_checkpoint)

    trainer.callback_handler.callbacks.append(SavesInTheRun())
    train(trainer)

    assert num_graphs() > 0
    assert trainer.model is given
    assert "forward" not in vars(model)
    assert_close(model.state_dict(), plain_weights)
    saved = torch.load(tmp_path / "model.pt")["model_state_dict"]
    assert saved.keys() == plain_weights.keys()
    assert Checkpoint(tmp_path / "state").load_weights().keys() == plain_weights.keys()
    assert len(states) == 2


@pytest.mark.parametrize("compiled_by", ["user", "settings"])
def test_a_smaller_last_batch_and_a_second_run_compile_nothing_anew(compiled_by):
    if compiled_by == "user":
        trainer = create_trainer(torch.compile(Network(), backend="eager"))
    else:
        trainer = create_trainer(Network(), **settings())
    per_epoch = []

    class Counts:
        def on_training_run_epoch_end(self, trainer, **kwargs):
            per_epoch.append(num_graphs())

    trainer.callback_handler.callbacks.append(Counts())
    train(trainer, num_epochs=4)
    train(trainer, num_epochs=2)

    assert per_epoch[0] > 0
    # The second epoch may still learn that the batch size changes.
    assert per_epoch[1:] == [per_epoch[1]] * 5


def test_the_average_of_a_compiled_model_is_that_of_the_plain_one(tmp_path):
    def average(**kwargs):
        ema = ModelEmaCallback(decay=0.5, save_path=tmp_path / "ema.pt")
        history = train(create_trainer(Network(), [ema], **kwargs))
        AcceleratorState._reset_state(reset_partial_state=True)
        return (
            ema.ema_model.module.state_dict(),
            history.get_latest_metric("ema_model_eval_loss_epoch"),
        )

    assert_close(average(**settings()), average())


def test_a_checkpoint_of_a_compiled_model_loads_into_a_plain_one_and_back(tmp_path):
    compiled = create_trainer(torch.compile(Network(), backend="eager"))
    train(compiled)
    compiled.save_checkpoint(tmp_path / "compiled.pt")

    plain = create_trainer(Network())
    plain.load_checkpoint(tmp_path / "compiled.pt")
    plain.save_checkpoint(tmp_path / "plain.pt")
    again = create_trainer(torch.compile(Network(), backend="eager"))
    again.load_checkpoint(tmp_path / "plain.pt")

    assert_close(
        again.get_model(keep_torch_compile=False).state_dict(),
        compiled.get_model(keep_torch_compile=False).state_dict(),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_machine_code_gives_the_same_weights(plain_weights):
    model = Network()
    train(create_trainer(model, dynamo_backend="inductor"))
    torch.testing.assert_close(model.state_dict(), plain_weights, rtol=0, atol=1e-5)
