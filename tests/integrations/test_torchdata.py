"""Data from other libraries: nodes, tables and streams.

Loaders that keep their state are in test_stateful_dataloader.py.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.data.sharing import is_split_by_process


def create_trainer(trainer_class=Trainer):
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, 0.1)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return trainer_class(model, nn.CrossEntropyLoss(), optimizer, (), seed=0)


def test_the_nodes_of_torchdata_are_used_as_a_loader():
    nodes = pytest.importorskip("torchdata.nodes")
    inputs = torch.arange(60, dtype=torch.float32).reshape(20, 3) / 60
    numbered = TensorDataset(inputs, torch.arange(20) % 2)
    samples = nodes.SamplerWrapper(SequentialSampler(numbered))
    batches = nodes.Batcher(samples, batch_size=4, drop_last=False)

    def fetch(indices):
        inputs, labels = zip(*(numbered[index] for index in indices), strict=True)
        return torch.stack(inputs), torch.stack(labels)

    trainer = create_trainer()
    trainer.train(nodes.Loader(nodes.Mapper(batches, fetch)), num_epochs=2)

    assert trainer.num_updates == 10
    assert trainer.num_samples_seen == 40


# -------------------------------------------------------------------------- datasets


@pytest.fixture
def table():
    """Thirty rows of a Dataset of Hugging Face."""
    datasets = pytest.importorskip("datasets")
    rows = [{"a": i / 10, "b": i % 3, "c": 1.0, "label": i % 2} for i in range(30)]
    return datasets.Dataset.from_list(rows)


def collate_rows(rows):
    inputs = torch.tensor([[row["a"], row["b"], row["c"]] for row in rows])
    return inputs.float(), torch.tensor([row["label"] for row in rows])


def test_a_table_trains_as_its_tensors_would(table):
    by_hand = TensorDataset(*collate_rows(list(table)))
    expected, trainer = create_trainer(), create_trainer()
    expected.train(by_hand, 2, by_hand, per_device_batch_size=8)

    trainer.train(table, 2, table, per_device_batch_size=8, collate_fn=collate_rows)

    torch.testing.assert_close(trainer.model.state_dict(), expected.model.state_dict())


def test_a_table_in_the_format_of_torch_gives_dictionaries(table):
    class DictionaryTrainer(Trainer):
        def calculate_train_batch_loss(self, batch):
            inputs = torch.stack([batch["a"], batch["b"], batch["c"]], dim=1)
            return super().calculate_train_batch_loss((inputs.float(), batch["label"]))

    trainer = create_trainer(DictionaryTrainer)
    trainer.train(table.with_format("torch"), 1, per_device_batch_size=10)

    assert trainer.num_updates == 3


def test_a_streamed_table_trains_without_a_length(table):
    trainer = create_trainer()
    stream = table.to_iterable_dataset()
    trainer.train(stream, 2, per_device_batch_size=8, collate_fn=collate_rows)

    assert trainer.num_samples_seen == 60
    assert trainer.num_updates == 8  # 8, 8, 8 and 6 samples in an epoch


# ------------------------------------------------------------- split over processes


def test_what_other_libraries_have_split_is_recognised(table):
    from datasets.distributed import split_dataset_by_node

    stream = table.to_iterable_dataset()
    split = split_dataset_by_node(stream, rank=0, world_size=2)

    assert is_split_by_process(DataLoader(split, batch_size=1))
    assert not is_split_by_process(DataLoader(stream, batch_size=1))


def test_what_webdataset_has_split_is_recognised(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]

    def create(nodesplitter):
        kwargs = {"nodesplitter": nodesplitter, "shardshuffle": False}
        stream = webdataset.WebDataset(urls, **kwargs)
        return DataLoader(stream, batch_size=1), webdataset.WebLoader(stream)

    assert all(is_split_by_process(each) for each in create(webdataset.split_by_node))
    assert not any(is_split_by_process(each) for each in create(None))
