"""What an error in the middle of a run says besides torch's own words."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from pytorch_accelerated.trainer import Trainer


def advice_on(
    dataset, loss_func=None, method="train", raised=(RuntimeError, IndexError)
):
    model = nn.Linear(1, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, loss_func or nn.CrossEntropyLoss(), optimizer, ())
    arguments = (1,) if method == "train" else ()
    with pytest.raises(raised) as caught:
        getattr(trainer, method)(dataset, *arguments)
    return "\n".join([str(caught.value), *caught.value.__notes__])


def targets(values):
    return TensorDataset(torch.ones(len(values), 1), torch.tensor(values))


class Ragged(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.ones(index + 1), 0


@pytest.mark.parametrize("method", ["train", "evaluate"])
def test_samples_that_cannot_be_stacked_found_104(method):
    assert "give a collate_fn" in advice_on(Ragged(), method=method)


@pytest.mark.parametrize("inputs", [torch.ones(3, 2), torch.ones(3, 1)])
def test_tensors_that_were_to_be_paired(inputs):
    tensors = (inputs, torch.ones(3, 1))
    said = advice_on(tensors, nn.MSELoss(), raised=(RuntimeError, TypeError))
    assert "TensorDataset(inputs, targets)" in said


@pytest.mark.parametrize("bad", [3, -1])
def test_a_class_that_the_model_has_no_output_for_found_104(bad):
    assert "classes from 0 to n - 1" in advice_on(targets([0, 1, 2, bad]))


@pytest.mark.parametrize(
    ("dataset", "loss_func", "advice"),
    [
        (targets([0.0, 1.0]), nn.CrossEntropyLoss(), "target.long()"),
        (targets([[0], [1]]), nn.CrossEntropyLoss(), "target.squeeze()"),
        (targets([[0, 1, 0]]), nn.BCEWithLogitsLoss(), "target.float()"),
    ],
)
def test_targets_that_a_loss_does_not_take_found_104(dataset, loss_func, advice):
    assert advice in advice_on(dataset, loss_func)


class Raises(Ragged):
    def __init__(self, error):
        self.error = error

    def __getitem__(self, index):
        raise self.error


def test_inputs_in_double_precision():
    dataset = TensorDataset(torch.ones(2, 1).double(), torch.tensor([0, 1]))
    assert "return inputs.float()" in advice_on(dataset)
    error = "Input type (float) and bias type (c10::Half) should be the same"
    assert "inputs.float()" not in advice_on(Raises(RuntimeError(error)))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("Trying to resize storage that is not resizable", "give a collate_fn"),
        ("'DistributedDataParallel' object has no attribute 'g'", "get_model()"),
        ("Input type (double) and bias type (float) should be the same", "float()"),
    ],
)
def test_what_torch_says_elsewhere(error, advice):
    assert advice in advice_on(Raises(RuntimeError(error)))


@pytest.mark.parametrize(
    ("error", "is_of_the_job"),
    [
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), True),
        (ConnectionResetError("Connection reset by peer"), False),  # by a web server
    ],
)
def test_what_is_lost_contact_between_processes_and_what_is_not(error, is_of_the_job):
    told = advice_on(Raises(error), raised=type(error))
    assert "The run ended in epoch 1 (training)" in told
    assert ("look at what it printed first" in told) is is_of_the_job
