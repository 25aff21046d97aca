"""Data from other libraries: loaders that keep their state, local files, streams."""

import csv
import io
import json
import tarfile
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, TrainerCallback
from pytorch_accelerated.data.sharing import is_split_by_process
from pytorch_accelerated.errors import StopTrainingError


def create_model():
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, 0.1)
    nn.init.zeros_(model.bias)
    return model


def create_trainer(callbacks=(), model=None):
    model = create_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks, seed=0)


class KeepBatches(TrainerCallback):
    def __init__(self):
        self.first_inputs = []

    def on_train_step_end(self, trainer, batch, batch_output, **kwargs):
        self.first_inputs.extend(batch[0][:, 0].tolist())


class StopAfter(TrainerCallback):
    def __init__(self, num_updates):
        self.num_updates = num_updates

    def on_train_update_end(self, trainer, num_updates, **kwargs):
        if num_updates == self.num_updates:
            raise StopTrainingError(f"Stopped after {num_updates} updates")


# ------------------------------------------------------------------------- torchdata

# torchdata 0.11 was written for an older torch.
of_torchdata = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


@pytest.fixture
def numbered():
    """Twenty samples whose first feature is their number."""
    inputs = torch.arange(60, dtype=torch.float32).reshape(20, 3) / 60
    return TensorDataset(inputs, torch.arange(20) % 2)


@of_torchdata
def test_a_stateful_loader_is_used_as_it_is(numbered):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    loader = loaders.StatefulDataLoader(numbered, batch_size=4, shuffle=False)
    batches = KeepBatches()
    trainer = create_trainer([batches])

    trainer.train(loader, 2, loaders.StatefulDataLoader(numbered, batch_size=5))

    assert trainer.num_updates == 10
    assert trainer.run_config.train_per_device_batch_size == 4
    assert batches.first_inputs == pytest.approx([3 * i / 60 for i in range(20)] * 2)
    assert len(trainer.run_history.get_metric_values("eval_loss_epoch")) == 2


@of_torchdata
def test_a_run_with_a_stateful_loader_is_resumed_in_the_middle_of_an_epoch(
    numbered, tmp_path
):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def train(folder, *callbacks, resume_from=None):
        save = SaveTrainingStateCallback(
            tmp_path / folder, save_every_n_steps=1, save_at_end=False
        )
        batches = KeepBatches()
        trainer = create_trainer([batches, save, *callbacks])
        loader = loaders.StatefulDataLoader(numbered, batch_size=4, shuffle=False)
        trainer.train(loader, 2, resume_from=resume_from)
        return trainer, batches.first_inputs

    whole, all_inputs = train("whole")
    _, first_inputs = train("interrupted", StopAfter(7))
    resumed, other_inputs = train("interrupted", resume_from="auto")

    assert len(first_inputs) >= 24
    assert other_inputs == all_inputs[-len(other_inputs) :]
    torch.testing.assert_close(
        resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0
    )


def test_the_nodes_of_torchdata_are_used_as_a_loader(numbered):
    nodes = pytest.importorskip("torchdata.nodes")
    samples = nodes.SamplerWrapper(torch.utils.data.SequentialSampler(numbered))
    batches = nodes.Batcher(samples, batch_size=4, drop_last=False)

    def fetch(indices):
        inputs, labels = zip(*(numbered[index] for index in indices), strict=True)
        return torch.stack(inputs), torch.stack(labels)

    loader = nodes.Loader(nodes.Mapper(batches, fetch))
    trainer = create_trainer()

    trainer.train(loader, num_epochs=2)

    assert trainer.num_updates == 10
    assert trainer.num_samples_seen == 40


# -------------------------------------------------------------------------- datasets


