"""The wall clock may jump: nothing that is saved, chosen or shown depends on it."""

import json

import pytest
import shims


@pytest.mark.fault("the wall clock jumps by a day, and files have other times")
def test_a_jump_of_the_wall_clock_changes_nothing(tmp_path, trials):
    clock_jumps = shims.build("clock_jumps", tmp_path)
    for line in shims.run_with(clock_jumps, "train_while_clocks_jump.py", tmp_path):
        trials.add(json.loads(line))
    assert trials.number == 6
