"""The names, arguments and defaults that scripts rely on stay as they are."""

import abc
import enum
import importlib
import inspect
import re

import accelerate
import pytest
from torch import nn

import pytorch_accelerated
from pytorch_accelerated import callbacks, finetuning, schedulers, tracking, utils
from pytorch_accelerated import trainer as trainer_module
from pytorch_accelerated.trainer import Trainer, TrainerPlaceholderValues

# Each line is a signature of 0.1.61, with the names and defaults of its arguments. What
# was changed on purpose says what it was; docs/migrating.md says why.
SIGNATURES = """
trainer.Trainer(model, loss_func, optimizer, callbacks=DEFAULT_CALLBACKS, run_history=None)
trainer.Trainer.train(self, train_dataset, num_epochs=None, eval_dataset=None, per_device_batch_size=8, max_num_train_steps=None, gradient_accumulation_steps=1, gradient_clip_value=None, create_scheduler_fn=None, train_dataloader_kwargs=None, eval_dataloader_kwargs=None, reset_run_history=True, collate_fn=None, resume_from=None)  # num_epochs had no default in 0.1.61
trainer.Trainer.evaluate(self, dataset=None, per_device_batch_size=None, dataloader_kwargs=None, collate_fn=None)  # 8 in 0.1.61
trainer.Trainer.create_train_dataloader(self, batch_size, train_dl_kwargs=None)
trainer.Trainer.create_eval_dataloader(self, batch_size, eval_dl_kwargs=None)
trainer.Trainer.get_default_train_dl_kwargs(self, batch_size)
trainer.Trainer.get_default_eval_dl_kwargs(self, batch_size)
trainer.Trainer.create_scheduler(self)
trainer.Trainer.training_run_start(self)
trainer.Trainer.training_run_epoch_end(self)
trainer.Trainer.training_run_end(self)
trainer.Trainer.train_epoch_start(self)
trainer.Trainer.train_epoch_end(self)
trainer.Trainer.calculate_train_batch_loss(self, batch)
trainer.Trainer.backward_step(self, loss)
trainer.Trainer.optimizer_step(self)
trainer.Trainer.scheduler_step(self)
trainer.Trainer.optimizer_zero_grad(self)
trainer.Trainer.eval_epoch_start(self)
trainer.Trainer.eval_epoch_end(self)
trainer.Trainer.calculate_eval_batch_loss(self, batch)
trainer.Trainer.evaluation_run_start(self)
trainer.Trainer.evaluation_run_end(self)
trainer.Trainer.gather(self, tensor, padding_value=None)
trainer.Trainer.print(self, *args, **kwargs)
trainer.Trainer.get_model(self, keep_torch_compile=True)
trainer.Trainer.save_checkpoint(self, save_path, checkpoint_kwargs=None, save_optimizer=True, save_scheduler=True, save_per_node=True)
trainer.Trainer.load_checkpoint(self, checkpoint_path, load_optimizer=True, load_scheduler=True)
trainer.Trainer.save_training_state(self, output_dir, checkpoint_kwargs=None)
trainer.Trainer.load_training_state(self, input_dir)
trainer.Trainer._create_accelerator(self)
trainer.Trainer._create_callback_handler(self)
trainer.Trainer._prepare_model_optimizer_and_dataloaders(self)
trainer.Trainer._create_run_config(self, num_epochs, gradient_accumulation_steps, max_num_train_steps, per_device_batch_size, gradient_clip_value)
trainer.Trainer._check_eval_batch_size(self)
trainer.Trainer._run_training(self)
trainer.Trainer._run_evaluation(self)
trainer.Trainer._run_train_epoch(self, train_dl)
trainer.Trainer._run_eval_epoch(self, valid_dl, is_training=True, is_intermediate=False)
trainer.Trainer._perform_forward_and_backward_passes(self, batch, step)
trainer.Trainer._clip_gradients(self)
trainer.Trainer._update_loss_tracker(self, batch_loss, batch_size)
trainer.Trainer._add_epoch_loss_to_run_history(self, metric_name)
trainer.TrainerWithTimmScheduler(model, loss_func, optimizer, callbacks=DEFAULT_CALLBACKS, run_history=None)
trainer.replace_trainer_placeholder_values(trainer, instance)
trainer.TrainerPlaceholderValues.placeholder_set()
callbacks.TrainerCallback.on_init_end(self, trainer)
callbacks.TrainerCallback.on_training_run_start(self, trainer)
callbacks.TrainerCallback.on_train_epoch_start(self, trainer)
callbacks.TrainerCallback.on_train_step_start(self, trainer)
callbacks.TrainerCallback.on_train_step_end(self, trainer, batch, batch_output)
callbacks.TrainerCallback.on_train_epoch_end(self, trainer)
callbacks.TrainerCallback.on_eval_epoch_start(self, trainer)
callbacks.TrainerCallback.on_eval_step_start(self, trainer)
callbacks.TrainerCallback.on_eval_step_end(self, trainer, batch, batch_output)
callbacks.TrainerCallback.on_eval_epoch_end(self, trainer)
callbacks.TrainerCallback.on_training_run_epoch_end(self, trainer)
callbacks.TrainerCallback.on_training_run_end(self, trainer)
callbacks.TrainerCallback.on_evaluation_run_start(self, trainer)
callbacks.TrainerCallback.on_evaluation_run_end(self, trainer)
callbacks.TrainerCallback.on_stop_training_error(self, trainer)
callbacks.CallbackHandler(callbacks=())  # no default in 0.1.61
callbacks.CallbackHandler.add_callbacks(self, callbacks)
callbacks.CallbackHandler.add_callback(self, callback)
callbacks.CallbackHandler.clear_callbacks(self)
callbacks.CallbackHandler.call_event(self, event, *args, **kwargs)
callbacks.get_default_callbacks(progress_bar=True)
callbacks.LogMetricsCallback.log_metrics(self, trainer, metrics)
callbacks.LogMetricsCallback._log_latest_metrics(self, trainer, names)
callbacks.LogMetricsCallback._get_latest_metrics(self, trainer, names)
callbacks.ProgressBarCallback()
callbacks.PrintProgressCallback()
callbacks.LogMetricsCallback()
callbacks.TerminateOnNaNCallback()
callbacks.TerminateOnNaNCallback.check_for_nan_after_batch(self, batch_output, step=None)
callbacks.MoveModulesToDeviceCallback()
callbacks.ConvertSyncBatchNormCallback()
callbacks.EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=0.0, watch_metric='eval_loss_epoch', greater_is_better=False, reset_on_train=True)  # 0.01 in 0.1.61
callbacks.SaveBestModelCallback(save_path='best_model.pt', watch_metric='eval_loss_epoch', greater_is_better=False, reset_on_train=True, save_optimizer=True, save_scheduler=True, load_saved_checkpoint=True)
callbacks.LimitBatchesCallback(num_batches)
callbacks.ModelEmaCallback(decay=0.99, evaluate_during_training=True, save_path='ema_model.pt', watch_metric='ema_model_eval_loss_epoch', greater_is_better=False, model_ema=ModelEma, callbacks=())
callbacks.StepBasedEvaluationCallback(eval_every_n_steps)
callbacks.LimitEvalStepsCallback(num_eval_steps, limit_intermediate_only=True)
callbacks.SaveTrainingStateCallback(save_dir='training_states', save_every_n_epochs=None, save_every_n_steps=None, save_at_end=True, max_checkpoints=None)
callbacks.WSDCheckpointCallback(save_dir='checkpoints', save_optimizer=True, save_scheduler=True, initial_checkpoint=None)
tracking.RunHistory.get_metric_names(self)
tracking.RunHistory.get_metric_values(self, metric_name)
tracking.RunHistory.get_latest_metric(self, metric_name)
tracking.RunHistory.set_metric_name_prefix(self, prefix='')
tracking.RunHistory.update_metric(self, metric_name, metric_value)
tracking.RunHistory.delete_metric(self, metric_name)
tracking.RunHistory._increment_epoch(self)
tracking.RunHistory._set_epoch(self, epoch)
tracking.RunHistory.reset(self)
tracking.InMemoryRunHistory.get_metric_names(self)
tracking.InMemoryRunHistory.get_metric_values(self, metric_name)
tracking.InMemoryRunHistory.get_latest_metric(self, metric_name)
tracking.InMemoryRunHistory.set_metric_name_prefix(self, prefix='')
tracking.InMemoryRunHistory.update_metric(self, metric_name, metric_value)
tracking.InMemoryRunHistory.delete_metric(self, metric_name)
tracking.InMemoryRunHistory._increment_epoch(self)
tracking.InMemoryRunHistory._set_epoch(self, epoch)
tracking.InMemoryRunHistory.reset(self)
run_config.TrainerRunConfig(num_epochs, train_per_device_batch_size, train_dl_kwargs, eval_per_device_batch_size, eval_dl_kwargs, gradient_accumulation_steps, gradient_clip_value, train_total_batch_size, eval_total_batch_size, num_update_steps_per_epoch, num_local_update_steps_per_epoch, max_num_train_steps, is_local_process_zero, is_world_process_zero, is_distributed, mixed_precision, num_processes)
run_config.TrainerRunConfig.to_dict(self)
tracking.InMemoryRunHistory()
tracking.LossTracker()
tracking.LossTracker.update(self, loss_batch_value, batch_size=1)
tracking.LossTracker.reset(self)
utils.LimitBatches(num_batches)
utils.DataLoaderSlice(dl, slice_size)
utils.local_process_zero_only(func)
utils.world_process_zero_only(func)
utils.local_process_zero_first(func)
utils.worker_init_fn(worker_id)
utils.remove_padding(padded_tensor, pad_value)
utils.ModelEma(model, decay=0.9999)
utils.ModelEma._update(self, model, update_fn)
utils.ModelEma.update(self, model)
utils.ModelEma.update_fn(self, ema_model_weights, updated_model_weights)
utils.ModelEma.set(self, model)
finetuning.ModelFreezer(model, freeze_batch_norms=False)
finetuning.ModelFreezer._convert_idxs(self, from_index, to_index)
finetuning.Layer(layer_group_idx, module, is_frozen)
finetuning.LayerGroup(layer_group_idx, module, is_frozen)
finetuning._module_is_batch_norm(module)
finetuning.ModelFreezer.get_layer_groups(self)
finetuning.ModelFreezer.get_layers(self)
finetuning.ModelFreezer.get_trainable_parameters(self)
finetuning.ModelFreezer.freeze(self, from_index=0, to_index=-2, set_modules_as_eval=False)
finetuning.ModelFreezer.unfreeze(self, from_index=-1, to_index=0, set_modules_as_training=True)
schedulers.SchedulerBase(optimizer, param_group_field='lr')
schedulers.SchedulerBase.get_updated_values(self, num_updates)
schedulers.SchedulerBase.step_update(self, num_updates)
schedulers.SchedulerBase._update_param_groups(self, values)
schedulers.SchedulerBase.state_dict(self)
schedulers.SchedulerBase.load_state_dict(self, state_dict)
schedulers.StatefulSchedulerBase(optimizer, param_group_field='lr')
schedulers.StatefulSchedulerBase.step(self)
schedulers.StatefulSchedulerBase.state_dict(self)
schedulers.StatefulSchedulerBase.load_state_dict(self, scheduler_state_dict)
schedulers.CosineLrScheduler(optimizer, total_num_epochs, num_update_steps_per_epoch, k_decay=1.0, lr_min=1e-06, min_lr_ratio=None, num_warmup_epochs=0, warmup_starting_lr=1e-06, warmup_starting_lr_ratio=None, num_cooldown_epochs=0)
schedulers.CosineLrScheduler.create_scheduler_fn(total_num_epochs=NUM_EPOCHS, num_update_steps_per_epoch=NUM_UPDATE_STEPS_PER_EPOCH, k_decay=1.0, lr_min=1e-06, min_lr_ratio=None, num_warmup_epochs=0, warmup_starting_lr=1e-06, warmup_starting_lr_ratio=None, num_cooldown_epochs=0)
schedulers.WSDLrScheduler(optimizer, num_epochs=None, num_update_steps_per_epoch=None, total_steps=None, num_warmup_steps=0, decay_phase_ratio=0.1, lr_min=1e-06, warmup_starting_lr=1e-06, use_inverse_sqrt_decay=True, num_checkpoints=1, is_continuation_from_checkpoint=False)
schedulers.WSDLrScheduler.get_checkpoint_steps(self)
schedulers.WSDLrScheduler.get_decay_info(self)
schedulers.WSDLrScheduler.get_phase_info(self, num_updates)
schedulers.WSDLrScheduler.get_current_step(self)
schedulers.WSDLrScheduler.get_current_phase_info(self)
schedulers.WSDLrScheduler.get_updated_values(self, num_updates)
schedulers.WSDLrScheduler._get_checkpoint_info(self, num_updates)
schedulers.WSDLrScheduler.create_scheduler_fn(total_num_epochs=NUM_EPOCHS, num_update_steps_per_epoch=PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH, num_warmup_epochs=None, decay_phase_ratio=0.1, lr_min=1e-06, warmup_starting_lr=1e-06, use_inverse_sqrt_decay=True, num_checkpoints=1, is_continuation_from_checkpoint=False)
schedulers.wsd_scheduler.estimate_checkpoint_steps(total_steps, num_checkpoints=3)
""".strip().splitlines()  # noqa: E501


