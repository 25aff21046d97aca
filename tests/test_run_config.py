import dataclasses

import pytest

from pytorch_accelerated.run_config import TrainerRunConfig

VALUES = {
    "num_epochs": 2,
    "train_per_device_batch_size": 8,
    "train_dl_kwargs": {"sampler": [0, 1]},
    "eval_per_device_batch_size": None,
    "eval_dl_kwargs": None,
    "gradient_accumulation_steps": 1,
    "gradient_clip_value": None,
    "train_total_batch_size": 8,
    "eval_total_batch_size": None,
    "num_update_steps_per_epoch": 4,
    "num_local_update_steps_per_epoch": 4,
    "max_num_train_steps": 9,
    "is_local_process_zero": True,
    "is_world_process_zero": True,
    "is_distributed": False,
    "mixed_precision": "no",
    "num_processes": 1,
}


@pytest.fixture
def config():
    return TrainerRunConfig(**VALUES)


def test_to_dict_works_without_an_evaluation_set_and_keeps_samplers(config):
    """Defect 31: a TypeError without one, and samplers were removed from the config."""
    values = config.to_dict()

    assert {name: values[name] for name in VALUES} == VALUES
    values["train_dl_kwargs"].clear()
    assert config.train_dl_kwargs == {"sampler": [0, 1]}


def test_a_config_of_the_fields_of_0_1_61_cannot_be_changed(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_epochs = 3


def test_newer_fields_have_defaults(config):
    names = {field.name for field in dataclasses.fields(config)} - set(VALUES)

    assert {"gradient_clip_norm", "seed", "data_seed"} <= names
    assert all(config[name] is None for name in ("gradient_clip_norm", "seed"))


def test_fields_can_be_read_by_their_names(config):
    assert config["num_epochs"] == 2
    with pytest.raises(KeyError, match=r"no field 'epochs'; it has: \['num_epochs'"):
        config["epochs"]
