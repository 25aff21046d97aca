"""Of many checkpoints the newest is found, and only old ones of one's own go."""

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


def test_what_dead_writers_left_goes_when_the_lock_is_taken(tmp_path):
    save(tmp_path / "set_aside", 1)
    (tmp_path / "dead.tmp-0123456789abcdef").mkdir()
    (tmp_path / ".trash-0123456789abcdef").mkdir()
    (tmp_path / ".best.pt.tmp-0123456789abcdef").touch()
    (tmp_path / "set_aside").rename(tmp_path / "set_aside.old-0123456789abcdef")
    (tmp_path / "mine.tmp-1234").mkdir()
    lock = ckpt.DirectoryLock(tmp_path)
    lock.acquire()
    assert names_in(tmp_path) == [".lock", "mine.tmp-1234", "set_aside"]
    lock.release()
    ckpt.clean_leftovers(tmp_path / "nothing")
