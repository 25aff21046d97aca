"""The benchmarks measure what they say, and say what they leave out."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from environment import Environment, read_requirements, reason_of  # noqa: E402
from plan import BASELINE, CONTENDERS, OURS, PEERS, WORKLOADS, Workload  # noqa: E402
from process import answer, create_job  # noqa: E402
from run import parse_arguments  # noqa: E402
from tables import (  # noqa: E402
    create_memory_table,
    create_table,
    summarise,
    write_between_marks,
)

PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
REQUIREMENTS = (BENCHMARKS / "requirements.txt").read_text(encoding="utf-8")


def answers_of(*seconds, **more):
    answer = {"steps": 100, "difference": 0.0, **more}
    return {i: {**answer, "seconds": each} for i, each in enumerate(seconds)}


def results_of(**figures_of_workloads):
    """The results of a run with the loop by hand, ours, and two peers."""
    by_hand = summarise(answers_of(1.0, peak_bytes=2e6), answers_of(1.0))
    return {
        "date": "2026-01-02",
        "torch": "2.13.0",
        "python": "3.11",
        "machine": "2 cores",
        "device": "cpu",
        "minutes": 3.2,
        "rounds": None,
        "contenders": ["by hand", "pytorch-accelerated", "ignite", "composer"],
        "skipped": {"composer": "not installed: it needs another torch"},
        "workloads": {
            workload: {"by hand": by_hand, **figures}
            for workload, figures in figures_of_workloads.items()
        },
    }


def figures_of(ratio, **more):
    return {
        **summarise(answers_of(ratio, peak_bytes=3e6), answers_of(1.0)),
        **more,
    }


# ---------------------------------------------------------------------- the figures


def test_a_figure_is_the_median_of_the_ratios_within_the_rounds():
    by_hand = answers_of(1.0, 2.0, 1.0, 4.0, 1.0)

    figures = summarise(answers_of(2.0, 2.0, 3.0, 2.0, 1.5), by_hand)

    assert figures["ratios"] == [2.0, 1.0, 3.0, 0.5, 1.5]
    assert figures["ratio"] == 1.5
    assert figures["quarters"] == [0.75, 2.5]
    assert figures["seconds"] == 2.0
    assert figures["microseconds_a_step"] == 20_000


def test_a_peer_is_compared_in_the_rounds_it_took_part_in_and_must_not_fail_in_any():
    measured = answers_of(1.0, 2.0, 3.0)
    del measured[1]

    assert summarise(measured, answers_of(2.0, 100.0, 1.0))["ratios"] == [0.5, 3.0]

    failed = {**answers_of(1.0), 1: {"error": "out of memory"}}
    assert summarise(failed, answers_of(1.0, 1.0)) == {"error": "out of memory"}


def test_ours_takes_part_in_all_rounds_and_peers_in_as_many_as_planned():
    plan = Workload("some work", rounds=7, rounds_of_a_peer=3)
    turns = {
        name: [i for i in range(7) if plan.has_turn(name, i)]
        for name in ("fastai", "by hand", "pytorch-accelerated")
    }

    assert [*turns.values()] == [[0, 3, 6], [*range(7)], [*range(7)]]


# ----------------------------------------------------------------------- the tables


def test_the_table_shows_ratios_what_differs_and_why_something_is_not_measured():
    refused = {"error": "writes a checkpoint while the loop waits"}
    results = results_of(
        h={
            "pytorch-accelerated": figures_of(0.9, difference=9e-5),
            "ignite": figures_of(1.25, difference=2e-4),
        },
        h2={"pytorch-accelerated": figures_of(1.0), "ignite": refused},
    )

    table = create_table(results)

    assert table.startswith("2026-01-02, torch 2.13.0, cpu, 2 cores, Python 3.11")
    for line in (
        "|  | (h) | (h2) |",
        "| pytorch-accelerated | **0.90 (0.90 to 0.90)** | **1.00 (1.00 to 1.00)** |",
        "| ignite | 1.25 (1.25 to 1.25) \\* | - |",
        "| composer | - | - |",
        "| *by hand: a process or a step* | 10,000 µs | 10,000 µs |",
        "- ignite (h2): writes a checkpoint while the loop waits",
        "- composer (h), (h2): not installed: it needs another torch",
    ):
        assert line in table.splitlines()
    assert "the largest difference is 2.0e-04" in table


def test_many_workloads_are_split_over_tables_that_fit_the_page():
    figures = {"pytorch-accelerated": figures_of(1.0), "ignite": figures_of(1.0)}
    results = results_of(**dict.fromkeys(list(WORKLOADS)[:8], figures))

    lines = create_table(results).splitlines()

    headers = [line for line in lines if line.startswith("|  |")]
    assert headers == [
        "|  | (a) | (b) | (c) | (c2) | (d) | (e) |",
        "|  | (f) | (g) |",
    ]
    assert sum(line.startswith("| ignite |") for line in lines) == 2


def test_memory_has_a_table_of_its_own():
    figures = {"pytorch-accelerated": figures_of(1.0), "ignite": figures_of(1.0)}
    results = results_of(a=figures, m=figures)

    table = create_memory_table(results).splitlines()

    assert table[0] == "|  | (m) |"
    assert "| pytorch-accelerated | **1.500** |" in table
    assert "| *by hand* | 2.0 MB |" in table
    assert "(m)" not in create_table(results)
    assert "- composer (m): not installed: it needs another torch" in table


def test_only_what_is_between_the_marks_of_a_page_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one: start -->\nold\n<!-- one: end -->\nb\n")

    write_between_marks(page, "one", "new")

    expected = "a\n<!-- one: start -->\nnew\n<!-- one: end -->\nb\n"
    assert page.read_text() == expected
    with pytest.raises(ValueError, match="needs the lines <!-- two: start -->"):
        write_between_marks(page, "two", "new")
    assert page.read_text() == expected


def test_the_page_has_the_marks_and_names_every_workload():
    for name in ("table", "memory", "table on a GPU", "memory on a GPU", "checkpoints"):
        assert f"<!-- {name}: start -->" in PAGE
        assert f"<!-- {name}: end -->" in PAGE
    assert re.findall(r"^\| \((\w+)\) \|", PAGE.split("## Results")[0], re.M) == [
        *(name for name, plan in WORKLOADS.items() if not plan.needs_gpu),
        *(name for name, plan in WORKLOADS.items() if plan.needs_gpu),
    ]


# -------------------------------------------------------------------- the arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--contender", "keras"], ["keras", *CONTENDERS]),
        (["--workload", "z"], ["z", *WORKLOADS]),
        (["--workload", "j"], ["needs a GPU: give --device, or try it"]),
        (["--rounds", "0"], ["--rounds must be at least 1, got 0"]),
    ],
)
def test_what_cannot_be_measured_is_refused_and_unknown_names_with_those_there_are(
    arguments, words, capsys
):
    with pytest.raises(SystemExit):
        parse_arguments(arguments)

    message = capsys.readouterr().err.splitlines()[-1]
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}\b", message), word


def test_what_is_measured_is_what_was_asked_for_beside_the_loop_by_hand_and_ours():
    asked_for = parse_arguments(["--contender", "fastai", "--workload", "d"])
    assert asked_for.contender == [BASELINE, OURS, "fastai"]
    assert asked_for.workload == ["d"]
    assert parse_arguments([]).contender == CONTENDERS
    assert "j" not in parse_arguments([]).workload  # it needs a GPU
    assert "j" in parse_arguments(["--device", "cuda"]).workload
    quick = parse_arguments(["--quick", "--workload", "j"])
    assert (quick.contender, quick.workload) == ([BASELINE, OURS], ["j"])
    peer = parse_arguments(["--quick", "--contender", "ignite"])
    assert peer.contender == [BASELINE, OURS, "ignite"]


def test_only_a_run_of_everything_is_for_the_documentation():
    assert parse_arguments([]).is_whole
    assert parse_arguments(["--device", "cuda"]).is_whole
    for part in ("--quick", "--workload a", "--contender fastai", "--rounds 1"):
        assert not parse_arguments(part.split()).is_whole, part


# ------------------------------------------------------------------ the environment


def test_every_peer_is_pinned_and_lightning_is_not_a_malicious_release():
    requirements = read_requirements(REQUIREMENTS)

    assert set(PEERS.values()) <= set(requirements)
    for package, requirement in requirements.items():
        assert re.fullmatch(rf"{package}==[\d.]+", requirement)
    assert requirements["lightning"] not in ("lightning==2.6.2", "lightning==2.6.3")


def test_the_reason_that_pip_gives_is_the_one_that_helps():
    conflict = (
        "ERROR: Cannot install mosaicml and torch==2.13.0 because of conflicts.\n"
        "The conflict is caused by:\n"
        "    The user requested torch==2.13.0\n"
        "    mosaicml 0.32.1 depends on torch<2.7.1 and >=2.6.0\n"
        "ERROR: ResolutionImpossible: for help visit somewhere"
    )

    reason = "mosaicml 0.32.1 depends on torch<2.7.1 and >=2.6.0"
    assert reason_of(conflict) == reason
    assert reason_of("Collecting x\nERROR: No matching distribution") == (
        "No matching distribution"
    )
    assert reason_of("") == "pip failed"


def test_an_environment_is_whole_or_has_nothing(tmp_path):
    contents = {"base": ["torch==2.13.0"], "installed": ["fastai==2.8.12"]}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()

    assert Environment(tmp_path).read_contents() == {}  # it was never completed

    (tmp_path / "contents.json").write_text(json.dumps(contents))
    assert Environment(tmp_path).read_contents() == contents

    (tmp_path / "unfinished").touch()  # an installation was cut short
    assert Environment(tmp_path).read_contents() == {}


# ---------------------------------------------------------------------- the workloads


def run_quickly(name, workload, folder):
    command = {"do": "run", "workload": workload}
    return answer(command, name, "cpu", folder, "quick")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of inductor
@pytest.mark.parametrize(
    ("workload", "tolerance"),
    [
        *((name, 1e-6) for name in (*"abcdehim", "g2", "h2", "i2")),
        ("j", 1e-3),
        pytest.param("k", 1e-3, marks=pytest.mark.slow),  # compiled
    ],
)
def test_ours_ends_with_the_same_numbers_as_the_loop_by_hand(
    workload, tolerance, tmp_path
):
    by_hand = run_quickly("by hand", workload, tmp_path)
    ours = run_quickly("pytorch-accelerated", workload, tmp_path)

    assert ours["difference"] <= tolerance
    assert ours["steps"] == by_hand["steps"] > 0
    assert min(ours["seconds"], by_hand["seconds"]) > 0


def test_a_result_that_is_off_and_training_that_is_left_out_are_noticed(
    tmp_path, monkeypatch
):
    for workload in ("i2", "a"):
        run_quickly("by hand", workload, tmp_path)
    contenders = sys.modules["process"].CONTENDERS
    by_hand = contenders["by hand"]
    monkeypatch.setitem(contenders, "ignite", lambda job: by_hand(job) + 1)
    monkeypatch.setitem(contenders, "skorch", lambda job: by_hand(job)[1:])
    monkeypatch.setitem(contenders, "fastai", lambda job: None)

    assert run_quickly("ignite", "i2", tmp_path)["difference"] == pytest.approx(1)
    cut_short = run_quickly("skorch", "i2", tmp_path)
    assert "numbers, parameters included" in cut_short["error"]
    assert run_quickly("fastai", "a", tmp_path)["difference"] > 1e-4


def test_a_peer_that_cannot_be_imported_is_no_failure_but_ours_is(
    tmp_path, monkeypatch
):
    def cannot_be_imported(job):
        raise ModuleNotFoundError("No module named 'ignite'")

    contenders = sys.modules["process"].CONTENDERS
    monkeypatch.setitem(contenders, "ignite", cannot_be_imported)
    monkeypatch.setitem(contenders, "pytorch-accelerated", cannot_be_imported)

    assert run_quickly("ignite", "a", tmp_path) == {
        "error": "cannot be imported: No module named 'ignite'",
        "is_failure": False,
    }
    assert run_quickly("pytorch-accelerated", "a", tmp_path)["is_failure"]


def test_jobs_are_the_same_each_time_and_full_ones_are_larger():
    first, second = (create_job("a", "cpu", "quick") for _ in range(2))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert a is not b
        assert a.equal(b)
    assert first.dataset.tensors[0].equal(second.dataset.tensors[0])
    assert create_job("a", "cpu", "full").num_steps > first.num_steps
