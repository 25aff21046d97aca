"""Models, tokenizers, schedules and adapters of the Hugging Face libraries."""

from functools import partial

import pytest
import torch
from torch.utils.data import Dataset
from toys import Keeps

from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.data import epoch_order

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

NUM_UPDATES_OF_RUN = (
    TrainerPlaceholderValues.NUM_EPOCHS
    * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH
)


class Tokenized(Dataset):
    """Texts with labels, of the length that each has."""

    def __init__(self, samples, tokenizer):
        self.samples, self.tokenizer = samples, tokenizer

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        text, label = self.samples[index]
        encoded = self.tokenizer(text, truncation=True, max_length=24)
        return {**encoded, "labels": label}


def learning_rate(trainer, **kwargs):
    return trainer.optimizer.param_groups[0]["lr"]


@pytest.fixture(scope="module")
def tokenizer(bert_folder):
    return transformers.AutoTokenizer.from_pretrained(bert_folder)


@pytest.fixture(scope="module")
def collate(tokenizer):
    return transformers.DataCollatorWithPadding(tokenizer)


@pytest.fixture
def create_bert(bert_folder):
    """Create the pretrained classifier of three classes, always with the same head."""

    def create(**kwargs):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return transformers.AutoModelForSequenceClassification.from_pretrained(
                bert_folder, num_labels=3, **kwargs
            )

    return create


def fine_tune_by_hand(model, dataset, collate, *, seed, lr, batch_size):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    num_updates = 2 * len(dataset) // batch_size
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 2, num_updates)
    torch.manual_seed(seed)
    model.train()
    for epoch in (1, 2):
        order = epoch_order(len(dataset), seed, epoch)
        for indices in order.split(batch_size):
            batch = collate([dataset[index] for index in indices.tolist()])
            model(**batch).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model


def fine_tune(model, dataset, collate, *, seed, lr, batch_size, callbacks=(), **kwargs):
    trainer = Trainer(
        model,
        loss_func=None,
        optimizer=torch.optim.AdamW(model.parameters(), lr=lr),
        callbacks=callbacks,
        seed=seed,
    )
    trainer.train(
        dataset,
        num_epochs=2,
        per_device_batch_size=batch_size,
        collate_fn=collate,
        create_scheduler_fn=partial(
            transformers.get_linear_schedule_with_warmup,
            num_warmup_steps=2,
            num_training_steps=NUM_UPDATES_OF_RUN,
        ),
        **kwargs,
    )
    return trainer


def test_a_bert_is_fine_tuned_bit_for_bit_as_by_hand(
    create_bert, tweets, tokenizer, collate
):
    dataset = Tokenized(tweets[:48], tokenizer)
    settings = {"seed": 3, "lr": 5e-5, "batch_size": 8}
    by_hand = fine_tune_by_hand(create_bert(), dataset, collate, **settings)
    rates = Keeps("on_train_step_start", learning_rate)

    trainer = fine_tune(create_bert(), dataset, collate, callbacks=[rates], **settings)

    for name, tensor in by_hand.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name
    # Two updates up to 5e-5, ten down; the twelfth is the last above zero.
    expected = [0.0, 2.5e-5, *(5e-5 * (10 - i) / 10 for i in range(10))]
    assert rates.kept == pytest.approx(expected)


# PEFT asks transformers for a property by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_lora_adapters_train_alone_and_are_saved_alone(
    create_bert, tweets, tokenizer, collate, tmp_path
):
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"])
    model = peft.get_peft_model(create_bert(), config)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    dataset = Tokenized(tweets[:16], tokenizer)

    trainer = fine_tune(model, dataset, collate, seed=0, lr=1e-3, batch_size=8)

    changed = {
        name
        for name, tensor in model.named_parameters()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in changed)

    trainer.get_model().save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1_000_000
    loaded = peft.PeftModel.from_pretrained(create_bert(), tmp_path).eval()
    batch = collate([dataset[0], dataset[1]])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0
        )
