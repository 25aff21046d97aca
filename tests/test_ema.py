import copy

import pytest
import torch
from torch import nn

from pytorch_accelerated.ema import ModelEma, ModelMean, Tensors, copy_tensors


def create_model(weight=0.0, dtype=torch.float32):
    model = nn.Linear(2, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, weight)
    return model


def set_weight(model, value):
    nn.init.constant_(model.weight, value)


def create_norm_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def train_step(model, optimizer, seed):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()


def equal_states(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


class OwnRule(ModelEma):
    """A subclass as it was written for 0.1.61."""

    def update_fn(self, ema_model_weights, updated_model_weights):
        return torch.maximum(ema_model_weights, updated_model_weights)


def test_the_average_moves_by_one_minus_decay_at_each_update():
    model = create_model(weight=1.0)
    ema = ModelEma(model, decay=0.75)
    set_weight(model, 5.0)

    ema.update(model)  # 0.75 * 1 + 0.25 * 5
    assert ema.module.weight.tolist() == [[2.0, 2.0]]
    ema.update(model)  # 0.75 * 2 + 0.25 * 5
    assert ema.module.weight.tolist() == [[2.75, 2.75]]
    assert ema.num_updates == 2
    assert model.weight.tolist() == [[5.0, 5.0]]


def test_the_copy_is_independent_in_eval_mode_and_without_gradients():
    model = create_norm_model()
    ema = ModelEma(model)

    assert not any(module.training for module in ema.module.modules())
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in ema.parameters())


def test_floating_point_buffers_are_averaged_and_integer_buffers_copied():
    """Defect 54: num_batches_tracked stayed 0."""
    model = create_norm_model()
    ema = ModelEma(model, decay=0.75)
    model[1].running_mean.fill_(4.0)
    model[1].num_batches_tracked.fill_(7)
    ema.update(model)

    assert ema.module[1].running_mean.tolist() == [1.0] * 4
    assert ema.module[1].num_batches_tracked.item() == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
def test_infinities_in_a_weight_stay_what_they_are_found_75(decay, dtype):
    """Found 75: -inf - -inf is NaN, and so was the average."""
    model = nn.Sequential(create_model(dtype=dtype), create_model(4.0, dtype))
    model[0].weight.requires_grad_(False)
    for layer in model:
        layer.weight.data[0, 0] = -torch.inf
    model[0].weight.data[0, 1] = torch.nan
    ema = ModelEma(model, decay=decay)
    model[1].weight.data[0, 1] = 8.0
    for _ in range(2):
        ema.update(model)
        assert str(ema.module[0].weight.tolist()) == "[[-inf, nan]]"
        assert ema.module[1].weight[0, 0] == -torch.inf
    assert ema.module[1].weight[0, 1] == 8.0 - 4.0 * decay**2


def test_an_element_that_becomes_finite_is_averaged_from_then_on_found_75():
    model = create_model(-torch.inf)
    ema = ModelEma(model, decay=0.75)
    set_weight(model, 4.0)
    ema.update(model)
    assert ema.module.weight.tolist() == [[4.0, 4.0]]
    set_weight(model, 8.0)
    ema.update(model)
    assert ema.module.weight.tolist() == [[5.0, 5.0]]


