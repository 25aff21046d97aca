import pytest
import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.trainer import Trainer


class Network(nn.Module):
    """Has a frozen part, a layer that is called twice, and one that is not called."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(5, 6).requires_grad_(False)
        self.body = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6))
        self.shared = nn.Linear(6, 6, bias=False)
        self.head_unused = nn.Linear(6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, inputs):
        hidden = self.shared(self.shared(self.body(self.frozen(inputs))))
        return self.head(hidden)


def create(model, optimizer=torch.optim.Adam, trainer_class=Trainer, **kwargs):
    trained = [p for p in model.parameters() if p.requires_grad]
    return trainer_class(
        model, nn.CrossEntropyLoss(), optimizer(trained, 0.1), (), **kwargs
    )


def batch_of(size):
    return [torch.randn(size, 5), torch.zeros(size, dtype=torch.long)]


def test_what_a_step_holds_and_costs_by_hand():
    summary = create(Network()).summary(batch_of(4))

    layers = {layer.name: layer for layer in summary.layers}
    assert list(layers) == [
        *("", "frozen", "body", "body.0", "body.1", "shared", "head_unused", "head")
    ]
    counted = {n: (x.num_parameters, x.num_trained) for n, x in layers.items()}
    assert counted["frozen"] == (36, 0)
    assert counted["body"] == (36 + 12, 36 + 12)
    assert counted["head"] == (21, 21)
    assert counted[""] == (36 + 48 + 36 + 7 + 21, 48 + 36 + 7 + 21)
    assert (summary.num_parameters, summary.num_trained) == counted[""]
    assert layers["body.1"].output == "4 x 6"
    assert layers["head_unused"].output == ""
    # A product of 4 x a by a x b takes 4 a b multiplications, and as many additions.
    flops = {n: x.flops for n, x in layers.items() if x.flops}
    products = {"frozen": 30, "body": 36, "body.0": 36, "shared": 2 * 36, "head": 18}
    assert flops == {n: 8 * size for n, size in {**products, "": 156}.items()}
    assert summary.forward_flops == 8 * 156
    # Backward: for the weights as much again, and for what is before them, if that is
    # trained: neither for the inputs of the frozen layer, nor for its outputs.
    assert summary.step_flops == 8 * (156 + 126 + 90)
    assert summary.flops_per_sample == 2 * (156 + 126 + 90)

    assert summary.memory == {
        "weights": 4 * 148,
        "buffers": 4 * 12 + 8,
        "gradients": 4 * (112 - 7),
        # Two moments, and a count, of each of the 6 tensors that have a gradient.
        "optimizer": 2 * 4 * (112 - 7) + 6 * 4,
    }
    *table, _, parameters, memory, flops = str(summary).splitlines()
    assert [line.split() for line in table[3:5]] == [
        ["frozen:", "Linear", "4", "x", "6", "(36)", "240"],
        ["body:", "Sequential", "4", "x", "6", "48", "288"],
    ]
    assert parameters == "Parameters  112 trained, 36 (frozen)"
    assert memory.endswith(
        "weights 592 B, buffers 56 B, gradients 420 B, optimizer 864 B"
    )
    assert flops.endswith("forward 1.25 k, with backward 2.98 k, for this batch")


class TiedOutputs(nn.Module):
    """Gives structures instead of tensors, shares a weight, and computes again."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.lstm = nn.LSTM(5, 5)
        self.last = nn.Linear(5, 5)
        self.last.weight = self.first.weight

    def forward(self, inputs):
        def start(inputs):
            return self.first(inputs).tanh()

        hidden = checkpoint(start, inputs.requires_grad_(), use_reentrant=False)
        outputs, _ = self.lstm(hidden)
        return {"logits": self.last(outputs), "name": "no tensor", "none": None}


class OfLogits(Trainer):
    def training_run_start(self):
        self.name = "logits"  # an override may need what another one has set

    def calculate_train_batch_loss(self, batch):
        outputs = self.model(batch[0])
        loss = self.loss_func(outputs[self.name], batch[1])
        return {"loss": loss, "model_outputs": outputs, "batch_size": len(batch[0])}


