"""A search for a learning rate, on one process or on several."""

from contextlib import suppress

import optuna
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import OptunaPruningCallback, TrainerCallback
from pytorch_accelerated.engines.launch import create_accelerator

# Each halves the loss in another number of updates: the last two are the worst.
LEARNING_RATES = (0.25, 0.2, 0.01, 0.02)


class Diary(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_stop_training_error(self, trainer, **kwargs):
        self.events.append("stopped")

    def on_exception(self, trainer, **kwargs):
        self.events.append("failed")

    def on_training_run_end(self, trainer, **kwargs):
        self.events.append("ended, failed" if trainer.has_failed else "ended")


class Search:
    """What a script does, and what its processes have seen of each trial."""

    def __init__(self, metric="eval_loss_epoch"):
        self.metric = metric
        self.accelerator = create_accelerator()
        self.seen = []

    def objective(self, trial):
        lr = None
        if trial is not None:
            lr = trial.suggest_float("lr", 0.001, 1.0)
        lr = broadcast_object_list([lr])[0]
        diary, model = Diary(), nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        trainer = Trainer(
            model,
            nn.MSELoss(),
            torch.optim.SGD(model.parameters(), lr=lr),
            [OptunaPruningCallback(trial, self.metric), diary],
        )
        data = TensorDataset(torch.ones(4, 1), torch.zeros(4, 1))
        try:
            history = trainer.train(data, num_epochs=3, eval_dataset=data)
        finally:
            epochs = len(trainer.run_history.get_metric_values("eval_loss_epoch"))
            self.seen.append((lr, epochs, trainer.has_failed, diary.events))
        return history.get_latest_metric(self.metric)

    def run(self):
        """Return the study, which other processes than the main one have none of."""
        if not self.accelerator.is_main_process:
            for _ in LEARNING_RATES:
                with suppress(optuna.TrialPruned):
                    self.objective(None)
            return None
        study = optuna.create_study(pruner=optuna.pruners.MedianPruner(2))
        for lr in LEARNING_RATES:
            study.enqueue_trial({"lr": lr})
        study.optimize(self.objective, n_trials=len(LEARNING_RATES))
        return study


def search(folder):
    the_search = Search()
    study = the_search.run()
    states = [] if study is None else [trial.state.name for trial in study.trials]
    return {"seen": the_search.seen, "states": states}
