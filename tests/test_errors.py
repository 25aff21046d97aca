import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from pytorch_accelerated import errors
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.errors import TrainingWarning, warn
from pytorch_accelerated.trainer import Trainer


def test_a_warning_points_at_the_line_of_the_user():
    """Not at a line of the library, however many of its calls are in between."""
    fp16 = {"mixed_precision": "fp16"}
    with pytest.warns(TrainingWarning, match="no effect on a CPU") as caught:
        Trainer(nn.Linear(1, 1), None, None, [], accelerator_kwargs=fp16)
    line = inspect.currentframe().f_lineno - 1
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)


def test_one_line_makes_all_warnings_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        with pytest.raises(TrainingWarning, match="something"):
            warn("something")


EIGHT = TensorDataset(torch.ones(8, 1), torch.ones(8, 1))


class Raises(nn.Linear):
    def __init__(self, error):
        super().__init__(1, 1)
        self.error = error

    def forward(self, inputs):
        raise self.error


class FailsAtThree(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 3:
            raise ValueError("a broken file")
        return torch.ones(1), torch.ones(1)


class Fails(TrainerCallback):
    def on_train_step_end(self, trainer, **kwargs):
        raise ValueError("a broken callback")


OUT_OF_MEMORY = (
    "The run ended in epoch 1 (training)",
    "Last training state: none",
    "batches of 4 samples",
    "per_device_batch_size=2 and gradient_accumulation_steps=2",
)


@pytest.mark.parametrize(
    ("model", "dataset", "callbacks", "error", "texts"),
    [
        (
            *(Raises(torch.OutOfMemoryError("no memory")), EIGHT, ()),
            *(torch.OutOfMemoryError, ("no memory", *OUT_OF_MEMORY)),
        ),
        (Raises(MemoryError()), EIGHT, (), MemoryError, OUT_OF_MEMORY),
        (
            *(nn.Linear(1, 1), FailsAtThree(), (), ValueError),
            ("a broken file", "Raised by sample 3."),
        ),
        (
            *(nn.Linear(1, 1), EIGHT, [Fails], ValueError),
            ("a broken callback", "callback Fails in the event on_train_step_end"),
        ),
    ],
    ids=["memory of the device", "memory of the host", "dataset", "callback"],
)
def test_on_python_3_10_an_error_has_it_all_in_its_message_found_108(
    monkeypatch, model, dataset, callbacks, error, texts
):
    monkeypatch.setattr(errors, "_NOTES_ARE_SHOWN", False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.MSELoss(), optimizer, callbacks)

    with pytest.raises(error) as caught:
        trainer.train(
            *(dataset, 1),
            per_device_batch_size=4,
            train_dataloader_kwargs={"num_workers": 0},
        )

    message = str(caught.value)
    assert all(text in message for text in texts), message
    assert message.startswith(texts[0])


def test_an_error_that_is_no_text_keeps_its_arguments(monkeypatch):
    monkeypatch.setattr(errors, "_NOTES_ARE_SHOWN", False)
    error = OSError(28, "No space left on device", "model.safetensors")

    errors.add_note(error, "The run ended.")

    assert (error.errno, error.filename) == (28, "model.safetensors")
    assert str(error) == "[Errno 28] No space left on device: 'model.safetensors'"
