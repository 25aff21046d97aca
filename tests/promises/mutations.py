"""Breaks a copy of the library on purpose, in many ways, and runs the tests that mind.

A test that cannot fail proves nothing. For each mutation the named test has to fail::

    python tests/promises/mutations.py            # all of them, as a table
    python tests/promises/mutations.py sampler    # those whose description has the word

It exits with 1 if a mutation is not caught, or no longer fits the code.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Imported here once, so that the forked test runs need not: it takes seconds.
import accelerate  # noqa: F401
import hypothesis  # noqa: F401
import pytest
import torch
import torchmetrics  # noqa: F401

TESTS = Path(__file__).parent
SOURCE = TESTS.parent.parent / "src" / "pytorch_accelerated"


@dataclass(frozen=True)
class Mutation:
    """What is broken, how, and the test that has to notice."""

    description: str
    file: str
    original: str
    broken: str
    test: str


LARGE_BATCH = "test_accumulation_equals_the_large_batch.py::"
ONE = "test_processes_equal_one.py::"
MEANS = "test_recorded_losses_are_means.py::"
ONCE = "test_evaluation_counts_each_sample_once.py::"
SCHEDULES = "test_schedules_end_right.py::"
COUNTS = "test_counting.py::"
MODES = "test_modes_and_gradients.py::"
SEEDS = "test_seeds_and_data_order.py::"
CHANGES = "test_changes_of_the_data_are_seen.py::"
AGREEMENT = "test_agreement.py::"
MEMORY = "test_smaller_batches_when_memory_runs_out.py::"
FOLDERS = "../faults/test_shared_folders.py::"
NEST = "test_runs_nest.py::"
RESUMES = "../test_trainer_checkpoints.py::"
STATES = "../callbacks/test_save_training_state.py::"
USES = "test_uses.py::"
WSD = "../schedulers/test_wsd_scheduler.py::"
WSD_CHECKPOINTS = "../callbacks/test_wsd_checkpoints.py::"

MUTATIONS = [
    # -------------------------------------------------------------------------- runs
    Mutation(
        "evaluation amid a run: what it replaced is not put back",
        "run.py",
        ("            trainer._run, trainer.model = self._outer, self._model\n"),
        "            trainer.model = self._model\n",
        NEST + "test_a_run_goes_on_bit_for_bit_after_an_evaluation_from_a_callback",
    ),
    Mutation(
        "evaluation amid a run: it moves random states",
        "run.py",
        "            checkpoint.set_random_states(self._random_states)\n",
        "",
        NEST + "test_so_it_does_whatever_the_evaluation_draws_or_nests",
    ),
    Mutation(
        "evaluation amid a run: modules that override train() are not told",
        "modes.py",
        ("    model.train(modes[0][1])\n    _set(modes)\n"),
        ("    for module, mode in modes:\n        module.training = mode\n"),
        MODES + "test_a_module_that_overrides_train_is_told_after_each_evaluation"
        "_found_61",
    ),
    # ------------------------------------------------------------------ accumulation
    Mutation(
        "window: a batch that is fetched ahead draws its numbers again",
        "run.py",
        ("                self.set_random_states(resumed.ahead_random_states)\n"),
        "",
        RESUMES + "test_a_run_on_a_sampler_and_data_that_draw_numbers_can_be_resumed"
        "_found_70",
    ),
    Mutation(
        "window: a partial one is weighted as if it were full",
        "window.py",
        "past_last = min(past_last, self._num_batches)",
        "past_last = min(past_last, past_last)",
        LARGE_BATCH + "test_accumulation_on_two_processes_equals_the_large_batch",
    ),
    Mutation(
        "window: losses are not multiplied by the number of processes",
        "window.py",
        "return self._planned_items(step) / self.num_processes",
        "return float(self._planned_items(step))",
        LARGE_BATCH + "test_accumulation_on_two_processes_equals_the_large_batch",
    ),
    Mutation(
        "window: items are not added up over the processes",
        "window.py",
        ("total = self._add_up(torch.as_tensor(total, dtype=torch.float64))"),
        "total = total * self.num_processes",
        LARGE_BATCH + "test_accumulation_on_two_processes_equals_the_large_batch",
    ),
    Mutation(
        "window: its items are not forgotten when it closes",
        "window.py",
        ("        factor = self._correction(step)\n        self.state.items = 0\n"),
        "        factor = self._correction(step)\n",
        LARGE_BATCH + "test_accumulation_in_one_process_equals_the_large_batch",
    ),
    Mutation(
        "window: a filler batch counts",
        "run.py",
        (
            "        if share is not None and share.is_filler:\n"
            "            return 0, True\n"
        ),
        "",
        LARGE_BATCH + "test_accumulation_on_two_processes_equals_the_large_batch",
    ),
    Mutation(
        "window: batches are taken to be as large as planned",
        "window.py",
        ("            or (self.num_processes > 1 and not self._is_exact)\n"),
        "",
        LARGE_BATCH + "test_accumulation_on_two_processes_equals_the_large_batch",
    ),
    Mutation(
        "window: the last one of an epoch is not closed",
        "run.py",
        (
            "            return self._is_last(batches) if plan is None"
            " else step + 1 == num_batches\n"
        ),
        ("            return self._is_last(batches) if plan is None else False\n"),
        COUNTS + "test_one_process_counts_what_it_did",
    ),
    Mutation(
        "window: token counts are divided in single precision",
        "window.py",
        "            total = _in_double_precision(self.state.items)\n",
        "            total = self.state.items\n",
        LARGE_BATCH + "test_accumulation_in_one_process_equals_the_large_batch",
    ),
    # ----------------------------------------------------------------------- updates
    Mutation(
        "update: it is counted although it was skipped",
        "trainer.py",
        (
            "            run.backward_is_plain or not"
            " self._accelerator.optimizer_step_was_skipped\n"
        ),
        "            True\n",
        SCHEDULES + "test_a_skipped_update_is_made_up_for_with_the_same_value",
    ),
    Mutation(
        "update: gradients are clipped before they are whole",
        "trainer.py",
        (
            "        run.accumulation.close(step,"
            " parameters_of(self.model, self.optimizer))\n"
            "        config = run.config\n"
            "        if (config.gradient_clip_value,"
            " config.gradient_clip_norm) != (None, None):\n"
            "            self._clip_gradients()\n"
        ),
        (
            "        config = run.config\n"
            "        if (config.gradient_clip_value,"
            " config.gradient_clip_norm) != (None, None):\n"
            "            self._clip_gradients()\n"
            "        run.accumulation.close(step,"
            " parameters_of(self.model, self.optimizer))\n"
        ),
        LARGE_BATCH + "test_accumulation_on_two_processes_equals_the_large_batch",
    ),
    Mutation(
        "update: gradients are not cleared after it",
        "trainer.py",
        "                self.scheduler_step()\n        self.optimizer_zero_grad()\n",
        "                self.scheduler_step()\n",
        ONE + "test_several_processes_train_the_model_that_one_would",
    ),
    Mutation(
        "update: left-over gradients are not cleared before a run",
        "run.py",
        ("        trainer.optimizer.zero_grad()  # type: ignore[union-attr]\n"),
        "",
        MODES + "test_a_gradient_that_was_left_does_not_enter_the_first_update",
    ),
    # ------------------------------------------------------------------------ losses
    Mutation(
        "tracker: every batch counts the same",
        "means.py",
        (
            "            total.add_(loss_batch_value, alpha=batch_size)\n"
            "            self.running_count += batch_size\n"
        ),
        (
            "            total.add_(loss_batch_value)\n"
            "            self.running_count += 1\n"
        ),
        MEANS + "test_recorded_losses_of_one_process_are_means_over_all_items",
    ),
    Mutation(
        "tracker: sums are kept in single precision",
        "means.py",
        (
            'dtype = torch.float32 if device.type == "mps" else'
            " torch.float64\n"
            "    # Not `torch.tensor`"
        ),
        ("dtype = torch.float32\n    # Not `torch.tensor`"),
        MEANS + "test_recorded_losses_of_one_process_are_means_over_all_items",
    ),
    Mutation(
        "tracker: only the first process's losses are recorded",
        "distributed.py",
        "            summed[name] = (so_far[0] + total, so_far[1] + count)\n",
        "            summed.setdefault(name, (total, count))\n",
        MEANS + "test_recorded_losses_of_several_processes_are_means_over_all_items",
    ),
    Mutation(
        "tracker: it is not reset when an epoch starts",
        "trainer.py",
        ("            run.means = Means()\n        events.announce"),
        ("            pass\n        events.announce"),
        MEANS + "test_the_loss_of_an_epoch_is_its_own",
    ),
    # -------------------------------------------------------------------- evaluation
    Mutation(
        "sampler: evaluation batches are not spread evenly",
        "data/order.py",
        "return self.even and self.num_processes > 1",
        "return False",
        ONCE + "test_the_plan_gives_each_sample_to_one_batch_of_one_process",
    ),
    Mutation(
        "sampler: what does not divide evenly is dropped",
        "data/order.py",
        "    first = part * size + min(part, larger)\n"
        "    return first, first + size + (part < larger)\n",
        "    return part * size, part * size + size\n",
        ONCE + "test_two_processes_count_each_sample_once",
    ),
    Mutation(
        "gather: the padding stays in",
        "distributed.py",
        "            padded[process * longest : process * longest + length]\n",
        "            padded[process * longest : process * longest + longest]\n",
        ONCE + "test_gather_joins_what_has_another_length_on_each_process",
    ),
    Mutation(
        "evaluation: the modes of submodules are not put back",
        "modes.py",
        ("    model.train(modes[0][1])\n    _set(modes)\n"),
        "    model.train(modes[0][1])\n",
        MODES + "test_a_frozen_batch_norm_stays_frozen_through_evaluations"
        "_amid_an_epoch",
    ),
    Mutation(
        "evaluation: it takes place in training mode",
        "trainer.py",
        '        """Called when an evaluation starts; sets the evaluation mode."""\n'
        "        self.model.eval()\n",
        '        """Called when an evaluation starts."""\n',
        ONCE + "test_one_process_counts_each_sample_once",
    ),
    Mutation(
        "predict: only what this process predicted is returned",
        "predictions.py",
        "gathered = trainer.gather(trainer.calculate_predictions(batch))",
        "gathered = trainer.calculate_predictions(batch)",
        ONCE + "test_two_processes_count_each_sample_once",
    ),
    # --------------------------------------------------------------------- schedules
    Mutation(
        "scheduler: the first value is trained with twice",
        "schedulers/scheduler_base.py",
        ("scheduler._num_updates < 0:\n        scheduler.step()\n"),
        ("scheduler._num_updates < 0:\n        pass\n"),
        SCHEDULES + "test_each_update_of_one_process_trains_with_its_value",
    ),
    Mutation(
        "scheduler: it is stepped once per batch",
        "trainer.py",
        ("        if is_complete:\n            self._update_weights(step)\n"),
        (
            "        if is_complete:\n"
            "            self._update_weights(step)\n"
            "        elif self.scheduler is not None:\n"
            "            self.scheduler_step()\n"
        ),
        SCHEDULES + "test_each_update_of_one_process_trains_with_its_value",
    ),
    Mutation(
        "scheduler: updates of an epoch are those of all processes",
        "run.py",
        ("    steps = _count_updates_per_epoch(run.train_dataloader, accumulation)\n"),
        (
            "    steps = _count_updates_per_epoch(run.train_dataloader,"
            " accumulation)\n"
            "    steps = steps and steps * num_processes\n"
        ),
        SCHEDULES + "test_each_update_of_two_processes_trains_with_its_value",
    ),
    Mutation(
        "scheduler: ReduceLROnPlateau is stepped at every update",
        "trainer.py",
        "            is_stepped = not isinstance(self.scheduler, ReduceLROnPlateau)\n",
        "            is_stepped = True\n",
        SCHEDULES + "test_reduce_on_plateau_follows_the_evaluation_loss_of_each_epoch",
    ),
    Mutation(
        "scheduler: the cosine ends early by the length of the warm-up",
        "schedulers/cosine_scheduler.py",
        "        end = self.total_iterations - self.num_cooldown_iterations\n",
        "        end = self.total_iterations - self.num_cooldown_iterations\n"
        "        end -= self.warmup_iterations\n",
        SCHEDULES + "test_each_update_of_one_process_trains_with_its_value",
    ),
    Mutation(
        "scheduler: the decay of WSD lags one update",
        "schedulers/wsd_scheduler.py",
        'num_decayed = num_updates - info["pre_decay_step"]',
        'num_decayed = num_updates - info["pre_decay_step"] - 1',
        SCHEDULES + "test_each_update_of_one_process_trains_with_its_value",
    ),
    Mutation(
        "scheduler: timm's are one epoch ahead",
        "trainer.py",
        (
            "            self.scheduler.step(self._run.progress.epochs_done"
            " + 1, metric)\n"
        ),
        (
            "            self.scheduler.step(self._run.progress.epochs_done"
            " + 2, metric)\n"
        ),
        SCHEDULES
        + "test_schedulers_with_the_interface_of_timm_are_told_the_right_time",
    ),
    # ---------------------------------------------------------------------- counting
    Mutation(
        "counting: samples of this process only",
        "data/loaders.py",
        "            self.plan.window_size(step, step),\n",
        "            self.plan.size(step, self.batch_sampler.process_index),\n",
        COUNTS + "test_two_processes_count_what_the_job_did",
    ),
    Mutation(
        "counting: a run stops one update late",
        "run.py",
        ("return limit is not None and self.progress.num_updates >= limit"),
        "return limit is not None and self.progress.num_updates > limit",
        COUNTS + "test_one_process_counts_what_it_did",
    ),
    Mutation(
        "counting: updates go on from the run before",
        "run.py",
        (
            "            run.publish_progress()\n"
            "            trainer.run_history.current_step = 0\n"
        ),
        (
            "            run.progress.num_updates ="
            " outer.training.progress.num_updates\n"
            "            run.publish_progress()\n"
            "            trainer.run_history.current_step = 0\n"
        ),
        COUNTS + "test_limits_are_those_of_each_call",
    ),
    # -------------------------------------------------------------- seeds and order
    Mutation(
        "sampler: the order is the same in every epoch",
        "data/order.py",
        "manual_seed(derive_seed(seed, epoch))",
        "manual_seed(derive_seed(seed, 1))",
        # The order is a documented function, so a loop by hand changes with it.
        SEEDS + "test_the_order_differs_from_epoch_to_epoch",
    ),
    Mutation(
        "sampler: processes draw the same augmentation",
        "data/order.py",
        "seed = _mix(of_epoch, step, self.process_index) >> 1",
        "seed = _mix(of_epoch, step, 0) >> 1",
        SEEDS + "test_two_processes_share_the_samples_and_differ_in_augmentation"
        "_and_dropout",
    ),
    Mutation(
        "seeds: processes draw the same dropout",
        "run.py",
        "data.seed_everything(seed + accelerator.process_index)",
        "data.seed_everything(seed)",
        SEEDS + "test_two_processes_share_the_samples_and_differ_in_augmentation"
        "_and_dropout",
    ),
    Mutation(
        "loader: an epoch has the length of the first",
        "data/loaders.py",
        "length=len(self.dataset)",
        "length=self.plan.length",
        CHANGES + "test_a_dataset_that_grows_or_shrinks_is_trained_whole",
    ),
    Mutation(
        "seeds: without one, everything is seeded",
        "run.py",
        ("    if trainer.seed is None:\n        drawn ="),
        (
            "    if trainer.seed is None:\n"
            "        data.seed_everything(42)\n"
            "        drawn ="
        ),
        SEEDS + "test_without_a_seed_a_run_takes_one_draw_of_torch_and_leaves"
        "_the_others",
    ),
    Mutation(
        "seeds: fetching moves the random state of the model",
        "data/fetching.py",
        "            generator.set_state(state)\n",
        "            pass\n",
        SEEDS + "test_augmentation_and_dropout_do_not_depend_on_the_number_of_workers",
    ),
    Mutation(
        "seeds: python's generator is not watched beyond the first batch",
        "data/fetching.py",
        "        self._note_draws_since(self._before_epoch)\n",
        "",
        SEEDS + "test_a_generator_that_only_later_batches_draw_from_is_seeded"
        "_from_the_next_epoch",
    ),
    # --------------------------------------------------------------------- agreement
    Mutation(
        "agreement: each process acts on its own errors",
        "events.py",
        "        is_alone = trainer._accelerator.num_processes == 1\n",
        "        is_alone = True\n",
        AGREEMENT + "test_a_stop_after_an_update_stops_both_at_that_update",
    ),
    Mutation(
        "agreement: only once an epoch",
        "trainer.py",
        "            if run.agrees_after_updates:\n",
        "            if False:\n",
        AGREEMENT + "test_a_stop_after_an_update_stops_both_at_that_update",
    ),
    Mutation(
        "agreement: after every update, whoever listens",
        "trainer.py",
        "            if run.agrees_after_updates:\n",
        "            if True:\n",
        AGREEMENT + "test_collectives_cost_what_docs_scaling_says",
    ),
    Mutation(
        "agreement: an error keeps other callbacks from meeting",
        "run.py",
        ("trainer.callback_handler.raises_at_once = accelerator.num_processes == 1"),
        "trainer.callback_handler.raises_at_once = True",
        AGREEMENT + "test_callbacks_that_communicate_still_meet_when_another_one_fails",
    ),
    Mutation(
        "agreement: every process decides to stop early for itself",
        "callbacks/best.py",
        "return trainer.agree(decision and trainer._accelerator.is_main_process)",
        "return decision",
        AGREEMENT + "test_early_stopping_follows_the_main_process_where_metrics_differ",
    ),
    Mutation(
        "agreement: an error stays settled for the next run",
        "distributed.py",
        '    set_attribute(error, "_is_on_all_processes", False)\n',
        "    pass\n",
        AGREEMENT + "test_a_stop_after_an_update_stops_both_at_that_update",
    ),
    # ------------------------------------------------------------------------- memory
    Mutation(
        "memory: buffers keep what the failed pass did to them",
        "memory.py",
        "            buffer.copy_(value)\n",
        "            pass\n",
        MEMORY + "test_a_run_that_starts_too_large_equals_one_with_batches_that_fit",
    ),
    Mutation(
        "memory: random states go on from the failed pass",
        "memory.py",
        ("        run.resumed = ProcessState(random_states=start.random_states)\n"),
        "",
        MEMORY + "test_a_run_that_starts_too_large_equals_one_with_batches_that_fit",
    ),
    Mutation(
        "memory: losses of the failed window count",
        "memory.py",
        "        run.means = start.means\n",
        "",
        MEMORY + "test_a_window_in_the_middle_of_an_epoch_is_done_again",
    ),
    Mutation(
        "memory: gradients of the failed window stay",
        "memory.py",
        "        trainer.optimizer_zero_grad()\n",
        "",
        MEMORY + "test_a_window_in_the_middle_of_an_epoch_is_done_again",
    ),
    Mutation(
        "memory: drop_last leaves out what fits the smaller batches",
        "data/order.py",
        "if self.drop_last else None\n",
        "if False else None\n",
        MEMORY + "test_each_update_keeps_its_samples",
    ),
    Mutation(
        "memory: gradients of the processes are added up, not averaged",
        "distributed.py",
        "            parameter.grad /= PartialState().num_processes\n",
        "",
        MEMORY + "test_two_processes_make_their_batches_smaller_together",
    ),
    Mutation(
        "memory: a process leaves the others waiting in the first batch",
        "memory.py",
        "            run.accumulation.choose_without_batch()\n",
        "            pass\n",
        MEMORY + "test_two_processes_make_their_batches_smaller_together",
    ),
    Mutation(
        "memory: buffers of the processes drift apart",
        "memory.py",
        "            distributed.same_on_all_processes(self._model.buffers())\n",
        "",
        MEMORY + "test_nothing_else_changes_for_two_processes_with_enough_memory",
    ),
    # -------------------------------------------------------------------- checkpoints
    Mutation(
        "states: on fewer processes the sums of the last one count",
        "state.py",
        ("                    so_far[key] = so_far.get(key, 0.0) + value\n"),
        "                    so_far[key] = value\n",
        "../test_state.py::test_on_fewer_processes_the_sums_of_all_are_added_up",
    ),
    Mutation(
        "states: a lock on a file that is gone is taken for one",
        "checkpoint/directory.py",
        "if _is_at(descriptor, self.path):\n                    os.ftruncate",
        "if True:\n                    os.ftruncate",
        FOLDERS + "test_a_lock_on_a_file_that_its_last_owner_has_removed_is_none",
    ),
    Mutation(
        "states: the lock is kept after a run that failed",
        "callbacks/checkpointing.py",
        'folder."""\n        self._release_lock()\n',
        'folder."""\n',
        FOLDERS + "test_the_folder_is_free_again_after_a_run_that_failed",
    ),
    Mutation(
        "states: two locks of a process do not know of each other",
        "checkpoint/directory.py",
        "elif self.owner is not None and self.owner == held[0].owner:",
        "elif True:",
        FOLDERS
        + "test_two_locks_of_a_process_share_it_only_where_they_are_to_found_94",
    ),
    Mutation(
        "states: those of other runs count as one's own",
        "callbacks/checkpointing.py",
        "            if each.run_id == trainer._run_id\n            and _NAME",
        "            if _NAME",
        FOLDERS + "test_states_that_others_keep_in_the_folder_are_not_deleted",
    ),
    Mutation(
        "states: a fresh run starts among those of another",
        "callbacks/checkpointing.py",
        "        if self.overwrite or self._is_gone_on_from(trainer):\n",
        "        if True:\n",
        STATES + "test_a_fresh_run_does_not_start_among_the_states_of_another_found_83",
    ),
    Mutation(
        "states: those of another callback count as one's own",
        "checkpoint/directory.py",
        " if saver.identity in each.saved_by]\n",
        "]\n",
        STATES + "test_of_two_callbacks_in_a_folder_one_may_keep_all_found_83",
    ),
    Mutation(
        "states: what another callback keeps is deleted",
        "checkpoint/directory.py",
        "        kept |= {",
        "        kept = {",
        STATES + "test_of_two_callbacks_in_a_folder_one_may_keep_all_found_83",
    ),
    Mutation(
        "states: all processes delete",
        "callbacks/checkpointing.py",
        "        if trainer._accelerator.is_main_process and self.max_checkpoints",
        "        if self.max_checkpoints",
        FOLDERS + "test_only_the_main_process_deletes",
    ),
    # ------------------------------------------------------ data of other makes, shared
    Mutation(
        "sharing: each process draws the order of a sampler itself",
        "data/sharing.py",
        "        return distributed.object_from_main_process(batches)\n",
        "        return [self._checked(batch) for batch in self._batches]\n",
        USES + "test_two_processes",
    ),
    Mutation(
        "sharing: a stream draws from generators that differ between processes",
        "data/sharing.py",
        "            with seeded(derive_seed(*place, step)):\n                samples",
        "            if True:\n                samples",
        USES + "test_two_processes_with_more_kinds_of_data",
    ),
    Mutation(
        "sharing: a process without a sample evaluates that of another",
        "data/sharing.py",
        "                batch = emptied(batch)\n",
        "                pass\n",
        USES + "test_two_processes",
    ),
    Mutation(
        "sharing: what is split by a sampler is shared once more",
        "data/sharing.py",
        "    return is_distributed_sampler or getattr",
        "    return getattr",
        USES + "test_two_processes",
    ),
    # --------------------------------------------------- schedules, continued and read
    Mutation(
        "continuation: one of another length is taken for its own",
        "schedulers/wsd_scheduler.py",
        '            and state_dict.get("total_steps") == self.total_steps\n',
        "",
        WSD + "test_a_continuation_of_another_length_is_another_run",
    ),
    Mutation(
        "initial checkpoint: the learning rate of its optimizer stays",
        "callbacks/wsd.py",
        "scheduler.step_update(max(scheduler.get_current_step(), 0))",
        "pass",
        WSD_CHECKPOINTS
        + "test_a_run_that_starts_after_a_decay_has_the_full_learning_rate",
    ),
    Mutation(
        "initial checkpoint: a continuation goes on where it ended",
        "callbacks/wsd.py",
        "            scheduler.restart()\n",
        "            pass\n",
        WSD_CHECKPOINTS
        + "test_a_run_that_starts_after_a_decay_has_the_full_learning_rate",
    ),
    Mutation(
        "placeholders: the number of epochs begun is calculated with",
        "placeholders.py",
        "return min(num_epochs, Fraction(limit, num_updates)) if limit else num_epochs",
        "return Fraction(math.ceil(limit / num_updates)) if limit else num_epochs",
        SCHEDULES + "test_each_update_of_one_process_trains_with_its_value",
    ),
    Mutation(
        "last_lr: it is read after the schedule has moved on",
        "trainer.py",
        (
            "        if was_applied:\n"
            "            events.tell(\n"
            '                self, "on_train_update_end"'
        ),
        (
            "        if was_applied:\n"
            "            run.note_learning_rates(self.optimizer)\n"
            "            events.tell(\n"
            '                self, "on_train_update_end"'
        ),
        SCHEDULES + "test_callbacks_can_read_what_an_update_was_made_with",
    ),
    Mutation(
        "schedule: a later period begins with the value at the end of the one before",
        "schedulers/wsd_scheduler.py",
        "self.get_phase_info(num_updates + 1)",
        "self.get_phase_info(num_updates)",
        WSD + "test_a_period_begins_with_the_stable_value_found_95",
    ),
]


