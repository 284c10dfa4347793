"""bench/fuzz.py: a few mutations of every kind pass, and the judge detects failures."""

import json

import pytest

from bench import fuzz


@pytest.mark.slow
def test_a_few_mutations_of_every_kind_succeed_or_print_one_error_line(tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    fuzz.make_inputs(inputs)
    cases = [(kind, number, 1) for number in range(2) for kind in fuzz.KINDS]
    results = fuzz.run_cases(cases, inputs, tmp_path)
    assert len(results) == 16 and {result["exit"] for result in results} <= {0, 2}
    assert [result for result in results if result["problem"]] == []


@pytest.mark.parametrize(
    "code, out, err, problem",
    [
        (0, "", "", None),
        (0, "", "evaluate: 50%|#####     | 1/2 [00:00<00:01,  1.37it/s]\n", None),
        (2, "", "bar: 50%|##| 1/2\rsayo_mini.py: a mistake\n", None),
        (2, "mine.jsonl:1: a problem\n1 problem\n", "", None),  # `check` prints problems to stdout
        (2, "", "", "0 lines on stderr"),
        (0, "", "a warning\nand more\n", "2 lines on stderr"),
        (1, "", "Traceback (most recent call last):\nValueError\n", "traceback"),
        (-9, "", "", "exit code -9"),
        (-14, "", "", "exit code -14"),  # stopped after a minute
    ],
)
def test_judge_finds_problems_in_exit_code_and_output(tmp_path, code, out, err, problem):
    assert fuzz.judge(tmp_path, "", code, out, err) == problem


def test_judge_checks_all_files_of_the_run_except_the_mutated_one(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({}))
    assert fuzz.judge(tmp_path, "", 0, "", "") is None
    (run / "config.json").write_text("{")
    assert "config.json" in fuzz.judge(tmp_path, "metrics.jsonl: empty", 0, "", "")
    assert fuzz.judge(tmp_path, "config.json: truncated", 0, "", "") is None
    (run / "unfinished-adapter").mkdir()
    assert "unfinished" in fuzz.judge(tmp_path, "config.json: truncated", 0, "", "")