def describe(value):
    if value is trainer_module.DEFAULT_CALLBACKS:
        return "DEFAULT_CALLBACKS"
    if isinstance(value, enum.Enum):
        return value.name
    return value.__name__ if isinstance(value, type) else repr(value)


def written(parameter):
    prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    name = prefix.get(parameter.kind, "") + parameter.name
    if parameter.default is parameter.empty:
        return name
    return f"{name}={describe(parameter.default)}"


def find(path):
    module, _, rest = path.partition(".")
    found = importlib.import_module(f"pytorch_accelerated.{module}")
    for name in rest.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("line", SIGNATURES, ids=lambda line: line.partition("(")[0])
def test_arguments_keep_their_names_order_and_defaults(line):
    path, _, arguments = line.partition("  #")[0][:-1].partition("(")
    expected = arguments.split(", ") if arguments else []

    parameters = list(inspect.signature(find(path)).parameters.values())

    present = [written(parameter) for parameter in parameters]
    assert present[: len(expected)] == expected
    # What is new has a default, and cannot take the place of an argument by mistake.
    assert all(
        parameter.default is not parameter.empty
        or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        for parameter in parameters[len(expected) :]
    )


EVENTS = re.findall(r"TrainerCallback\.(on_\w+)", "\n".join(SIGNATURES))


