"""The code of the page about schedulers runs, and prints what its comments say."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "schedulers.md"


def test_the_code_of_the_page_prints_what_the_page_says(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)

    promised = re.findall(r"print\(.*\)\s+# (.*)", "\n".join(blocks))
    assert capsys.readouterr().out.splitlines() == promised
    assert len(promised) == 3
    assert names["optimizer"].param_groups[0]["lr"] < 0.01
