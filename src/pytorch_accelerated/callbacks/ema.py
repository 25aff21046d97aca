"""Training with an exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pytorch_accelerated.callbacks.base import CallbackHandler, event_with_data
from pytorch_accelerated.callbacks.best import check_watch_metric
from pytorch_accelerated.callbacks.checkpointing import SaveBestModelCallback
from pytorch_accelerated.distributed import same_on_all_processes
from pytorch_accelerated.ema import ModelEma, Tensors, copy_tensors

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_PREFIX = "ema_model_"


class ModelEmaCallback(SaveBestModelCallback):
    """Keeps a moving average of the weights, evaluates it, and saves it when best.

    The average moves once per update. After each epoch's evaluation a second one is run
    with the averaged weights, whose metrics have ``ema_model_`` before their names. The
    file that is saved holds the averaged weights as those of the model, and no state
    of the optimizer and the scheduler. The trainer keeps its own weights.

    The average is saved with the training state, and goes on when a run is resumed, or
    when ``train()`` is called again with ``reset_run_history=False``. Otherwise each
    call of ``train()`` starts a new one from the weights at that moment.

    Args:
        decay: How much of the average is kept at each update: it extends over about
            ``1 / (1 - decay)`` updates.
        evaluate_during_training: Whether to evaluate the average after each epoch. If
            not, it is saved after each epoch.
        save_path: The file to save to.
        watch_metric: The metric that says which epoch is best.
        greater_is_better: Whether a greater value of it is better.
        model_ema: Called as ``model_ema(model, decay=decay)``; what it returns has an
            ``update(model)`` and the averaged ``module``, as
            :class:`~pytorch_accelerated.utils.ModelEma` has.
        callbacks: Callbacks for the evaluation of the average, such as metrics or a
            progress bar; the trainer's own do not hear of it.
        reset_on_train: Whether each call of ``train()`` starts without a best value.

    Attributes:
        ema_model: The average, None before the first run.
    """

    may_stop_alone = False

    # What a subclass need not set that does not call the constructor.
    reset_on_train = True
    save_optimizer = False
    save_scheduler = False
    load_saved_checkpoint = False
    ema_model: Any = None
    _model_ema: Callable[..., Any] = ModelEma
    _callback_handler: CallbackHandler | None = None
    _averaged_model: nn.Module | None = None
    _saved_average: Mapping[str, Any] | None = None

    def __init__(
        self,
        decay: float = 0.99,
        evaluate_during_training: bool = True,
        save_path: str | Path = "ema_model.pt",
        watch_metric: str = "ema_model_eval_loss_epoch",
        greater_is_better: bool = False,
        model_ema: Callable[..., Any] = ModelEma,
        callbacks: Iterable[Any] = (),
        *,
        reset_on_train: bool = True,
    ) -> None:
        super().__init__(
            save_path=save_path,
            watch_metric=watch_metric,
            greater_is_better=greater_is_better,
            reset_on_train=reset_on_train,
            save_optimizer=False,
            save_scheduler=False,
            load_saved_checkpoint=False,
        )
        self.decay = decay
        self.evaluate_during_training = evaluate_during_training
        self._model_ema = model_ema
        self._callback_handler = CallbackHandler(callbacks)

    def _forget_earlier_runs(self, trainer: Trainer) -> None:
        super()._forget_earlier_runs(trainer)
        self._averaged_model = self._saved_average = None
        if trainer.run_history.current_epoch == 1:
            self.ema_model = None
        if self._callback_handler is not None:
            self._callback_handler.call_event("_forget_earlier_runs", trainer)

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Create the average, unless it goes on."""
        super().on_training_run_start(trainer)
        self._average(trainer)

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Create the average, if this has not happened at the start of the run."""
        self._average(trainer)

    def _average(self, trainer: Trainer) -> Any:
        """Return the average, which is created when a run first asks for it."""
        if self._averaged_model is not None:
            return self.ema_model
        self._averaged_model = trainer.get_model(keep_torch_compile=False)
        if self.ema_model is None or self._saved_average is not None:
            self.ema_model = self._model_ema(self._averaged_model, decay=self.decay)
        if self._saved_average is not None:
            trainer._engine.load_model(self.ema_model, self._saved_average)
            self._saved_average = None
        if self.evaluate_during_training:
            self.ema_model.to(trainer.device)
        return self.ema_model

    def _check_metric(self, trainer: Trainer) -> None:
        if not self.evaluate_during_training:
            return
        check_watch_metric(
            trainer, self.watch_metric, greater_is_better=self.greater_is_better
        )
        if trainer.eval_dataset is None:
            raise ValueError(
                "ModelEmaCallback evaluates the averaged weights after each epoch and "
                "needs an eval_dataset, but train() was given none. Pass one, or "
                "create the callback with evaluate_during_training=False."
            )

    @event_with_data
    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Move the average towards the weights."""
        self._average(trainer).update(self._averaged_model)

    @event_with_data
    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Evaluate the average after the model, at the end of a training epoch."""
        is_in_training_run = trainer._train_dataloader is not None
        is_intermediate = kwargs.get("is_intermediate", False)
        if self.evaluate_during_training and is_in_training_run and not is_intermediate:
            # Each process has averaged its own, such as the statistics of batch norm;
            # the average that is saved is that of the first.
            same_on_all_processes(self._average(trainer).module.buffers())
            self._with_the_average(trainer, self._evaluate_average)

    def _evaluate_average(self, trainer: Trainer) -> None:
        handler = trainer.callback_handler
        trainer.callback_handler = self._callback_handler or CallbackHandler()
        try:
            with trainer.run_history.prefixed(_PREFIX):
                trainer._run_eval_epoch(trainer._eval_dataloader)
        finally:
            trainer.callback_handler = handler

    def on_training_run_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the average if it is the best so far, or always if it has no metric."""
        self._with_the_average(trainer, self._save_average)

    def _save_average(self, trainer: Trainer) -> None:
        if self.evaluate_during_training:
            super().on_training_run_epoch_end(trainer)
        else:
            trainer.save_checkpoint(
                save_path=self.save_path, save_optimizer=False, save_scheduler=False
            )

    def _with_the_average(
        self, trainer: Trainer, action: Callable[[Trainer], None]
    ) -> None:
        """Do something while the averaged weights are those of the trainer's model."""
        average, model = self._average(trainer).module, trainer.model
        if isinstance(average, Tensors):
            self._with_tensors(average, trainer, action)
            return
        trainer.model = average
        try:
            action(trainer)
        finally:
            trainer.model = model

    def _with_tensors(
        self, average: Tensors, trainer: Trainer, action: Callable[[Trainer], None]
    ) -> None:
        model = trainer.get_model(keep_torch_compile=False)
        # Before each change, as the next pass would go on with what it has gathered.
        trainer._engine.release(model)
        own = Tensors(model)
        copy_tensors(average, model)
        try:
            action(trainer)
        finally:
            trainer._engine.release(model)
            copy_tensors(own, model)

    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Let go of the model, and keep the average."""
        super().on_training_run_end(trainer, **kwargs)
        self._averaged_model = None

    def state_dict(self) -> dict[str, Any]:
        """Return the average, the best value and its epoch."""
        state = super().state_dict()
        if self.ema_model is not None:
            state["ema_model"] = self.ema_model.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the average, the best value and its epoch."""
        super().load_state_dict(state)
        self._saved_average = state.get("ema_model")