def test_structures_shared_weights_and_layers_that_are_computed_again():
    summary = create(TiedOutputs(), trainer_class=OfLogits).summary(batch_of(4))

    layers = {layer.name: layer for layer in summary.layers}
    assert layers[""].output == "logits: 4 x 5"
    assert layers["lstm"].output == "4 x 5, 1 x 5, 1 x 5"
    assert layers["first"].flops == 2 * 4 * 5 * 5
    assert layers["first"].num_parameters == layers["last"].num_parameters == 30
    assert summary.num_parameters == 30 + 5 + 2 * (100 + 20)


def test_the_table_fits_80_columns_and_ends_at_its_depth(capsys):
    model = nn.Sequential()
    inner = model
    for depth in range(30):
        layer = nn.Sequential()
        inner.add_module(f"a_layer_with_a_long_name_{depth}", layer)
        inner = layer
    inner.append(nn.Linear(5, 3))

    summary = create(model).summary(batch_of(4), depth=30)

    printed = capsys.readouterr().out
    assert printed == f"{summary}\n"
    assert max(map(len, printed.splitlines())) <= 80
    # Indented by 2 * 15 they still have room in 37 columns.
    assert printed.count("a_layer") == 15
    assert str(create(model).summary(batch_of(4), depth=2)).count("a_layer") == 2
    assert len(summary.layers) == 32


def compiles_never(graph, inputs):
    raise AssertionError("compiled")


@pytest.mark.parametrize(
    "give",
    [
        lambda: TensorDataset(*batch_of(20)),
        lambda: DataLoader(TensorDataset(*batch_of(20)), batch_size=4),
        lambda: tuple(batch_of(4)),
    ],
    ids=["dataset", "loader", "batch"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_batch_of_whatever_is_given_makes_the_step(give, compiled):
    model = Network()
    if compiled:
        model = torch.compile(model, backend=compiles_never)

    summary = create(model).summary(give(), per_device_batch_size=4)

    assert summary.layers[0].output == "4 x 3"
    assert summary.layers[0].kind == "Network"
    assert summary.forward_flops == 8 * 156


def test_without_an_optimizer_there_is_no_state_of_it():
    trainer = Trainer(Network(), nn.CrossEntropyLoss(), None, callbacks=())

    summary = trainer.summary(batch_of(4))

    assert summary.memory["optimizer"] == 0
    assert summary.num_trained == 112
    assert trainer.optimizer is None


def test_what_the_optimizer_does_not_hold_is_not_trained():
    model = Network()
    trainer = Trainer(
        model, nn.CrossEntropyLoss(), torch.optim.SGD(model.head.parameters()), ()
    )

    with pytest.warns(UserWarning, match="No optimizer holds these parameters"):
        assert trainer.summary(batch_of(4)).num_trained == 21


def test_an_update_that_is_not_applied_leaves_the_state_unknown():
    class Skipping(Trainer):
        def _update_weights(self, step):
            pass

    summary = create(Network(), trainer_class=Skipping).summary(batch_of(4))

    assert list(summary.memory) == ["weights", "buffers", "gradients"]


def test_a_step_without_a_backward_pass_of_the_trainer_has_a_table_too():
    class ByHand(Trainer):
        def _perform_forward_and_backward_passes(self, batch, step):
            output = self.calculate_train_batch_loss(batch)
            output["loss"].backward()  # and returns nothing, as in 0.1.61

    summary = create(Network(), trainer_class=ByHand).summary(batch_of(4))

    assert summary.num_trained == 112
    assert summary.step_flops == summary.flops_per_sample == 0
    assert summary.num_samples == 4
    assert "Parameters  112 trained" in str(summary)


def test_what_only_a_callback_calls_is_not_warned_of():
    """The callbacks of the trainer take no part in a summary."""

    class Mine(Trainer):
        def train_epoch_starts(self):
            pass

    class Calls(TrainerCallback):
        def on_training_run_start(self, trainer, **kwargs):
            trainer.train_epoch_starts()

    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Mine(model, nn.CrossEntropyLoss(), optimizer, [Calls]).summary(batch_of(4))


def test_an_error_leaves_no_hook_and_no_counter_behind():
    model = Network()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        create(model).summary([torch.randn(4, 7), torch.zeros(4, dtype=torch.long)])

    assert not _get_current_dispatch_mode_stack()
    assert not global_hooks._global_forward_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="read again, got a tuple_iterator"):
        create(model).summary(iter((batch_of(4),)))
    with pytest.raises(ValueError, match=r"depth must be .* at least 0, got -1"):
        create(model).summary(batch_of(4), depth=-1)
