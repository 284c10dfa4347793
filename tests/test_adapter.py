"""The adapter in other hands: its card, the name of its base model, and the code in the docs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, load
from peft import PeftModel
from PIL import Image
from test_docs import code_blocks
from transformers import AutoModelForImageTextToText

import sayo_mini
from analysis.model_card import data_names, model_card, public_name
from analysis.results_table import results_table
from bench.kill import differences
from config import Config
from runtime.settings import stored_settings

ROOT = Path(__file__).parent.parent
FAST = "--device cpu --prompts_per_step 2 --num_generations 4 --eval_examples 2 --max_steps 2"
# A large step, so that the adapter changes the output.
FAST = f"{FAST} --learning_rate 1e-2 --warmup_steps 0 --model_name_or_path".split() + [str(TINY)]
GUIDE = (ROOT / "docs" / "use_your_adapter.md").read_text()


def run(folder, *flags, expect=0):
    assert sayo_mini.main([*FAST, "--output_dir", str(folder), *flags]) == expect


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


def card_settings(**changes):
    return stored_settings(Config(**changes))


def read_results(folder):
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("before", "after")]


# --- the card ---


def test_card_says_what_was_trained_and_how_well_it_works(whole):
    card = (whole / "adapter" / "README.md").read_text()
    for line in (
        "# LoRA adapter for tiny",
        "| base model | tiny, in 4 bits (NF4) |",
        "| data | scenes |",
        "| reward | 1 x attention + 1 x format |",
        "| steps | 2 |",
        "| questions per step | 2 |",
        "| completions per question | 4 |",
        "| learning rate | 0.01, cosine |",
        "| LoRA | rank 16, alpha 32 |",
        "| seed | 0 |",
        "The license of the base model, tiny, applies.",
    ):
        assert line in card.splitlines()
    assert results_table(*read_results(whole)) in card
    assert "not evaluated" not in card and "another adapter" not in card


def test_card_of_a_hub_model_names_it_for_the_hub():
    card = model_card(card_settings(load_in_4bit=False))
    assert card.startswith("---\nbase_model: Qwen/Qwen3-VL-2B-Instruct\nlibrary_name: peft\n")
    assert "| base model | Qwen/Qwen3-VL-2B-Instruct |" in card
    assert "base_model:" not in model_card(card_settings(model_name_or_path="/models/qwen"))


def test_card_without_evaluation_says_so(tmp_path):
    run(tmp_path / "run", "--eval_examples", "0", "--max_steps", "0")
    assert "This run was not evaluated." in (tmp_path / "run/adapter/README.md").read_text()


@pytest.mark.parametrize("steps, meaning", [(0, "without it"), (5, "with it")])
def test_card_of_a_continued_adapter_says_what_before_means(steps, meaning):
    card = model_card(card_settings(adapter="/somewhere/adapter", max_steps=steps))
    assert f"| started from | another adapter; *before* means {meaning} |" in card
    assert "somewhere" not in card


def test_card_survives_any_instruction():
    """It is quoted in the code of the card."""
    instruction = "a | b \"c\" 'd' {e} \\ ``` \n é"
    (code,) = code_blocks(model_card(card_settings(instruction=instruction)))
    namespace = {}
    exec("\n".join(line for line in code.splitlines() if "instruction" in line), namespace)
    assert namespace["instruction"] == instruction


def test_code_of_the_card_loads_the_adapter(whole, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the base model is called tiny
    (code,) = code_blocks((whole / "adapter" / "README.md").read_text())
    folder = f"adapter = {str(whole / 'adapter')!r}"
    namespace, changed = {}, code.replace('adapter = "."', folder)
    assert changed != code
    exec(changed, namespace)
    lora_b = [p for name, p in namespace["model"].named_parameters() if "lora_B" in name]
    assert lora_b and all(p.abs().max() > 0 for p in lora_b)


# --- nothing of this machine ---


@pytest.mark.parametrize(
    "name, public",
    [
        ("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-2B-Instruct"),
        ("tiny", "tiny"),
        ("/home/me/models/qwen", "qwen"),
        ("../models/qwen/", "qwen"),
        ("models/qwen", "models/qwen"),
        (".", Path.cwd().name),
    ],
)
def test_base_model_is_named_without_folders_of_this_machine(name, public):
    assert public_name(name) == public


def test_data_sets_are_named_without_their_folders(tmp_path):
    file = tmp_path / "a+b.jsonl"
    file.touch()
    assert data_names({"dataset": str(file), "mix": ""}) == "a+b.jsonl"
    mixed = {"dataset": "gqa+/home/me/mine.jsonl", "mix": "0.8,0.2"}
    assert data_names(mixed) == "gqa + mine.jsonl, shares 0.8,0.2"


def test_no_file_of_an_adapter_contains_a_path_of_this_machine(tmp_path):
    """Model, data set, earlier adapter and run are all given by absolute paths."""
    run(tmp_path / "first", "--max_steps", "0", "--eval_examples", "0")
    data = ["--dataset", str(ROOT / "example" / "example.jsonl"), "--eval_examples", "1"]
    run(tmp_path / "run", *data, "--adapter", str(tmp_path / "first" / "adapter"))
    files = list((tmp_path / "run" / "adapter").iterdir())
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in files} == names
    for path in files:
        for private in (ROOT, tmp_path, TINY):
            assert str(private).encode() not in path.read_bytes(), path.name
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "| data | example.jsonl |" in card and "another adapter" in card
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"


# --- kills ---


def test_a_kill_before_the_card_is_complete_is_repaired_by_resume(tmp_path, whole, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    monkeypatch.setattr(sayo_mini, "write_report", interrupt)
    run(folder, expect=130)
    card = folder / "adapter" / "README.md"
    assert "This run was not evaluated." in card.read_text()
    monkeypatch.undo()
    (card.parent / "unfinished-README.md").touch()  # as after a kill while the card is written
    assert sayo_mini.main(["--resume", "--output_dir", str(folder)]) == 0
    assert not differences(whole, folder)
    assert not list(folder.rglob("unfinished-*"))


# --- adapters of earlier runs ---


def test_adapters_of_earlier_runs_still_load(tmp_path, whole, capsys):
    """They name the base model by a path that may not exist any more."""
    folder = tmp_path / "old" / "adapter"
    folder.mkdir(parents=True)
    for path in (whole / "adapter").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/home/me/sayo-mini/tiny"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    run(tmp_path / "run", "--max_steps", "0", "--adapter", str(folder))
    saved = [path / "adapter_model.safetensors" for path in (folder, tmp_path / "run" / "adapter")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    look = ["look", "--image", str(ROOT / "example" / "one.png"), *FAST[:2], *FAST[-2:]]
    look += ["--question", "What color is the dot on the pink card?", "--adapter", str(folder)]
    assert sayo_mini.main([*look, "--output", str(tmp_path / "look.png")]) == 0
    assert "after training: " in capsys.readouterr().out


# --- docs/use_your_adapter.md ---

CHANGES = {  # lines of the guide that name the defaults -> what the test uses instead
    r'base, adapter = "Qwen/Qwen3-VL-2B-Instruct", "runs/sayo/adapter"': "base, adapter = {paths}",
    r'"example/one.png"': "{image!r}",
    r"instruction = \(.*?\n\)": 'instruction = ""',
    r'"runs/sayo/merged"': "{merged!r}",
}


def adapt_guide(**values):
    (code,) = code_blocks(GUIDE)
    for pattern, replacement in CHANGES.items():
        new = replacement.format(**values)
        code, count = re.subn(pattern, lambda _, new=new: new, code, flags=re.DOTALL)
        assert count, pattern
    return code


def test_the_guide_uses_the_defaults():
    (code,) = code_blocks(GUIDE)
    namespace = {}
    exec(re.search(r"instruction = \(.*?\n\)", code, re.DOTALL)[0], namespace)
    assert namespace["instruction"] == Config.instruction
    assert Config().model_name_or_path in code and Config().output_dir + "/adapter" in code
    assert Config().max_pixels == 2**18 and "= 2**18" in code
    assert f"max_new_tokens={Config().max_completion_length}" in code


@pytest.mark.slow
def test_the_guide_answers_as_the_program_does_and_merges(tmp_path, whole):
    """Outside the repository, in a process that imports nothing of it."""
    image, question = ROOT / "example" / "one.png", "What color is the dot on the pink card?"
    merged, paths = tmp_path / "merged", f"{str(TINY)!r}, {str(whole / 'adapter')!r}"
    code = adapt_guide(paths=paths, image=str(image), merged=str(merged))
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    vlm = load(max_pixels=2**18)
    vlm.load_adapter(whole / "adapter")
    prompt = vlm.encode(Image.open(image), question)
    answer = vlm.sample(prompt, 1, 110, temperature=0)
    assert process.stdout.strip() == answer.texts[0].strip()
    ids = torch.tensor([[1, 12, 13, 14]])
    with torch.no_grad():
        base = AutoModelForImageTextToText.from_pretrained(TINY)
        without = base(input_ids=ids).logits
        expected = PeftModel.from_pretrained(base, whole / "adapter")(input_ids=ids).logits
        found = AutoModelForImageTextToText.from_pretrained(merged)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - without).abs().max() > 1e-2
    run(tmp_path / "run", "--max_steps", "0", "--model_name_or_path", str(merged))