@pytest.fixture
def local_files(tmp_path):
    """The same table of numbers as CSV, JSON lines and Parquet."""
    datasets = pytest.importorskip("datasets")
    rows = [{"a": i / 10, "b": i % 3, "c": 1.0, "label": i % 2} for i in range(30)]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "data.json").write_text("\n".join(json.dumps(row) for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    return tmp_path


def collate_rows(rows):
    inputs = torch.tensor([[row["a"], row["b"], row["c"]] for row in rows])
    return inputs.float(), torch.tensor([row["label"] for row in rows])


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_datasets_from_local_files_train_alike(kind, local_files):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.load_dataset(
        kind,
        data_files=str(local_files / f"data.{kind}"),
        split="train",
        cache_dir=str(local_files / "cache"),
    )
    by_hand = TensorDataset(*collate_rows(list(dataset)))
    expected = create_trainer()
    expected.train(by_hand, 2, by_hand, per_device_batch_size=8)
    trainer = create_trainer()

    trainer.train(dataset, 2, dataset, per_device_batch_size=8, collate_fn=collate_rows)

    torch.testing.assert_close(trainer.model.state_dict(), expected.model.state_dict())


def test_a_dataset_in_the_format_of_torch_gives_dictionaries(local_files):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_csv(
        str(local_files / "data.csv"), cache_dir=str(local_files / "cache")
    ).with_format("torch")

    class DictionaryTrainer(Trainer):
        def calculate_train_batch_loss(self, batch):
            inputs = torch.stack([batch["a"], batch["b"], batch["c"]], dim=1)
            return super().calculate_train_batch_loss((inputs.float(), batch["label"]))

    model = create_model()
    trainer = DictionaryTrainer(
        model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), ()
    )
    trainer.train(dataset, num_epochs=1, per_device_batch_size=10)

    assert trainer.num_updates == 3


def test_a_streamed_dataset_trains_without_a_length(local_files):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.load_dataset(
        "json",
        data_files=str(local_files / "data.json"),
        split="train",
        streaming=True,
        cache_dir=str(local_files / "cache"),
    )
    trainer = create_trainer()

    trainer.train(
        dataset, num_epochs=2, per_device_batch_size=8, collate_fn=collate_rows
    )

    assert trainer.num_samples_seen == 60
    assert trainer.num_updates == 8  # 8, 8, 8 and 6 samples in an epoch


# -------------------------------------------------------------------------- streams


class Shards(IterableDataset):
    """Reads samples from tar files, one after the other, as webdataset does.

    Each worker of a loader has shards of its own.
    """

    def __init__(self, files):
        self.files = files

    def __iter__(self):
        worker = get_worker_info()
        files = self.files if worker is None else self.files[worker.id :: 2]
        for file in files:
            with tarfile.open(file) as archive:
                for member in archive:
                    sample = json.loads(archive.extractfile(member).read())
                    yield torch.tensor(sample["inputs"]), sample["label"]


@pytest.fixture
def shards(tmp_path):
    """Four tar files of five samples each."""
    files = []
    for shard in range(4):
        files.append(tmp_path / f"shard_{shard}.tar")
        with tarfile.open(files[-1], "w") as archive:
            for index in range(5):
                number = 5 * shard + index
                sample = {"inputs": [number / 20, 1.0, 0.0], "label": number % 2}
                content = json.dumps(sample).encode()
                info = tarfile.TarInfo(f"{number:04}.json")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return files


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_in_tar_files_are_each_seen_once_an_epoch(shards, num_workers):
    batches = KeepBatches()
    trainer = create_trainer([batches])

    trainer.train(
        Shards(shards),
        num_epochs=2,
        eval_dataset=Shards(shards[:1]),
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        train_dataloader_kwargs={"num_workers": num_workers},
    )

    seen = Counter(round(20 * value) for value in batches.first_inputs)
    assert seen == Counter({number: 2 for number in range(20)})
    # 20 samples are 5 batches of 4; two workers with ten each make 6, of 4, 4 and 2.
    assert trainer.num_updates == 6
    assert len(trainer.run_history.get_metric_values("eval_loss_epoch")) == 2


def test_a_stream_of_whole_batches_is_not_batched_again(shards):
    class Batches(IterableDataset):
        def __iter__(self):
            samples = list(Shards(shards))
            for first in range(0, 20, 5):
                inputs, labels = zip(*samples[first : first + 5], strict=True)
                yield torch.stack(inputs), torch.tensor(labels)

    trainer = create_trainer()

    trainer.train(Batches(), num_epochs=2, train_dataloader_kwargs={"batch_size": None})

    assert trainer.num_updates == 8
    assert trainer.num_samples_seen == 40


def test_a_stream_without_end_is_limited_by_updates(shards):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield from Shards(shards)

    trainer = create_trainer()

    trainer.train(
        Endless(), num_epochs=1, per_device_batch_size=4, max_num_train_steps=13
    )

    assert trainer.num_updates == 13


# ---------------------------------------------------------------------- scikit-learn


def test_metrics_of_scikit_learn_are_computed_from_all_predictions():
    metrics = pytest.importorskip("sklearn.metrics")
    datasets = pytest.importorskip("sklearn.datasets")
    features, labels = datasets.load_iris(return_X_y=True)
    dataset = TensorDataset(
        torch.from_numpy(features).float(), torch.from_numpy(labels).long()
    )

    class WithReport(Trainer):
        def eval_epoch_start(self):
            super().eval_epoch_start()
            self.seen = []

        def calculate_eval_batch_loss(self, batch):
            output = super().calculate_eval_batch_loss(batch)
            predictions = output["model_outputs"].argmax(dim=1)
            self.seen.append(torch.stack([predictions, batch[1]]).T)
            return output

        def eval_epoch_end(self):
            predictions, targets = self.gather(torch.cat(self.seen)).T.cpu()
            value = metrics.f1_score(targets, predictions, average="macro")
            self.run_history.update_metric("f1", value)

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    trainer = WithReport(model, nn.CrossEntropyLoss(), optimizer, (), seed=0)
    trainer.train(dataset, 15, dataset, per_device_batch_size=16)

    with torch.no_grad():
        predictions = model(dataset.tensors[0]).argmax(dim=1)
    assert trainer.run_history.get_latest_metric("f1") == pytest.approx(
        metrics.f1_score(labels, predictions, average="macro")
    )
    assert trainer.run_history.get_latest_metric("f1") > 0.9


# ------------------------------------------------------------- split over processes


def test_what_other_libraries_have_split_is_recognised():
    datasets = pytest.importorskip("datasets")
    from datasets.distributed import split_dataset_by_node

    stream = datasets.Dataset.from_dict({"number": [1, 2]}).to_iterable_dataset()
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
