"""Every setting is a flag: ranges, messages, help, presets, and where each value comes from. A
reward of your own needs only a function in a file."""

import ast
import re
import shlex
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, error_line, read_log, run_program, run_python

import config
import model
import sayo_mini
from config import FIELDS, GROUPS, Config, InputError, build_config, parse_command_line
from config import TINY as PRESET
from extras.commands import EXAMPLES, USED


def parse(flags):
    """The flags of a training run, as a dict of values."""
    return parse_command_line(shlex.split(flags))[1]


LIBRARIES = {  # library and version -> what is said; "" if it is accepted
    "torch 2.10.1": "torch 2.10.1 is not supported: pip install 'torch>=2.11'",
    "torch 2.11.0+cu130": "",
    "torch 3.0": "",
    "transformers 5.25.0": "pip install 'transformers>=5.23,<5.25'",
    "peft": "peft is not installed: pip install 'peft>=0.21,<0.22'",
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_outside_their_range_are_refused(monkeypatch, library):
    name, _, found = library.partition(" ")

    def version(asked):
        if asked == name and not found:
            raise config.PackageNotFoundError
        return found if asked == name else config.REQUIRED[asked][0]

    monkeypatch.setattr(config, "version", version)
    wrong = LIBRARIES[library]
    with pytest.raises(InputError, match=re.escape(wrong)) if wrong else nullcontext():
        config.check_versions()


def test_pyproject_has_the_same_ranges():
    text = (ROOT / "pyproject.toml").read_text()
    for name, (lowest, above) in config.REQUIRED.items():
        assert f'"{name}>={lowest}{f",<{above}" if above else ""}"' in text


# --- ranges ---

RANGES = """
lora_r                   1 | 0 -1 1.5 1025
lora_alpha               1 | 0 -32 1000001
max_pixels               1 16777216 | 0 16777217
max_steps                0 1000000 | -1 1.5 1e6 many 1000001
num_generations          2 | 1 1025
prompts_per_step         1 | 0 1025
completions_per_forward  0 | -1 1000001
max_completion_length    1 | 0 16385
temperature              0.01 | 0.009 0 inf nan hot
learning_rate            0 | -1e-9 nan inf
warmup_steps             0 | -1 1000001
weight_decay             0 | -1e-9 inf
max_grad_norm            -1 0 1e9 | nan inf -inf
beta                     0 | -1e-9 inf nan
epsilon                  1e-9 0.999 | 0 1
num_iterations           1 | 0 1000001
seed                     0 9223372036854775807 | -1 9223372036854775808
token_fraction           1e-9 1 | 0 1.001
eval_examples            -1 0 | -2 1000001
save_steps               1 | 0 1000001
device                   auto cuda cpu | gpu
boxes                    pixels 0-1 0-100 0-1000 xywh | 0-10 cxcywh
lr_scheduler_type        cosine constant | linear
alignment                query predict | both
region                   boxes rolled | moved
report_to                none tensorboard wandb trackio | mlflow
layers                   all -1 0,-2 | last 1.5 2,,3 ''
heads                    all 0,3 | first ''
format_lengths           5,5 0,1 | 5 1,2,3 a,b 6,5 -1,5 0,0
reward                   f.py:a c:/f.py:a,b | f.py f.py: :a f.py:a, f.py:a-b
reward_weights           attention=1 a=-1,b=0.5 | attention a=x a=1,a=2 a=0,b=0 a=nan a=1,b=inf ''
""".strip().splitlines()


@pytest.mark.parametrize("line", RANGES, ids=lambda line: line.split()[0])
def test_values_in_range_are_accepted_and_others_refused(line):
    (name, *accepted), refused = (shlex.split(part) for part in line.split("|"))
    for text in accepted:
        assert parse(f"--{name}={text}") == {name: FIELDS[name].type(text)}
    for text in refused:
        with pytest.raises(InputError, match=f"--{name}"):
            parse_command_line([f"--{name}={text}"])


def test_the_table_of_ranges_has_every_flag_with_a_range():
    free = "dataset eval_dataset instruction model_name_or_path adapter output_dir".split()
    ranged = {name for name, setting in FIELDS.items() if setting.type is not bool} - {*free}
    assert {line.split()[0] for line in RANGES} == ranged


MESSAGES = {
    "--beta=-1": "--beta -1.0: must be at least 0",
    "--epsilon=1": "--epsilon 1.0: must be above 0 and below 1",
    "--token_fraction=2": "--token_fraction 2.0: must be above 0 and at most 1",
    "--learning_rate=inf": "--learning_rate inf: must be a finite number",
    "--format_lengths=9,5": "--format_lengths 9,5: expected two integers min,max such as 60,100",
    "--beta=much": "argument --beta: invalid float value: 'much' (see --help)",
    "look --image a.png": "the following arguments are required: --question (see --help)",
    "look --image a.png --question q --beta 1": "look does not use --beta (see --help)",
    "--xyzzy 1": "unrecognized arguments: --xyzzy 1 (see --help)",
    "--dataset \udce9": "'\\udce9' is not UTF-8: rename the file or folder (see --help)",
    "fit --resume": "fit does not use --resume (see --help)",
    "fit --prompt_tokens 0": "--prompt_tokens 0: must be at least 1 and at most 1000000",
}
NEAREST = {  # what was probably meant
    "--max-steps 4": "--max_steps",
    "--learning_rat=1": "--learning_rate",
    "--no-load_in_4bits": "--no-load_in_4bit",
    "prob": "probe",
    "--lr 1e-5": "--learning_rate",
    "--group_size 4": "--num_generations",
    "--num_train_epochs 3": "--max_steps (an epoch: questions / --prompts_per_step)",
    "--per-device-train-batch-size 4": "--prompts_per_step",
    "mine.jsonl": "--dataset mine.jsonl",
}
for flags, nearest in NEAREST.items():
    MESSAGES[flags] = f"unrecognized arguments: {flags}: did you mean {nearest}? (see --help)"


@pytest.mark.parametrize("flags", MESSAGES)
def test_a_refusal_is_one_line_that_says_what_would_work(flags, capsys):
    assert sayo_mini.main(shlex.split(flags)) == 2
    assert capsys.readouterr() == ("", f"sayo_mini.py: {MESSAGES[flags]}\n")


# --- the command line ---


def test_only_passed_flags_are_returned_and_the_command_may_be_left_out():
    assert parse_command_line([]) == parse_command_line(["train"]) == ("train", {})
    flags = "--no-load_in_4bit --keep_best --max_steps 3 --output_dir 'a b'"
    given = {"load_in_4bit": False, "keep_best": True, "max_steps": 3, "output_dir": "a b"}
    assert parse(flags) == parse(f"train {flags}") == given
    given = {"image": "a.png", "question": "q?", "box": ["1,2,3,4", "-1,0,2,2"]}
    found = parse("look --image a.png --question q? --box 1,2,3,4 --box=-1,0,2,2")
    assert found == given | {"output": "look.png"}
    assert parse("check my.jsonl --allow_absolute_paths")["dataset"] == "my.jsonl"
    assert parse("fit --prompt_tokens 9 --seed 3") == {"prompt_tokens": 9, "seed": 3}


def read_help(capsys, *command):
    with pytest.raises(SystemExit, match="0"):
        parse_command_line([*command, "--help"])
    text = capsys.readouterr().out
    return text, re.findall("^  --([a-z_0-9]+)", text, re.MULTILINE)


def test_help_lists_every_flag_once_in_its_group_with_its_default(capsys):
    text, listed = read_help(capsys)
    assert listed == ["version", *FIELDS]
    for first, title in GROUPS.items():
        assert f"\n\n{title}:\n  --{first}" in text
    text = " ".join(text.split())
    assert "completion (default: 110; tiny: 34)" in text and "base model (default: none)" in text
    assert "fit predict the GPU memory of a run" in text


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_of_a_command_lists_what_it_uses_and_its_example_parses(command, capsys):
    text, listed = read_help(capsys, command)
    own = {"look": ["image", "question", "box", "output"], "fit": ["prompt_tokens"]}
    used = own.get(command, []) + USED.get(command, [name for name in FIELDS if name != "resume"])
    assert sorted(listed) == sorted(used)
    example = text.split("python sayo_mini.py ")[1].splitlines()[0]
    assert parse_command_line(shlex.split(example))[0] == command


def test_an_older_python_is_refused_in_one_line():
    ast.parse((ROOT / "sayo_mini.py").read_text(), feature_version=(3, 7))  # it can say so
    code = "import runpy, sys; sys.version_info = 3, 9; runpy.run_path('sayo_mini.py')"
    process = run_python("-c", code)
    assert process.stderr == "sayo_mini.py needs Python 3.10 or newer\n" and process.returncode
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()


PATHS = {  # flags -> what is wrong
    "check": "the following arguments are required: dataset",
    "--dataset none.jsonl": "cannot read the data set none.jsonl: No such file or directory",
    "--eval_dataset none.jsonl": "cannot read the data set none.jsonl: No such file or directory",
    "look --image none.png --question q": "cannot read the image none.png: No such file",
    "look --image README.md --question q --output none/x.png": "the folder none does not exist",
    "--reward none.py:f": "cannot read the reward none.py: No such file or directory",
    "--dataset example": "cannot read the data set example: it is a folder",
    "--adapter none/x": "no adapter in none/x: adapter_config.json: No such file or directory",
    "--model_name_or_path ./none": "cannot load ./none: No such file or directory",
    "--model_name_or_path /a/b/c": "cannot load /a/b/c: No such file or directory",
    "--resume --output_dir none/x": "no run in none/x: cannot read config.json: No such file",
    f"check {'x' * 300}": "File name too long",
    "--output_dir README.md": "--output_dir README.md: it is a file, not a folder",
}


@pytest.mark.parametrize("flags", PATHS)
def test_a_mistake_is_refused_before_torch_loads(flags):
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path('sayo_mini.py', run_name='__main__')"
    process = run_python("-c", code, "sayo_mini.py", *shlex.split(flags))
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("sayo_mini.py: ") and PATHS[flags] in process.stderr


def test_flags_come_before_the_preset_and_the_preset_before_the_defaults(tmp_path):
    assert build_config({"model_name_or_path": Config.model_name_or_path}) == Config()
    assert build_config({"model_name_or_path": "tiny"}) == Config(**PRESET)
    given = {"model_name_or_path": str(TINY), "max_steps": 7, "layers": "2"}
    assert build_config(given) == Config(**PRESET | given)
    assert config.is_tiny(TINY) and config.is_tiny("tiny") and not config.is_tiny(tmp_path / "tiny")
    saved = {"model_name_or_path": "tiny", "max_steps": 9, "seed": 4}
    assert build_config({"seed": 5}, saved) == Config(**saved | {"seed": 5})  # no preset


def test_a_machine_without_a_gpu_trains_the_tiny_model(monkeypatch, capsys):
    assert build_config({"device": "cpu"}) == Config(**PRESET | {"device": "cpu"})
    assert capsys.readouterr().out.startswith("running on the CPU: using the tiny model in tiny/")
    monkeypatch.setattr(model, "choose_device", lambda device: (torch.device("cuda"), None))
    assert build_config({}) == Config()
    assert capsys.readouterr().out == ""


# --- your own rewards ---

EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
CODE, _ = re.findall(r"```python\n(.*?)```", EXTENDING, re.DOTALL)
(COMMAND,) = re.findall(r"sayo_mini.py (--reward .*)", EXTENDING)


def test_the_rewards_of_the_docs(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("import neighbor_of_rewards\n" + CODE)
    (tmp_path / "neighbor_of_rewards.py").touch()  # can be imported
    monkeypatch.chdir(tmp_path)
    run_program("run", f"{COMMAND} --layers 2 --max_steps 1 --eval_examples 0 --output_dir run")
    (row,), samples = read_log(tmp_path / "run"), read_log(tmp_path / "run", "samples.jsonl")
    weights = dict(format=1, length=0.1, iou=1, image_mass=0.5)
    totals = [sum(w * sample[name] for name, w in weights.items()) for sample in samples]
    assert row["reward"] == pytest.approx(sum(totals) / len(totals), abs=1e-5)
    assert row["rewards/iou/mean"] == 0 and 0 < row["rewards/image_mass/mean"] < 1
    functions = config.load_rewards(shlex.split(COMMAND)[1])
    attention = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.1], [9, torch.nan]]])
    x = SimpleNamespace(
        texts=["at [0, 0, 100, 100].", "[10, 5, 0, 0]"],
        lengths=[9, 3],
        format_lengths=(2, 6),
        attention=attention,
        example=SimpleNamespace(boxes=[(0, 0, 10, 10)], image=SimpleNamespace(size=(100, 50))),
        completions=SimpleNamespace(mask=torch.tensor([[True, True], [True, False]])),
    )
    assert functions["length"](x) == [1, 0.5] and functions["iou"](x) == [0.5, 0]
    assert functions["image_mass"](x) == pytest.approx([0.5, 0.6])


