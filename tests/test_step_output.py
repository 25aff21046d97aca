import pytest
import torch
from torch import nn

from pytorch_accelerated import step_output


def test_a_loss_is_a_mean_over_the_samples_or_over_what_num_items_in_batch_says():
    assert step_output.num_items_of({"batch_size": 8}) == 8
    assert step_output.num_items_of({"batch_size": 8, "num_items_in_batch": None}) == 8
    assert step_output.num_items_of({"batch_size": 8, "num_items_in_batch": 100}) == 100


def test_numbers_and_tensors_without_dimensions_are_scalars():
    assert all(map(step_output.is_scalar, [1, 2.5, True, torch.tensor(3.0)]))
    others = ["1", None, torch.ones(1), [1.0], {"a": 1}]
    assert not any(map(step_output.is_scalar, others))


@pytest.mark.parametrize("container", [tuple, list])
def test_a_batch_of_inputs_and_targets_may_have_further_members(container):
    inputs, targets = torch.ones(2), torch.zeros(2)

    batch = container([inputs, targets, "file names"])

    assert step_output.inputs_and_targets_of(batch, nn.MSELoss()) == (inputs, targets)


@pytest.mark.parametrize(
    ("batch", "description"),
    [
        ({"image": torch.ones(2)}, r"a dict with the keys \['image'\]"),
        (torch.ones(4, 3), r"a tensor of shape \(4, 3\)"),
        ([torch.ones(2)], r"a list of length 1 \(Tensor\)"),
        ((torch.ones(2), ["cat", "dog"]), r"a tuple of length 2 \(Tensor, list\)"),
        (7, "a int"),
    ],
)
def test_a_batch_that_cannot_be_taken_apart_is_described(batch, description):
    with pytest.raises(
        TypeError, match=f"got {description}. Override calculate_train_batch_loss and"
    ):
        step_output.inputs_and_targets_of(batch, nn.MSELoss())


def test_the_size_of_a_batch_of_named_tensors_is_that_of_the_first_with_dimensions():
    batch = {"scale": torch.tensor(2.0), "ids": torch.ones(5, 3), "mask": torch.ones(5)}

    assert step_output.batch_size_of(batch) == 5


def test_a_batch_without_a_tensor_has_no_size():
    with pytest.raises(ValueError, match=r"the keys \['text'\]. Override"):
        step_output.batch_size_of({"text": ["a", "b"]})


def test_the_loss_of_a_model_is_an_attribute_or_a_member_of_its_outputs():
    class Outputs:
        loss = 1.5

    assert step_output.loss_of(Outputs()) == 1.5
    assert step_output.loss_of({"loss": 2.5, "logits": None}) == 2.5


def test_a_step_has_to_return_the_size_of_its_batch():
    loss = torch.ones((), requires_grad=True) * 2
    with pytest.raises(KeyError, match=r"\['batch_size'\] not among \['loss'\]"):
        step_output.check_loss({"loss": loss})
