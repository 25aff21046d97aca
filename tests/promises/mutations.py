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


# Blocks of what is broken, the file and the test, and the change as in a diff.
MUTATIONS_AS_TEXT = r'''
evaluation amid a run: what it replaced is not put back
run.py  test_runs_nest.py::test_a_run_goes_on_bit_for_bit_after_an_evaluation_from_a_callback
-            trainer._run, trainer.model = self._outer, self._model
+            trainer.model = self._model

evaluation amid a run: it moves random states
run.py  test_runs_nest.py::test_so_it_does_whatever_the_evaluation_draws_or_nests
-            checkpoint.set_random_states(self._random_states)

evaluation amid a run: modules that override train() are not told
modes.py  test_modes_and_gradients.py::test_a_module_that_overrides_train_is_told_after_each_evaluation_found_61
-    model.train(modes[0][1])
-    _set(modes)
+    for module, mode in modes:
+        module.training = mode

window: a batch that is fetched ahead draws its numbers again
run.py  ../test_trainer_checkpoints.py::test_a_run_on_a_sampler_and_data_that_draw_numbers_can_be_resumed_found_70
-                self.set_random_states(pending.ahead_random_states)

window: a partial one is weighted as if it were full
window.py  test_accumulation_equals_the_large_batch.py::test_accumulation_on_two_processes_equals_the_large_batch
-            past_last = min(past_last, self._num_batches)
+            past_last = min(past_last, past_last)

window: losses are not multiplied by the number of processes
window.py  test_accumulation_equals_the_large_batch.py::test_accumulation_on_two_processes_equals_the_large_batch
-        return self._planned_items(step) / self.num_processes
+        return float(self._planned_items(step))

window: items are not added up over the processes
window.py  test_accumulation_equals_the_large_batch.py::test_accumulation_on_two_processes_equals_the_large_batch
-                total = distributed.add_up(torch.as_tensor(total, dtype=torch.float64))
+                total = total * self.num_processes

window: its items are not forgotten when it closes
window.py  test_accumulation_equals_the_large_batch.py::test_accumulation_in_one_process_equals_the_large_batch
-        self.state.items = 0

window: a filler batch counts
run.py  test_accumulation_equals_the_large_batch.py::test_accumulation_on_two_processes_equals_the_large_batch
-        if share is not None and share.is_filler:
-            return 0, True

window: batches are taken to be as large as planned
window.py  test_accumulation_equals_the_large_batch.py::test_accumulation_on_two_processes_equals_the_large_batch
-            or (self.num_processes > 1 and not self._is_exact)

window: the last one of an epoch is not closed
run.py  test_counting.py::test_one_process_counts_what_it_did
-            return self._has_ended(batches) if plan is None else step + 1 == num_batches
+            return self._has_ended(batches) if plan is None else False

window: token counts are divided in single precision
window.py  test_accumulation_equals_the_large_batch.py::test_accumulation_in_one_process_equals_the_large_batch
-            total = _in_double_precision(self.state.items)
+            total = self.state.items

update: it is counted although it was skipped
trainer.py  test_schedules_end_right.py::test_a_skipped_update_is_made_up_for_with_the_same_value
-            run.is_plain_torch or not self._accelerator.optimizer_step_was_skipped
+            True

update: gradients are clipped before they are whole
trainer.py  test_accumulation_equals_the_large_batch.py::test_accumulation_on_two_processes_equals_the_large_batch
-        run.accumulation.close(step, parameters_of(self.model, self.optimizer))
-        config = run.config
-        if (config.gradient_clip_value, config.gradient_clip_norm) != (None, None):
-            self._clip_gradients()
+        config = run.config
+        if (config.gradient_clip_value, config.gradient_clip_norm) != (None, None):
+            self._clip_gradients()
+        run.accumulation.close(step, parameters_of(self.model, self.optimizer))

update: gradients are not cleared after it
trainer.py  test_processes_equal_one.py::test_several_processes_train_the_model_that_one_would
-        self.optimizer_zero_grad()

update: left-over gradients are not cleared before a run
run.py  test_modes_and_gradients.py::test_a_gradient_that_was_left_does_not_enter_the_first_update
-        trainer.optimizer.zero_grad()  # type: ignore[union-attr]

tracker: every batch counts the same
means.py  test_recorded_losses_are_means.py::test_recorded_losses_of_one_process_are_means_over_all_items
-            total.add_(loss_batch_value, alpha=batch_size)
-            self.running_count += batch_size
+            total.add_(loss_batch_value)
+            self.running_count += 1

tracker: sums are kept in single precision
means.py  test_recorded_losses_are_means.py::test_recorded_losses_of_one_process_are_means_over_all_items
-    dtype = torch.float32 if device.type == "mps" else torch.float64
+    dtype = torch.float32

tracker: only the first process's losses are recorded
distributed.py  test_recorded_losses_are_means.py::test_recorded_losses_of_several_processes_are_means_over_all_items
-            summed[name] = (so_far[0] + total, so_far[1] + count)
+            summed.setdefault(name, (total, count))

tracker: it is not reset when an epoch starts
trainer.py  test_recorded_losses_are_means.py::test_the_loss_of_an_epoch_is_its_own
-            run.means = Means(start_metrics(self._train_metrics, self.device))
+            pass

sampler: evaluation batches are not spread evenly
data/order.py  test_evaluation_counts_each_sample_once.py::test_the_plan_gives_each_sample_to_one_batch_of_one_process
-        return self.even and self.num_processes > 1
+        return False

sampler: what does not divide evenly is dropped
data/order.py  test_evaluation_counts_each_sample_once.py::test_two_processes_count_each_sample_once
-    first = part * size + min(part, larger)
-    return first, first + size + (part < larger)
+    return part * size, part * size + size

gather: the padding stays in
distributed.py  test_evaluation_counts_each_sample_once.py::test_gather_joins_what_has_another_length_on_each_process
-            padded[process * longest : process * longest + length]
+            padded[process * longest : process * longest + longest]

evaluation: the modes of submodules are not put back
modes.py  test_modes_and_gradients.py::test_a_frozen_batch_norm_stays_frozen_through_evaluations_amid_an_epoch
-    _set(modes)

evaluation: it takes place in training mode
trainer.py  test_evaluation_counts_each_sample_once.py::test_one_process_counts_each_sample_once
-        """Called when an evaluation starts; sets the evaluation mode."""
-        self.model.eval()
+        """Called when an evaluation starts."""

predict: only what this process predicted is returned
predictions.py  test_evaluation_counts_each_sample_once.py::test_two_processes_count_each_sample_once
-                gathered = trainer.gather(trainer.calculate_predictions(batch))
+                gathered = trainer.calculate_predictions(batch)

scheduler: the first value is trained with twice
schedulers/scheduler_base.py  test_schedules_end_right.py::test_each_update_of_one_process_trains_with_its_value
-        scheduler.step()
+        pass

scheduler: it is stepped once per batch
trainer.py  test_schedules_end_right.py::test_each_update_of_one_process_trains_with_its_value
             self._update_weights(step)
+        elif self.scheduler is not None:
+            self.scheduler_step()

scheduler: updates of an epoch are those of all processes
run.py  test_schedules_end_right.py::test_each_update_of_two_processes_trains_with_its_value
     updates = _count_updates_per_epoch(run.train_dataloader, accumulation)
+    updates = updates and updates * num_processes

scheduler: ReduceLROnPlateau is stepped at every update
trainer.py  test_schedules_end_right.py::test_reduce_on_plateau_follows_the_evaluation_loss_of_each_epoch
-            is_stepped = not isinstance(self.scheduler, ReduceLROnPlateau)
+            is_stepped = True

scheduler: the cosine ends early by the length of the warm-up
schedulers/cosine_scheduler.py  test_schedules_end_right.py::test_each_update_of_one_process_trains_with_its_value
         end = self.total_iterations - self.num_cooldown_iterations
+        end -= self.warmup_iterations

scheduler: the decay of WSD lags one update
schedulers/wsd_scheduler.py  test_schedules_end_right.py::test_each_update_of_one_process_trains_with_its_value
-        num_decayed = num_updates - info["pre_decay_step"]
+        num_decayed = num_updates - info["pre_decay_step"] - 1

scheduler: timm's are one epoch ahead
trainer.py  test_schedules_end_right.py::test_schedulers_with_the_interface_of_timm_are_told_the_right_time
-            self.scheduler.step(self._run.progress.epochs_done + 1, metric)
+            self.scheduler.step(self._run.progress.epochs_done + 2, metric)

counting: samples of this process only
data/loaders.py  test_counting.py::test_two_processes_count_what_the_job_did
-        return Share(self.plan.window_size(step, step), is_filler=num_own == 0)
+        return Share(num_own, is_filler=num_own == 0)

counting: a run stops one update late
run.py  test_counting.py::test_one_process_counts_what_it_did
-        return limit is not None and self.progress.num_updates >= limit
+        return limit is not None and self.progress.num_updates > limit

counting: updates go on from the run before
run.py  test_counting.py::test_limits_are_those_of_each_call
+            run.progress.num_updates = outer.training.progress.num_updates
             run.publish_progress()

sampler: the order is the same in every epoch
data/order.py  test_seeds_and_data_order.py::test_the_order_and_the_augmentation_differ_from_epoch_to_epoch
-    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
+    generator = torch.Generator().manual_seed(derive_seed(seed, 1))

sampler: processes draw the same augmentation
data/order.py  test_seeds_and_data_order.py::test_two_processes_share_the_samples_and_differ_in_augmentation_and_dropout
-            seed = _mix(of_epoch, step, self.process_index) >> 1
+            seed = _mix(of_epoch, step, 0) >> 1

seeds: processes draw the same dropout
run.py  test_seeds_and_data_order.py::test_two_processes_share_the_samples_and_differ_in_augmentation_and_dropout
-    data.seed_everything(seed + accelerator.process_index)
+    data.seed_everything(seed)

loader: an epoch has the length of the first
data/loaders.py  test_changes_of_the_data_are_seen.py::test_a_dataset_that_grows_or_shrinks_is_trained_whole
-            self.batch_sampler.plan = replace(self.plan, length=len(self.dataset))
+            self.batch_sampler.plan = replace(self.plan, length=self.plan.length)

seeds: without one, everything is seeded
run.py  test_seeds_and_data_order.py::test_without_a_seed_a_run_takes_one_draw_of_torch_and_leaves_the_others
+        data.seed_everything(42)
         drawn = int(torch.randint(2**63 - 1, ()))

seeds: fetching moves the random state of the model
data/fetching.py  test_seeds_and_data_order.py::test_augmentation_and_dropout_do_not_depend_on_the_number_of_workers
-            generator.set_state(state)
+            pass

seeds: python's generator is not watched beyond the first batch
data/fetching.py  test_seeds_and_data_order.py::test_a_generator_that_only_later_batches_draw_from_is_seeded_from_the_next_epoch
-        self._note_draws_since(self._before_epoch)

agreement: each process acts on its own errors
events.py  test_agreement.py::test_a_stop_after_an_update_stops_both_at_that_update
-        is_alone = trainer._accelerator.num_processes == 1
+        is_alone = True

agreement: only once an epoch
trainer.py  test_agreement.py::test_a_stop_after_an_update_stops_both_at_that_update
-            if run.agrees_after_updates:
+            if False:

agreement: after every update, whoever listens
trainer.py  test_agreement.py::test_collectives_cost_what_docs_scaling_says
-            if run.agrees_after_updates:
+            if True:

agreement: an error keeps other callbacks from meeting
run.py  test_agreement.py::test_callbacks_that_communicate_still_meet_when_another_one_fails
-        trainer.callback_handler.raises_at_once = accelerator.num_processes == 1
+        trainer.callback_handler.raises_at_once = True

agreement: every process decides to stop early for itself
callbacks/best.py  test_agreement.py::test_early_stopping_follows_the_main_process_where_metrics_differ
-    return trainer.agree(decision and trainer._accelerator.is_main_process)
+    return decision

agreement: an error stays settled for the next run
distributed.py  test_agreement.py::test_a_stop_after_an_update_stops_both_at_that_update
-    set_attribute(error, "_is_on_all_processes", False)
+    pass

memory: buffers keep what the failed pass did to them
memory.py  test_smaller_batches_when_memory_runs_out.py::test_a_run_that_starts_too_large_equals_one_with_batches_that_fit
-            buffer.copy_(value)
+            pass

memory: random states go on from the failed pass
memory.py  test_smaller_batches_when_memory_runs_out.py::test_a_run_that_starts_too_large_equals_one_with_batches_that_fit
-        run.pending = ProcessState(random_states=start.random_states)

memory: losses of the failed window count
memory.py  test_smaller_batches_when_memory_runs_out.py::test_a_window_in_the_middle_of_an_epoch_is_done_again
-        run.means = start.means

memory: gradients of the failed window stay
memory.py  test_smaller_batches_when_memory_runs_out.py::test_a_window_in_the_middle_of_an_epoch_is_done_again
-            trainer.optimizer_zero_grad()
+            pass

memory: drop_last leaves out what fits the smaller batches
data/order.py  test_smaller_batches_when_memory_runs_out.py::test_each_update_keeps_its_samples
-        if not self.drop_last or self.first_batch_size is None:
+        if True:

memory: gradients of the processes are added up, not averaged
distributed.py  test_smaller_batches_when_memory_runs_out.py::test_two_processes_make_their_batches_smaller_together
-            parameter.grad /= PartialState().num_processes

memory: a process leaves the others waiting in the first batch
memory.py  test_smaller_batches_when_memory_runs_out.py::test_two_processes_make_their_batches_smaller_together
-            run.accumulation.choose_without_batch()
+            pass

memory: buffers of the processes drift apart
memory.py  test_smaller_batches_when_memory_runs_out.py::test_nothing_else_changes_for_two_processes_with_enough_memory
-            distributed.same_on_all_processes(self._model.buffers())

states: on fewer processes the sums of the last one count
state.py  ../test_state.py::test_on_fewer_processes_the_sums_of_all_are_added_up
-                    so_far[key] = so_far.get(key, 0.0) + value
+                    so_far[key] = value

states: a lock on a file that is gone is taken for one
checkpoint/directory.py  ../faults/test_shared_folders.py::test_a_lock_on_a_file_that_its_last_owner_has_removed_is_none
-                if _is_at(descriptor, self.path):
+                if True:

states: the lock is kept after a run that failed
callbacks/checkpointing.py  ../faults/test_shared_folders.py::test_the_folder_is_free_again_after_a_run_that_failed
         """Let other runs have the folder, if it ends the training run."""
-        if trainer._run.is_training:
+        if False:

states: two locks of a process do not know of each other
checkpoint/directory.py  ../faults/test_shared_folders.py::test_two_locks_of_a_process_share_it_only_where_they_are_to_found_94
-            if self.owner is None or self.owner != held[0].owner:
+            if False:

states: those of other runs count as one's own
callbacks/checkpointing.py  ../faults/test_shared_folders.py::test_states_that_others_keep_in_the_folder_are_not_deleted
-            if each.run_id == trainer._run_id
-            and _NAME.fullmatch(each.path.name)
+            if _NAME.fullmatch(each.path.name)

states: a fresh run starts among those of another
callbacks/checkpointing.py  ../callbacks/test_save_training_state.py::test_a_fresh_run_does_not_start_among_the_states_of_another_found_83
-        if self.overwrite or self._is_gone_on_from(trainer):
+        if True:

states: those of another callback count as one's own
callbacks/checkpointing.py  ../callbacks/test_save_training_state.py::test_of_two_callbacks_in_a_folder_one_may_keep_all_found_83
-                own = [each for each in states if saver.identity in each.saved_by]
+                own = states

states: what another callback keeps is deleted
callbacks/checkpointing.py  ../callbacks/test_save_training_state.py::test_of_two_callbacks_in_a_folder_one_may_keep_all_found_83
-                kept.update(saver.choose_kept(own))
+                kept = set(saver.choose_kept(own))

states: a state that replaces one of another callback is that one's no longer
saving.py  ../callbacks/test_save_training_state.py::test_of_two_callbacks_in_a_folder_one_may_keep_all_found_83
-            identities.update(replaced.saved_by)
+            pass

states: all processes delete
callbacks/checkpointing.py  ../faults/test_shared_folders.py::test_only_the_main_process_deletes
-        if self.max_checkpoints is not None and trainer._accelerator.is_main_process:
+        if self.max_checkpoints is not None:

sharing: each process draws the order of a sampler itself
data/sharing.py  test_uses.py::test_two_processes
-        return distributed.object_from_main_process(batches)
+        return [self._checked(batch) for batch in self._batches]

sharing: a stream draws from generators that differ between processes
data/sharing.py  test_uses.py::test_two_processes
-            with seeded(derive_seed(*place, step)):
+            if True:

sharing: a process without a sample evaluates that of another
data/sharing.py  test_uses.py::test_two_processes
-                batch = emptied(batch)
+                pass

sharing: what is split by a sampler is shared once more
data/sharing.py  test_uses.py::test_two_processes
-    return is_distributed_sampler or getattr(part, "is_split_by_process", None) is True
+    return getattr(part, "is_split_by_process", None) is True

continuation: one of another length is taken for its own
schedulers/wsd_scheduler.py  ../schedulers/test_wsd_scheduler.py::test_a_continuation_of_another_length_is_another_run
-            and state_dict.get("total_steps") == self.total_steps

initial checkpoint: the learning rate of its optimizer stays
callbacks/wsd.py  ../callbacks/test_wsd_checkpoints.py::test_a_run_that_starts_after_a_decay_has_the_full_learning_rate
-            scheduler.step_update(max(scheduler.get_current_step(), 0))
+            pass

initial checkpoint: a continuation goes on where it ended
callbacks/wsd.py  ../callbacks/test_wsd_checkpoints.py::test_a_run_that_starts_after_a_decay_has_the_full_learning_rate
-            scheduler.restart()
+            pass

placeholders: the number of epochs begun is calculated with
placeholders.py  test_schedules_end_right.py::test_each_update_of_one_process_trains_with_its_value
-        return min(num_epochs, Fraction(limit, num_updates)) if limit else num_epochs
+        return Fraction(math.ceil(limit / num_updates)) if limit else num_epochs

last_lr: it is read after the schedule has moved on
trainer.py  test_schedules_end_right.py::test_callbacks_can_read_what_an_update_was_made_with
+            run.note_learning_rates(self.optimizer)
             events.tell(
                 self, "on_train_update_end", num_updates=run.progress.num_updates

schedule: a later period begins with the value at the end of the one before
schedulers/wsd_scheduler.py  ../schedulers/test_wsd_scheduler.py::test_each_period_decays_before_its_checkpoint
-        info = self.get_phase_info(num_updates + 1)
+        info = self.get_phase_info(num_updates)
'''  # noqa: E501


def read_mutations(text: str) -> list[Mutation]:
    """Make mutations of blocks that are separated by empty lines."""
    mutations = []
    for block in text.strip("\n").split("\n\n"):
        description, place, *change = block.split("\n")
        file, test = place.split()
        original, broken = (
            "\n".join(["", *(line[1:] for line in change if line[0] in signs), ""])
            for signs in (" -", " +")
        )
        mutations.append(Mutation(description, file, original, broken, test))
    return mutations


MUTATIONS = read_mutations(MUTATIONS_AS_TEXT)


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