MISTAKES = {  # a file -> what a run says about it
    "import nothing": "ModuleNotFoundError: No module named 'nothing'; traceback: ",
    "f = 1": "mine.py has no function f",
    "def f(x):\n    return x.text": "AttributeError: 'RewardInputs' object has no attribute 'text'",
    "def f(x): pass": "f must return 4 finite numbers, one per completion, not None",
    "def f(x): return [1, 2]": "not [1, 2]",
    "def f(x): return [float('nan')] * 4": "not [nan, nan, nan, nan]",
}


@pytest.mark.parametrize("code", MISTAKES)
def test_a_mistake_is_one_line_before_the_run_begins(tmp_path, capfd, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(code)
    run_program("run", "--reward mine.py:f --reward_weights f=1", expect=2)
    assert MISTAKES[code] in error_line(capfd) and not (tmp_path / "run").exists()


def test_a_reward_needs_a_name_of_its_own_and_a_weight():
    def refusal(**given):
        with pytest.raises(InputError) as error:
            build_config({"model_name_or_path": "tiny"} | given)
        return str(error.value)

    unknown = "no reward 'beauty'; known: attention, format, accuracy"
    assert refusal(reward_weights="format=1,beauty=1").endswith(unknown)
    for name in ("format", "text"):
        assert f"has a column {name} already: rename" in refusal(reward=f"mine.py:{name}")
    advice = "f has no weight: pass --reward_weights attention=1,format=1,accuracy=0,f=1"
    assert advice in refusal(reward="mine.py:f")
    # `look` reads the settings of a run, also without its file.
    build_config({}, {"model_name_or_path": "tiny", "reward": "gone.py:f", "reward_weights": "f=1"})
