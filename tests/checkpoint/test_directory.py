"""Of many checkpoints the newest is found, and only old ones of one's own go."""

import dataclasses
import os
import re

import pytest
from small_checkpoints import (
    names_in,
    save,
)

from pytorch_accelerated import checkpoint as ckpt


def test_checkpoints_are_ordered_by_updates_and_others_are_ignored(tmp_path):
    """Defect 41: after a restart older checkpoints were not counted."""
    for number in (10, 9, 100):
        save(tmp_path / f"step_{number}", number)
    os.utime(tmp_path / "step_100", (0, 0))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "empty.tmp").mkdir()
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "app"}')
    (tmp_path / "latest").symlink_to("step_9")
    before = names_in(tmp_path)
    found = ckpt.list_checkpoints(tmp_path)
    assert [c.num_updates for c in found] == [9, 10, 100]
    assert ckpt.newest(tmp_path).path.name == "step_100"
    ckpt.clean_leftovers(tmp_path)
    assert names_in(tmp_path) == before
    assert ckpt.list_checkpoints(tmp_path / "nothing") == []
    assert ckpt.newest(tmp_path / "nothing") is None


def test_the_newest_whole_one_is_taken_and_broken_ones_are_named(tmp_path):
    for number in (1, 2, 3, 4):
        save(tmp_path / f"step_{number}", number)
    (tmp_path / "step_4" / "manifest.json").unlink()
    (tmp_path / "step_3" / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match="passed over") as caught:
        assert ckpt.newest(tmp_path).num_updates == 2
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 2
    assert re.search(r"step_3.*optimizer.pt is missing", messages[0])
    assert re.search(r"step_4.*no manifest.json", messages[1])


@dataclasses.dataclass
class Keeper:
    """Keeps the newest of its checkpoints."""

    identity: str
    number: int

    def choose_kept(self, checkpoints):
        return checkpoints[-self.number :]


def test_pruning_deletes_only_what_a_saver_saved_and_no_saver_keeps(tmp_path):
    of_both, of_one = {"saved_by": ["a", "b"]}, {"saved_by": ["a"]}
    for number, progress in enumerate([of_both, {}, of_one, of_both, of_one, of_one]):
        save(tmp_path / f"{number}", number, **progress)
    save(tmp_path / "6", 6, saved_by=["of another run's callback"])
    before = names_in(tmp_path)
    ckpt.prune(ckpt.list_checkpoints(tmp_path), [Keeper("c", 1)])
    assert names_in(tmp_path) == before
    ckpt.prune(ckpt.list_checkpoints(tmp_path), [Keeper("a", 1), Keeper("b", 1)])
    assert names_in(tmp_path) == ["1", "3", "5", "6"]


def test_what_dead_writers_left_goes_when_the_lock_is_taken(tmp_path):
    save(tmp_path / "set_aside", 1)
    names = {
        "dead.tmp-0123456789abcdef",
        ".trash-0123456789abcdef",
        # as they were once named
        "dead.tmp-01234567-4194305-1-89abcdef",
        ".trash-01234567-1-1-89abcdef",
    }
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".best.pt.tmp-0123456789abcdef").touch()
    (tmp_path / "set_aside").rename(tmp_path / "set_aside.old-0123456789abcdef")
    (tmp_path / "mine.tmp-1234").mkdir()
    lock = ckpt.DirectoryLock(tmp_path)
    lock.acquire()
    assert lock.is_held
    assert names_in(tmp_path) == [".lock", "mine.tmp-1234", "set_aside"]
    lock.release()
    ckpt.clean_leftovers(tmp_path / "nothing")