@pytest.mark.parametrize("event", EVENTS)
def test_a_callback_may_call_the_event_of_its_base_class(event):
    class Callback(callbacks.TrainerCallback):
        pass

    batch = {"batch": 1, "batch_output": {}} if "step_end" in event else {}
    assert getattr(Callback(), event)(None, **batch, something="new") is None


def test_names_of_the_root():
    assert pytorch_accelerated.Trainer is Trainer
    assert pytorch_accelerated.TrainerPlaceholderValues is TrainerPlaceholderValues
    assert pytorch_accelerated.notebook_launcher is accelerate.notebook_launcher
    assert pytorch_accelerated.accelerate_notebook_launcher
    assert pytorch_accelerated.set_seed is accelerate.utils.set_seed
    assert pytorch_accelerated.logger.name == "pytorch_accelerated"
    assert isinstance(pytorch_accelerated.__version__, str)
    for name in ("trainer", "callbacks", "tracking", "run_config", "utils"):
        module = importlib.import_module(f"pytorch_accelerated.{name}")
        assert getattr(pytorch_accelerated, name) is module


# Besides those whose signatures are above.
NAMES = """
trainer: TrainerPlaceholderValues DEFAULT_CALLBACKS DataLoader
callbacks: StopTrainingError CallbackMethodNotImplementedError
tracking: RunHistory
utils: LIMIT_BATCHES_ENV_VAR
finetuning: BN_MODULES
schedulers.scheduler_base: SchedulerBase StatefulSchedulerBase
schedulers.cosine_scheduler: CosineLrScheduler
schedulers.wsd_scheduler: WSDLrScheduler
""".strip().splitlines()


