"""Fine-tune a BERT to tell whether two sentences say the same (GLUE MRPC).

    pip install 'pytorch-accelerated[examples]'
    python examples/nlp/bert_glue_mrpc.py

Look at how little there is: the plain trainer takes batches that are dictionaries, and
with ``loss_func=None`` the loss that the model returns. The schedule of transformers is
created once the run is prepared, with placeholders for its length. The metrics are
those of the benchmark, accuracy and F1.
"""

from functools import partial

import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)

from pytorch_accelerated import Trainer, TrainerPlaceholderValues


def load_mrpc():
    """Return GLUE MRPC, downloaded from the Hugging Face hub."""
    from datasets import load_dataset

    return load_dataset("nyu-mll/glue", "mrpc")


class ParaphraseTrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # A default callback moves the modules of a trainer to its device.
        self.metrics = MetricCollection(
            {"accuracy": BinaryAccuracy(), "f1": BinaryF1Score()}
        )

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        predictions = output["model_outputs"].logits.argmax(dim=1)
        self.metrics.update(predictions, batch["labels"])
        return output

    def eval_epoch_end(self):
        super().eval_epoch_end()
        for name, value in self.metrics.compute().items():
            self.run_history.update_metric(name, value.item())
        self.metrics.reset()


def main(dataset=None, checkpoint="bert-base-cased", num_epochs=3, save_dir=None):
    dataset = load_mrpc() if dataset is None else dataset
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def tokenize(samples):
        return tokenizer(samples["sentence1"], samples["sentence2"], truncation=True)

    dataset = dataset.map(tokenize, batched=True).rename_column("label", "labels")
    columns = ["input_ids", "token_type_ids", "attention_mask", "labels"]
    dataset = dataset.select_columns(columns)

    torch.manual_seed(0)  # the classifier on top of the BERT is new
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
    trainer = ParaphraseTrainer(
        model,
        loss_func=None,
        optimizer=torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.01),
        seed=0,
    )
    trainer.train(
        dataset["train"],
        num_epochs=num_epochs,
        eval_dataset=dataset["validation"],
        per_device_batch_size=16,
        collate_fn=DataCollatorWithPadding(tokenizer),
        create_scheduler_fn=partial(
            get_linear_schedule_with_warmup,
            num_warmup_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH // 2,
            num_training_steps=TrainerPlaceholderValues.NUM_EPOCHS
            * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
        ),
        gradient_clip_norm=1.0,
    )
    if save_dir is not None and trainer.run_config.is_world_process_zero:
        model.save_pretrained(save_dir)
        tokenizer.save_pretrained(save_dir)
    return trainer.run_history


if __name__ == "__main__":
    main()