@pytest.mark.parametrize("ema_class", [ModelEma, OwnRule])
def test_a_weight_of_another_shape_is_refused_found_75(ema_class):
    """Found 75: a head of 10 outputs was averaged with one of 1, by broadcasting."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 10))
    ema = ema_class(model)
    model[1] = nn.Linear(3, 1)
    before = copy.deepcopy(ema.module)
    for change in (ema.update, ema.set):
        with pytest.raises(
            ValueError, match=r"'1\.weight' .* \(1, 3\), .* has \(10, 3\)\. Create"
        ):
            change(model)
    assert equal_states(ema.module, before)


def test_a_tied_weight_is_moved_once():
    model = nn.Sequential(create_model(), create_model())
    model[1].weight = model[0].weight
    ema = ModelEma(model, decay=0.75)
    set_weight(model[0], 4.0)
    ema.update(model)
    assert ema.module[1].weight.tolist() == [[1.0, 1.0]]
    assert ema.module[0].weight is ema.module[1].weight


def test_an_overridden_rule_is_called_for_the_averaged_entries():
    model = create_model(weight=3.0)
    ema = OwnRule(model, decay=0.5)
    set_weight(model, 1.0)
    ema.update(model)
    assert ema.module.weight.tolist() == [[3.0, 3.0]]
    set_weight(model, 8.0)
    ema.update(model)
    assert ema.module.weight.tolist() == [[8.0, 8.0]]
    assert ema.num_updates == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_overridden_rule_is_given_plain_tensors_of_one_precision(dtype):
    seen = []
    model = create_model(dtype=dtype)
    ema = ModelEma(model)
    ema.update_fn = lambda average, new: seen.extend([average, new]) or new
    ema.update(model)
    assert [tensor.dtype for tensor in seen] == [torch.float32, torch.float32]
    assert not any(tensor.requires_grad for tensor in seen)


@pytest.mark.usefixtures("process_group")
def test_a_sharded_model_may_have_buffers_that_are_whole():
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    model, mesh = nn.BatchNorm1d(4), init_device_mesh("cpu", (1,))
    model.weight = nn.Parameter(distribute_tensor(model.weight, mesh, [Shard(0)]))
    mean = ModelMean(model)
    for value in (1.0, 3.0):
        nn.init.constant_(model.weight, value)
        model.running_mean.fill_(value)
        mean.update(model)
    assert mean.module.weight.full_tensor().tolist() == [2.0] * 4
    assert mean.module.running_mean.tolist() == [2.0] * 4


def test_an_overridden_update_is_called():
    class EveryOther(ModelEma):
        def _update(self, model, update_fn):
            if self.num_updates % 2:
                super()._update(model, update_fn)

    model = create_model()
    ema = EveryOther(model, decay=0.5)
    set_weight(model, 4.0)
    ema.update(model)
    assert ema.module.weight.tolist() == [[0.0, 0.0]]
    ema.update(model)
    assert ema.module.weight.tolist() == [[2.0, 2.0]]


def test_the_fused_rule_equals_the_rule_it_stands_for():
    class Spelled(ModelEma):
        def update_fn(self, ema_model_weights, updated_model_weights):
            return super().update_fn(ema_model_weights, updated_model_weights)

    model = create_norm_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fused, spelled = ModelEma(model, 0.9, warmup=True), Spelled(model, 0.9, warmup=True)
    for seed in range(5):
        train_step(model, optimizer, seed)
        fused.update(model)
        spelled.update(model)

    torch.testing.assert_close(fused.module.state_dict(), spelled.module.state_dict())


def test_set_copies_the_model_and_starts_the_count_again():
    model = create_norm_model()
    ema = ModelEma(model, decay=0.9, warmup=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    train_step(model, optimizer, seed=1)
    ema.update(model)
    ema.set(model)
    assert equal_states(ema.module, model)
    assert ema.num_updates == 0
    assert ema.current_decay == 0.1


def test_warmup_grows_the_decay_up_to_the_one_asked_for():
    model = create_model()
    ema = ModelEma(model, decay=0.25, warmup=True)
    set_weight(model, 110.0)

    decays, weights = [], []
    for _ in range(4):
        decays.append(ema.current_decay)
        ema.update(model)
        weights.append(ema.module.weight[0, 0].item())

    # (1 + n) / (10 + n), and 4 / 13 is more than 0.25
    assert decays == [1 / 10, 2 / 11, 3 / 12, 0.25]
    assert weights[:2] == pytest.approx([99.0, 108.0])
    assert ModelEma(model, decay=0.25).current_decay == 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_averaged_in_float32(dtype):
    """In 16 bits, 1 + 0.001 * (2 - 1) rounds back to 1 at every update."""
    model = create_model(weight=1.0, dtype=dtype)
    reference = create_model(weight=1.0)
    ema, exact = ModelEma(model, decay=0.9999), ModelEma(reference, decay=0.9999)
    set_weight(model, 2.0)
    set_weight(reference, 2.0)
    for _ in range(1000):
        ema.update(model)
        exact.update(reference)

    expected = 2 - 0.9999**1000  # 1.0952
    assert exact.module.weight[0, 0].item() == pytest.approx(expected, abs=1e-4)
    assert ema.module.weight[0, 0].item() == pytest.approx(
        expected, abs=torch.finfo(dtype).eps
    )


def test_a_model_of_mixed_precision_is_averaged_as_a_whole():
    model = nn.Sequential(create_model(), create_model(dtype=torch.bfloat16))
    model.append(create_model(dtype=torch.float64))
    ema = ModelEma(model, decay=0.75)
    for layer in model:
        set_weight(layer, 4.0)
    ema.update(model)
    assert [layer.weight[0, 0].item() for layer in ema.module] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_goes_on_exactly_from_its_state(tmp_path, dtype, warmup):
    def create_ema():
        return ModelEma(create_norm_model().to(dtype), decay=0.9, warmup=warmup)

    snapshots = []
    model = create_norm_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for seed in range(6):
        train_step(model, optimizer, seed)
        snapshots.append(copy.deepcopy(model).to(dtype))

    uninterrupted, first_half, resumed = create_ema(), create_ema(), create_ema()
    for snapshot in snapshots:
        uninterrupted.update(snapshot)
    for snapshot in snapshots[:3]:
        first_half.update(snapshot)
    torch.save(first_half.state_dict(), tmp_path / "ema.pt")
    resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    assert resumed.num_updates == 3
    for snapshot in snapshots[3:]:
        resumed.update(snapshot)

    assert equal_states(resumed, uninterrupted)
    assert resumed.num_updates == 6


@pytest.mark.parametrize("ema_class", [ModelEma, OwnRule])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_stays_on_its_own_device(ema_class, dtype):
    model = create_norm_model().to(dtype)
    ema = ema_class(model).to("meta")
    ema.update(model)
    ema.set(model)
    assert {value.device.type for value in ema.module.state_dict().values()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ema_device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_and_average_may_live_on_different_devices(ema_device, dtype):
    model = create_norm_model().to("cuda", dtype)
    ema = ModelEma(model, decay=0.75).to(ema_device)
    nn.init.constant_(model[0].bias, 0.0)
    ema.set(model)
    nn.init.constant_(model[0].bias, 4.0)
    ema.update(model)
    assert ema.module[0].bias.tolist() == [1.0] * 4
    assert ema.module[0].bias.device.type == ema_device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_updates_never_wait_for_the_device():
    model = create_norm_model().to("cuda")
    ema = ModelEma(model, warmup=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_a_decay_that_is_no_fraction_is_refused(decay):
    with pytest.raises(ValueError, match=f"between 0 .* and 1 .*got {decay}"):
        ModelEma(create_model(), decay=decay)


def test_a_wrapped_model_is_refused_with_a_hint_to_unwrap_it():
    model = create_model()
    ema = ModelEma(model)
    with pytest.raises(ValueError, match=r"0\.weight, weight.*get_model\(\)"):
        ema.update(nn.Sequential(model))
    assert ema.num_updates == 0


def test_the_tensors_of_a_model_are_kept_under_their_names_and_put_back():
    model = create_norm_model()
    tensors = Tensors(model)
    assert equal_states(tensors, model)
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.5), seed=1)
    assert not equal_states(tensors, model)
    copy_tensors(tensors, model)
    assert equal_states(tensors, model)


def test_a_mean_weighs_all_updates_alike_and_forgets_what_it_was_made_from():
    model = create_model(weight=100.0)
    mean = ModelMean(model)
    for weight in (1.0, 2.0, 6.0):
        set_weight(model, weight)
        mean.update(model)

    assert mean.module.weight.tolist() == [[3.0, 3.0]]
