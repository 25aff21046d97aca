"""The script whose types are checked also runs."""

import math
import runpy
from pathlib import Path


def test_the_script_runs_with_all_its_overrides_and_schedules_found_107() -> None:
    script = runpy.run_path(str(Path(__file__).with_name("user_script.py")))

    assert math.isfinite(script["main"]())
