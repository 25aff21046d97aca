import pytest
import torch
from torch import nn

from pytorch_accelerated.finetuning import (
    Layer,
    LayerGroup,
    ModelFreezer,
    parameter_groups,
)


class TinyViT(nn.Module):
    """Owns parameters itself, and holds attention whose weights have no leaf module."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 3, 4))
        self.patch_embed = nn.Linear(2, 4)
        self.blocks = nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, batch_first=True)
        )
        self.head = nn.Linear(4, 2)


class TiedLanguageModel(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=bias)
        self.head.weight = self.embedding.weight


def create_convnet():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()),
        nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)),
        nn.Flatten(),
        nn.Linear(2, 2),
    )


def frozen_names(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def names_in(model, parameters):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in parameters]


# --- what there is


def test_groups_are_the_direct_children_and_layers_the_modules_without_children():
    model = create_convnet()
    freezer = ModelFreezer(model)

    assert freezer.num_groups == 4
    groups = freezer.get_layer_groups()
    assert groups[1] == LayerGroup((1, -3), model[1], is_frozen=False)
    assert [group.module for group in groups] == list(model)
    assert [
        (layer.layer_group_idx, layer.module) for layer in freezer.get_layers()
    ] == [
        ((0, -4), model[0][0]),
        ((0, -4), model[0][1]),
        ((0, -4), model[0][2]),
        ((1, -3), model[1][0]),
        ((1, -3), model[1][1]),
        ((1, -3), model[1][2]),
        ((2, -2), model[2]),
        ((3, -1), model[3]),
    ]


def test_making_a_freezer_unfreezes_everything_and_leaves_the_models_own_mode():
    model = create_convnet().eval().requires_grad_(False)
    freezer = ModelFreezer(model)

    assert frozen_names(model) == set()
    assert not any(layer.is_frozen for layer in freezer.get_layers())
    assert not model.training


def test_a_new_head_is_seen_by_a_freezer_made_before():
    model = create_convnet()
    freezer = ModelFreezer(model)
    model[3] = nn.Linear(2, 7)
    freezer.freeze(-1, -1)
    assert frozen_names(model) == {"3.weight", "3.bias"}


# --- freezing


def test_freeze_keeps_the_last_group_trainable_and_leaves_batch_norms_alone():
    model = create_convnet()
    freezer = ModelFreezer(model)

    assert freezer.freeze() is None

    assert frozen_names(model) == {"0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias"}
    assert [group.is_frozen for group in freezer.get_layer_groups()] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("from_index", "to_index", "expected"),
    [(0, 1, {0, 1}), (1, 0, {0, 1}), (-1, -2, {2, 3}), (-4, 1, {0, 1}), (2, 2, {2})],
)
def test_ranges_are_inclusive_in_either_order_and_may_be_negative(
    from_index, to_index, expected
):
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(4)])
    freezer = ModelFreezer(model)
    freezer.freeze(from_index, to_index)

    groups = freezer.get_layer_groups()
    assert {group.layer_group_idx[0] for group in groups if group.is_frozen} == expected
    assert freezer._convert_idxs(from_index, to_index) == (min(expected), max(expected))


@pytest.mark.parametrize(("from_index", "to_index"), [(0, 4), (-5, 0), (7, 7)])
@pytest.mark.parametrize("method", ["freeze", "unfreeze"])
def test_an_index_without_a_group_is_an_error_that_says_which_there_are(
    method, from_index, to_index
):
    freezer = ModelFreezer(create_convnet())
    with pytest.raises(IndexError, match="0 to 3, or -4 to -1"):
        getattr(freezer, method)(from_index, to_index)


def test_a_model_with_one_child_stays_trainable_by_default():
    """Defect 46: the default froze all of a model with one child."""
    model = nn.Sequential(nn.Linear(2, 2))
    freezer = ModelFreezer(model)
    freezer.freeze(set_modules_as_eval=True)
    assert frozen_names(model) == set()
    assert model[0].training

    freezer.freeze(0, 0)
    assert frozen_names(model) == {"0.weight", "0.bias"}


def test_a_model_without_children_is_one_group():
    """Defect 46: nothing of a model without children was ever frozen."""
    model = nn.Linear(2, 2)
    freezer = ModelFreezer(model)
    assert freezer.num_groups == 1
    freezer.freeze()
    assert frozen_names(model) == set()

    freezer.freeze(-1, -1, set_modules_as_eval=True)

    assert frozen_names(model) == {"weight", "bias"}
    assert model.training
    assert freezer.get_layer_groups() == [LayerGroup((0, -1), model, is_frozen=True)]
    assert freezer.get_layers() == [Layer((0, -1), model, is_frozen=True)]


def test_parameters_of_the_model_itself_count_with_the_first_group():
    """Defect 46: cls_token and pos_embed were never frozen."""
    model = TinyViT()
    freezer = ModelFreezer(model)
    freezer.freeze(1, 2)
    assert model.cls_token.requires_grad
    assert model.pos_embed.requires_grad

    freezer.unfreeze()
    freezer.freeze()

    head = {"head.weight", "head.bias"}
    assert frozen_names(model) == dict(model.named_parameters()).keys() - head
    assert freezer.get_layer_groups()[0].is_frozen


def test_modules_that_own_parameters_are_layers_too():
    """Defect 46: a mixed state of such a module could not be seen."""
    model = TinyViT()
    freezer = ModelFreezer(model)
    freezer.freeze(0, 0)
    layers = {id(layer.module): layer for layer in freezer.get_layers()}

    assert layers[id(model)] == Layer((0, -3), model, is_frozen=True)
    attention = model.blocks[0].self_attn
    assert layers[id(attention)] == Layer((1, -2), attention, is_frozen=False)
    assert id(model.blocks) not in layers


def test_a_module_in_two_groups_counts_with_the_first():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared))
    freezer = ModelFreezer(model)
    freezer.freeze(1, 1)
    assert frozen_names(model) == set()

    freezer.freeze(0, 0)
    assert frozen_names(model) == {"0.0.weight", "0.0.bias"}
    assert [layer.module for layer in freezer.get_layers()].count(shared) == 1
    assert names_in(model, freezer.unfreeze()[0]["params"]) == [
        "0.0.weight",
        "0.0.bias",
    ]


def test_a_tied_weight_counts_with_the_first_group_that_has_it():
    model = TiedLanguageModel(bias=True)
    freezer = ModelFreezer(model)
    freezer.freeze()
    assert frozen_names(model) == {"embedding.weight", "body.weight", "body.bias"}
    # its own bias is trainable, so this is no layer frozen in part
    assert not freezer.get_layers()[-1].is_frozen

    unfrozen = freezer.unfreeze()
    assert {idx: len(group["params"]) for idx, group in unfrozen.items()} == {
        0: 1,
        1: 2,
    }


def test_a_layer_whose_only_weight_is_tied_shows_the_state_of_that_weight():
    freezer = ModelFreezer(TiedLanguageModel(bias=False))
    freezer.freeze(0, 0)
    assert [layer.is_frozen for layer in freezer.get_layers()] == [True, False, True]


def test_a_layer_frozen_in_part_is_an_error_that_names_it():
    """Defect 46: it was a ValueError without a text."""
    model = create_convnet()
    freezer = ModelFreezer(model)
    model[1][0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'1\.0' \(Conv2d\) is frozen in part"):
        freezer.get_layers()


def test_weights_of_whole_numbers_are_passed_over():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    codes = torch.ones(4, dtype=torch.uint8)
    model[0].codes = nn.Parameter(codes, requires_grad=False)
    freezer = ModelFreezer(model)
    freezer.freeze(0, 0)
    assert names_in(model, freezer.unfreeze()[0]["params"]) == ["0.weight", "0.bias"]
    assert not freezer.get_layers()[0].is_frozen


# --- unfreezing


def test_unfreeze_returns_what_it_unfroze_by_group_in_module_order():
    model = create_convnet()
    freezer = ModelFreezer(model)
    freezer.freeze()
    unfrozen = freezer.unfreeze()

    assert list(unfrozen) == [0, 1]
    assert unfrozen[1].keys() == {"params"}
    assert names_in(model, unfrozen[0]["params"]) == ["0.0.weight", "0.0.bias"]
    assert names_in(model, unfrozen[1]["params"]) == ["1.0.weight", "1.0.bias"]
    assert frozen_names(model) == set()
    assert freezer.unfreeze() == {}


def test_batch_norms_that_the_user_froze_are_left_alone():
    model = create_convnet()
    freezer = ModelFreezer(model)
    model[0][1].requires_grad_(False).eval()
    freezer.freeze(set_modules_as_eval=True)
    freezer.unfreeze()
    assert frozen_names(model) == {"0.1.weight", "0.1.bias"}
    assert not model[0][1].training


# --- modes


def test_freeze_sets_the_eval_mode_and_the_parameters_too():
    """Defect 43: freeze(set_modules_as_eval=True) froze nothing."""
    model = create_convnet()
    freezer = ModelFreezer(model, freeze_batch_norms=True)
    freezer.freeze(set_modules_as_eval=True)

    assert frozen_names(model) == {
        name for name, _ in model.named_parameters() if not name.startswith("3.")
    }
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name for name, training in modes.items() if training} == {"", "3"}
    assert all(layer.is_frozen for layer in freezer.get_layers()[:-1])


def test_batch_norms_left_alone_keep_training_inside_modules_in_eval_mode():
    model = create_convnet()
    ModelFreezer(model).freeze(0, 1, set_modules_as_eval=True)
    in_training = {name for name, module in model.named_modules() if module.training}
    assert in_training == {"", "0.1", "1.1", "2", "3"}


def test_unfreeze_without_the_training_mode_unfreezes_parameters_only():
    """Defect 43: unfreeze(set_modules_as_training=False) kept everything frozen."""
    model = create_convnet()
    freezer = ModelFreezer(model)
    freezer.freeze(0, 0, set_modules_as_eval=True)

    unfrozen = freezer.unfreeze(set_modules_as_training=False)

    assert list(unfrozen) == [0]
    assert frozen_names(model) == set()
    assert not model[0][0].training


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_of_the_model_itself_is_never_touched(mode):
    model = TinyViT().train(mode)
    freezer = ModelFreezer(model)
    freezer.freeze(0, -1, set_modules_as_eval=True)
    assert model.training is mode
    freezer.unfreeze()
    assert model.training is mode
    assert all(module.training for module in list(model.modules())[1:])


# --- parameter groups


def in_groups(model, groups, *fields):
    """Return the names of the parameters of each group, by the values of its fields."""
    return {
        tuple(group[field] for field in fields): names_in(model, group["params"])
        for group in groups
    }


def test_vectors_norms_and_if_asked_embeddings_are_not_decayed_and_frozen_left_out():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "norm": nn.LayerNorm((3, 4)),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "linear": nn.Linear(4, 4),
        }
    )
    without = ["norm.weight", "norm.bias", "linear.bias"]

    plain = parameter_groups(model, weight_decay=0.1)
    spared = parameter_groups(model, weight_decay=0.1, decay_embeddings=False)

    assert in_groups(model, plain, "weight_decay") == {
        (0.1,): ["embedding.weight", "linear.weight"],
        (0.0,): without,
    }
    assert in_groups(model, spared, "weight_decay") == {
        (0.1,): ["linear.weight"],
        (0.0,): ["embedding.weight", *without],
    }
    assert "lr" not in plain[0]
    torch.optim.AdamW(plain)


def test_a_tied_weight_counts_once_with_the_first_of_its_layers():
    model = TiedLanguageModel(bias=True)

    groups = parameter_groups(model, weight_decay=0.1, lr=1.0, layer_decay=0.5)

    assert in_groups(model, groups, "lr", "weight_decay") == {
        (0.5, 0.1): ["embedding.weight"],
        (1.0, 0.1): ["body.weight"],
        (1.0, 0.0): ["body.bias", "head.bias"],
    }
    assert len(torch.optim.SGD(groups).param_groups) == 3


def test_learning_rates_shrink_from_layer_to_layer_towards_the_input():
    """A norm goes with the layer before it, and a token with the one after it."""
    model = nn.Sequential()
    model.add_module("vit", TinyViT())
    vit = model.vit
    vit.blocks.append(nn.Linear(4, 4))
    vit.blocks.append(nn.LayerNorm(4))

    groups = parameter_groups(vit, weight_decay=0.0, lr=8.0, layer_decay=0.5)
    lrs = {}
    for group in groups:
        for name in names_in(vit, group["params"]):
            lrs.setdefault(group["lr"], set()).add(".".join(name.split(".")[:2]))

    assert lrs == {
        1.0: {"cls_token", "pos_embed", "patch_embed.weight", "patch_embed.bias"},
        2.0: {"blocks.0"},
        4.0: {"blocks.1", "blocks.2"},
        8.0: {"head.weight", "head.bias"},
    }
    member = parameter_groups(model, weight_decay=0.0, lr=8.0, layer_decay=0.5)
    assert {group["lr"] for group in member} == {8.0}
    wrapped = nn.ModuleDict({"backbone": vit})
    assert groups == parameter_groups(
        wrapped, weight_decay=0.0, lr=8.0, layer_decay=0.5
    )


def test_the_depth_of_a_parameter_can_be_told():
    model = create_convnet()

    groups = parameter_groups(
        model,
        weight_decay=0.0,
        lr=1.0,
        layer_decay=0.5,
        depth_of=lambda name: 7 if name.startswith("3") else 5,
    )

    assert {
        group["lr"]: {name[0] for name in names_in(model, group["params"])}
        for group in groups
        if group["params"][0].ndim > 1
    } == {0.25: {"0", "1"}, 1.0: {"3"}}


def test_groups_that_cannot_be_are_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="needs lr, the learning rate of the last"):
        parameter_groups(model, weight_decay=0.1, layer_decay=0.9)
    with pytest.raises(ValueError, match="All parameters are frozen"):
        parameter_groups(model.requires_grad_(False), weight_decay=0.1)
