"""Tests of settings: ranges, the command line and its help, and what a resumed run may change."""

import ast
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from conftest import TINY

import sayo_mini
from analysis.html_report import settings_command
from config import Config, InputError, is_tiny
from runtime import run_folder
from runtime.parser import GROUPS, USUAL, build_config, parse_command_line, parse_config
from runtime.settings import FIELDS, load_saved, stored_settings
from sources import load_datasets

ROOT = Path(__file__).parent.parent
FAST = "--device cpu --no-load_in_4bit --prompts_per_step 2 --num_generations 4".split()
FAST += "--eval_examples 0 --max_steps 2 --model_name_or_path".split() + [str(TINY)]


def parse(flags):
    """The settings of a run in these flags, without defaults."""
    return parse_command_line(shlex.split(flags))[1]


# --- ranges ---

OUT_OF_RANGE = (
    """
--token_fraction 2|--token_fraction 0|--beta -1|--beta inf|--beta nan|--epsilon 5|--epsilon 0
--lora_alpha 0|--lora_alpha -32|--lora_r 0|--format_lengths 100,60|--format_lengths -1,5
--format_lengths 0,0|--learning_rate -1|--learning_rate nan|--learning_rate inf
--warmup_steps -1|--weight_decay -1
--seed 99999999999999999999|--seed -1|--mix 0.8,0.2|--mix 1 --dataset mine.jsonl
--reward_weights attention=0,format=0|--reward_weights attention=nan|--max_grad_norm nan
--reward_weights attention=1,attention=2|--temperature inf|--max_steps 1.5|--max_steps 1e400
""".replace("\n", "|")
    .strip("|")
    .split("|")
)