@pytest.mark.parametrize("line", NAMES)
def test_names_can_be_imported_from_where_they_were(line):
    module, _, names = line.partition(": ")
    found = importlib.import_module(f"pytorch_accelerated.{module}")

    assert [name for name in names.split() if not hasattr(found, name)] == []


def test_batch_norms_are_among_the_modules_of_their_name():
    assert {nn.BatchNorm2d, nn.SyncBatchNorm} < {*finetuning.BN_MODULES}


def test_default_callbacks_are_classes_in_their_order():
    classes = (
        callbacks.MoveModulesToDeviceCallback,
        callbacks.TerminateOnNaNCallback,
        callbacks.PrintProgressCallback,
        callbacks.ProgressBarCallback,
        callbacks.LogMetricsCallback,
    )

    assert classes == trainer_module.DEFAULT_CALLBACKS
    assert callbacks.get_default_callbacks() == classes
    without_bar = callbacks.get_default_callbacks(progress_bar=False)
    assert without_bar == classes[:3] + classes[4:]


def test_placeholders():
    assert TrainerPlaceholderValues.placeholder_set() == {
        "NUM_EPOCHS",
        "NUM_UPDATE_STEPS_PER_EPOCH",
        "PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH",
        "TRAIN_DATALOADER_LEN",
        "EVAL_DATALOADER_LEN",
    }
    assert issubclass(TrainerPlaceholderValues, enum.Enum)