def main(word: str = "") -> int:
    """Try the mutations whose description has the word; print a table."""
    torch.set_num_threads(1)
    missed = 0
    print("| what is broken | the test that fails | caught |\n|---|---|---|")  # noqa: T201
    for mutation in MUTATIONS:
        if word in mutation.description:
            outcome = try_out(mutation)
            missed += outcome != "yes"
            name = mutation.test.partition("::")[2]
            print(f"| {mutation.description} | `{name}` | {outcome} |", flush=True)  # noqa: T201
    return int(missed > 0)


def try_out(mutation: Mutation) -> str:
    """Break a copy of the library and say whether the test notices."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "pytorch_accelerated"
        shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        file = copy / mutation.file
        text = file.read_text(encoding="utf-8")
        if text.count(mutation.original) != 1:
            return "no: it does not fit the code any more"
        broken = text.replace(mutation.original, mutation.broken)
        if (code := run_test(mutation.test, folder)) != pytest.ExitCode.OK:
            return f"no: the test does not pass unbroken ({code})"
        file.write_text(broken, encoding="utf-8")
        code = run_test(mutation.test, folder)
    return "yes" if code == pytest.ExitCode.TESTS_FAILED else f"no ({code})"


def run_test(test: str, folder: str) -> int:
    """Run a test in a process of its own, with the library in a folder."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.environ["PROMISES_TIMEOUT_SECONDS"] = "20"
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            options = [
                "-q",
                "-x",
                "--assert=plain",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:randomly",
            ]
            options += ["-m", "not slow", "-o", f"pythonpath={folder}"]
            code = pytest.main([*options, f"{TESTS}/{test}"])
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