@pytest.mark.parametrize("flags", OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused_before_anything_is_loaded(flags):
    with pytest.raises(InputError) as error:
        parse(flags)
    message = str(error.value)
    assert flags.split()[0] in message and "\n" not in message


def test_ranges_are_checked_without_importing_torch():
    code = "import sys; from runtime.parser import check_command_line as c\n"
    code += "try: c(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "--beta", "-1"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "False\n")
    assert process.stderr == "sayo_mini.py: --beta -1.0: must be at least 0\n"


def test_the_limits_of_the_ranges_are_accepted():
    flags = "--token_fraction 1 --beta 0 --weight_decay 0 --learning_rate 0 --warmup_steps 0"
    flags += f" --seed {2**63 - 1} --format_lengths 5,5 --max_grad_norm -1 --lora_alpha 1"
    given = parse(f"{flags} --mix 0.8,0.2 --dataset gqa+refocus")
    assert given["seed"] == 2**63 - 1 and given["max_grad_norm"] == -1


@pytest.mark.parametrize("text, number", [("1e6", 10**6), ("2.0", 2), ("-0", 0), ("12", 12)])
def test_whole_numbers_may_be_written_with_an_exponent(text, number):
    assert parse(f"--warmup_steps {text}") == {"warmup_steps": number}


@pytest.mark.parametrize("text", ["1.5", "1e400", "nan", "9007199254740993e1", "many", ""])
def test_a_number_that_is_not_exactly_whole_is_refused(text):
    with pytest.raises(InputError, match="is not a whole number"):
        parse(f"--max_steps '{text}'")


def test_negative_max_grad_norm_means_no_clipping(tmp_path):
    """Earlier versions scaled the gradient by the negative number and trained uphill."""
    adapters = {}
    for limit in ("-1", "0", "1e9", "1e-4"):
        folder = tmp_path / limit
        flags = ["--max_grad_norm", limit, "--learning_rate", "1e-2", "--output_dir", str(folder)]
        assert sayo_mini.main([*FAST, *flags]) == 0
        adapters[limit] = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert adapters["-1"] == adapters["0"] == adapters["1e9"] != adapters["1e-4"]


# --- the command line ---


@pytest.mark.parametrize(
    "flags, nearest",
    [
        ("--max-steps 4", "--max_steps"),
        ("--learning_rat 1", "--learning_rate"),
        ("--max_step=4", "--max_steps"),
        ("--no-load_in_4bits", "--no-load_in_4bit"),
        ("prob", "probe"),
    ],
)
def test_an_unknown_flag_gets_the_nearest_one_suggested(flags, nearest):
    with pytest.raises(InputError, match=rf"did you mean {nearest}\?"):
        parse(flags)


def test_a_flag_unlike_any_other_gets_no_suggestion():
    with pytest.raises(InputError) as error:
        parse("--xyzzy 1")
    assert "--xyzzy" in str(error.value) and "did you mean" not in str(error.value)


@pytest.fixture(scope="module")
def help_text():
    command = [sys.executable, "sayo_mini.py", "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def test_help_begins_with_three_examples_that_parse(help_text):
    about, groups = help_text.split("options:")
    examples = about.split("examples:\n")[1].split("\n\n")[0].splitlines()
    assert len([parse(line.split("sayo_mini.py")[1]) for line in examples]) == 3
    starts = [groups.index(f"\n{title}:\n") for title in GROUPS]
    assert starts == sorted(starts)


def test_help_lists_every_flag_once_in_its_group(help_text):
    titles, listed = [f"{title}:" for title in GROUPS], {}
    for line in help_text.splitlines():
        if line in titles:
            title = line[:-1]
        elif line.startswith("  --"):
            listed.setdefault(line.split()[0].strip(",")[2:], []).append(title)
    assert {name: len(groups) for name, groups in listed.items()} == dict.fromkeys(FIELDS, 1)
    expected = dict(dataset="data", device="model", seed="training", heads="reward")
    expected |= dict(eval_examples="evaluation", resume="run", save_steps="run", beta="training")
    assert {name: listed[name][0] for name in expected} == expected


def test_help_marks_the_flags_that_most_users_change(help_text):
    marked = help_text.split("options:")[1].replace("\n                        ", " ")
    marked = {line.split()[0].strip(",")[2:] for line in marked.splitlines() if " * " in line}
    assert marked == set(USUAL) and marked <= set(FIELDS)


@pytest.mark.slow
def test_python_m_from_the_parent_folder(tmp_path):
    (tmp_path / "sayo").symlink_to(ROOT)
    command = [sys.executable, "-m", "sayo.sayo_mini", "--help"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.startswith("usage: python sayo_mini.py [")
    command = [sys.executable, "-m", "sayo.sayo_mini", *FAST, "--max_steps", "0"]
    command += ["--output_dir", str(tmp_path / "run")]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


# --- resuming: config.json is authoritative ---


def make_run(folder, rows=1, **settings):
    """Create a folder with config.json and `rows` logged steps."""
    folder.mkdir(exist_ok=True)
    saved = stored_settings(build_config({"model_name_or_path": str(TINY), **settings}))
    (folder / "config.json").write_text(json.dumps(saved))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n' * rows)
    return folder


def resumed(folder, flags=""):
    return parse_config(["--resume", "--output_dir", str(folder), *shlex.split(flags)])


REFUSED = [
    ("--layers 2", "3"),
    ("--eval_examples 16", "256"),
    ("--seed 1", "0"),
    ("--num_generations 4", "8"),
    ("--reward_weights attention=1", "attention=1,format=1,accuracy=0"),
    ("--learning_rate 1e-3", "0.0004"),
    ("--warmup_steps 6", "5"),
    ("--dataset other.jsonl", "scenes"),
    ("--no-load_in_4bit", "True"),
    ("--lora_r 4", "16"),
    ("--model_name_or_path Qwen/Qwen3-VL-2B-Instruct", "tiny"),
    ("--max_steps 59", "60"),
]


@pytest.mark.parametrize("flag, old", REFUSED)
def test_a_flag_that_contradicts_the_logged_steps_is_refused(tmp_path, flag, old):
    folder = make_run(tmp_path / "run")
    before = (folder / "config.json").read_bytes()
    with pytest.raises(InputError) as error:
        resumed(folder, flag)
    message, words = str(error.value), flag.replace("--no-load", "--load").split()
    new = words[1] if len(words) > 1 else "False"
    if flag != "--learning_rate 1e-3":
        assert f"{words[0]} {new}:" in message
    assert f"has {old}" in message and str(folder) in message
    assert (folder / "config.json").read_bytes() == before


def test_allowed_changes_are_printed(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    cfg = resumed(folder, "--max_steps 80 --save_steps 5 --completions_per_forward 2 --device cpu")
    assert (cfg.max_steps, cfg.save_steps, cfg.completions_per_forward) == (80, 5, 2)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("max_steps 60 -> 80: ") and "cosine" in line for line in lines)
    assert "save_steps 20 -> 5" in lines
    assert "device auto -> cpu: results will not be bit-identical" in lines
    assert cfg.resume and cfg.output_dir == str(folder) and len(lines) == 4


def test_more_steps_keep_a_constant_learning_rate(tmp_path, capsys):
    resumed(make_run(tmp_path / "run", lr_scheduler_type="constant"), "--max_steps 80")
    assert capsys.readouterr().out == "max_steps 60 -> 80: the learning rate stays constant\n"


def test_the_same_flags_again_change_nothing(tmp_path, capsys):
    folder = make_run(tmp_path / "run", seed=3)
    resumed(folder, f"--seed 3 --layers 3 --model_name_or_path {TINY}")
    assert capsys.readouterr().out == ""


def test_a_moved_run_resumes_in_its_new_folder(tmp_path):
    folder = make_run(tmp_path / "run", output_dir="elsewhere")
    assert resumed(folder).output_dir == str(folder)


def test_settings_may_change_before_the_first_step(tmp_path):
    """A crash before the first step can leave config.json, before.json and empty logs."""
    folder = make_run(tmp_path / "run", rows=0)
    (folder / "before.json").write_text("[]")
    flags = ["--model_name_or_path", str(TINY), "--output_dir", str(folder), "--layers", "2"]
    assert parse_config(flags).layers == "2"
    with pytest.raises(InputError, match="omit --resume"):
        resumed(folder, "--layers 2")
    (folder / "after.json").write_text("[]")  # as left by --max_steps 0
    with pytest.raises(InputError, match="contains a run"):
        parse_config(flags)


def test_a_damaged_config_without_checkpoint_can_be_replaced(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "config.json").write_text("{")
    with pytest.raises(
        InputError, match="delete it and run again with the run's own flags and --resume"
    ):
        resumed(folder)
    (folder / "config.json").unlink()
    assert resumed(folder, f"--seed 3 --model_name_or_path {TINY}").seed == 3


def test_config_json_may_have_integers_for_floats_and_unknown_keys(tmp_path):
    folder = make_run(tmp_path / "run")
    saved = json.loads((folder / "config.json").read_text()) | {"beta": 0, "made_with": {}}
    (folder / "config.json").write_text(json.dumps(saved))
    assert type(load_saved(folder)["beta"]) is float


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_numbers_in_config_json_must_be_in_range(tmp_path, value):
    folder = make_run(tmp_path / "run")
    saved = json.loads((folder / "config.json").read_text()) | {"beta": value}
    (folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match="--beta"):
        resumed(folder)


# --- moved checkouts ---


def test_a_run_of_the_tiny_model_names_it_without_a_path(tmp_path, monkeypatch):
    assert stored_settings(Config(model_name_or_path=str(TINY)))["model_name_or_path"] == "tiny"
    monkeypatch.chdir(tmp_path)
    folder = make_run(tmp_path / "run")
    assert '"tiny"' in (folder / "config.json").read_text()
    assert resumed(folder).model_name_or_path == str(TINY)
    (tmp_path / "tiny").mkdir()  # a different model of that name
    other = stored_settings(Config(model_name_or_path="tiny"))["model_name_or_path"]
    assert other == str(tmp_path / "tiny")


def test_a_tiny_model_in_a_deleted_checkout_is_replaced_by_this_one(tmp_path, capsys):
    """Earlier versions stored the absolute path of the tiny model."""
    folder = make_run(tmp_path / "run")
    saved = json.loads((folder / "config.json").read_text())
    gone = str(tmp_path / "gone" / "tiny")
    (folder / "config.json").write_text(json.dumps(saved | {"model_name_or_path": gone}))
    cfg = resumed(folder)
    assert cfg.model_name_or_path == str(TINY)
    assert capsys.readouterr().out == f"{gone} does not exist: using the model in {TINY}\n"


def test_the_tiny_model_of_a_different_checkout_gets_its_scenes_and_preset(tmp_path):
    other = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(TINY, other, ignore=shutil.ignore_patterns("__pycache__"))
    assert is_tiny(other) and is_tiny(TINY) and not is_tiny("Qwen/Qwen3-VL-2B-Instruct")
    cfg = build_config({"model_name_or_path": str(other)})
    assert cfg.layers == "3" and cfg.model_name_or_path == str(other)
    train_set, _ = load_datasets(cfg)
    assert train_set[0].image.size == (112, 112)


# --- what a run stores ---


def test_the_settings_in_the_report_are_a_command(tmp_path):
    cfg = build_config({"model_name_or_path": str(TINY), "instruction": 'Don\'t guess; say "it".'})
    cfg.layers, cfg.load_in_4bit = "-1,-2", False
    program, script, *argv = shlex.split(settings_command(stored_settings(cfg) | {"made_with": {}}))
    assert (program, script) == ("python", "sayo_mini.py")
    given = parse_command_line(argv)[1] | {"model_name_or_path": str(TINY)}
    assert asdict(build_config(given)) == asdict(cfg)
    assert len(argv) == len(fields(Config)) - 2  # all except output_dir and resume


def test_windows_quotes_with_double_quotes(monkeypatch):
    monkeypatch.setattr(run_folder, "WINDOWS", True)
    command = run_folder.resume_command("a run")
    assert command == 'python sayo_mini.py --resume --output_dir "a run"'


def test_versions_and_commit():
    made_with = run_folder.made_with()
    assert set(made_with) == {"python", *run_folder.LIBRARIES, "commit"}
    assert made_with["torch"] and (made_with["commit"] is None or len(made_with["commit"]) >= 40)


# --- files ---


def opens_text_without_encoding(call):
    """Whether a call (an AST node) opens a text file in the default encoding, which differs on
    Windows."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name == "open":  # not Image.open
        modes = [getattr(argument, "value", "") for argument in call.args[1:2]]
        relevant = isinstance(call.func, ast.Name) and "b" not in str(modes)
    else:
        relevant = name in ("read_text", "write_text") and len(call.args) < 1 + (name[0] == "w")
    return relevant and "encoding" not in [keyword.arg for keyword in call.keywords]


def test_every_text_file_is_opened_as_utf8():
    found = []
    for folder in (".", "sources", "analysis", "commands"):
        for path in (ROOT / folder).glob("*.py"):
            calls = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            calls = [node for node in calls if isinstance(node, ast.Call)]
            lines = [call.lineno for call in calls if opens_text_without_encoding(call)]
            found += [f"{path.name}:{line}" for line in lines]
    assert found == []