def test_which_classes_are_bases_of_others():
    for derived, base in (
        (callbacks.TrainerCallback, abc.ABC),
        (callbacks.StopTrainingError, Exception),
        (callbacks.CallbackMethodNotImplementedError, Exception),
        (callbacks.ModelEmaCallback, callbacks.SaveBestModelCallback),
        (trainer_module.TrainerWithTimmScheduler, Trainer),
        (schedulers.StatefulSchedulerBase, schedulers.SchedulerBase),
        (schedulers.CosineLrScheduler, schedulers.StatefulSchedulerBase),
        (schedulers.WSDLrScheduler, schedulers.StatefulSchedulerBase),
    ):
        assert issubclass(derived, base), derived
    assert not callbacks.TrainerCallback.__abstractmethods__
    assert utils.LIMIT_BATCHES_ENV_VAR == "PT_ACC_LIMIT_BATCHES"


def test_attributes_of_a_new_trainer(create_trainer):
    trainer = create_trainer()

    names = (
        "create_scheduler_fn scheduler collate_fn train_dataset eval_dataset run_config"
        " _train_dataloader _eval_dataloader _train_dl_kwargs _eval_dl_kwargs "
        "num_updates num_steps num_samples_seen"
    )
    for name in names.split():
        assert getattr(trainer, name) is None, name
    assert trainer._pad_uneven_eval_batches is False
    assert trainer._callbacks == ()
    assert trainer.device == trainer._accelerator.device
    assert isinstance(trainer.run_history, tracking.InMemoryRunHistory)
    assert isinstance(trainer._loss_tracker, tracking.LossTracker)
    assert isinstance(trainer.callback_handler, callbacks.CallbackHandler)


def test_a_trainer_can_be_made_of_stand_ins():
    """Nothing is checked before a run, since scripts pass objects of their own."""
    stand_in = object()

    trainer = Trainer(stand_in, stand_in, stand_in, (), stand_in)

    assert trainer.model is trainer.optimizer is trainer.run_history is stand_in
