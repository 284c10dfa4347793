"""Checkpoints of both families in the published layout, with small random weights: train, look,
probe and resume without warnings."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hub import SPECIAL, TEMPLATE, VOCABULARY, write_checkpoint
from safetensors.torch import load_file

from model import load_vlm
from scenes import Scenes

pytestmark = pytest.mark.slow

FLAGS = "--device cpu --max_pixels 12544 --prompts_per_step 1 --num_generations 3 --eval_examples 2"
FLAGS = f"{FLAGS} --max_completion_length 6 --save_steps 1 --learning_rate 1e-2".split()
# Runs in its own process, because some warnings are issued only once per process.
SCRIPT = """
import json, sys, sayo_mini
for flags in json.loads(sys.argv[1]):
    assert sayo_mini.main(flags) == 0, flags
"""


@pytest.fixture(scope="module", params=["qwen2_5", "qwen3", "internvl"])
def checkpoint(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """Train two steps with NF4, resume for a third, then run look and probe.
    Returns: (the folder of all outputs, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("run")
    model, output = ["--model_name_or_path", str(checkpoint)], ["--output_dir", str(folder / "run")]
    image = ["--image", str(ROOT / "example" / "one.png"), "--question", "What color is the dot?"]
    adapter = ["--adapter", str(folder / "run" / "adapter"), "--output", str(folder / "look.png")]
    probe = "--device cpu --max_pixels 12544 --eval_examples 2 --max_completion_length 6".split()
    probe += ["--output_dir", str(folder / "probe")]
    commands = [
        [*model, *FLAGS, "--max_steps", "2", *output],
        ["--resume", "--max_steps", "3", *output],
        ["look", *image, *adapter],
        ["probe", *model, *probe],
    ]
    command = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout, process.stderr


def test_the_checkpoint_loads_as_published(checkpoint):
    vlm = load_vlm(checkpoint, load_in_4bit=False, device="cpu", max_pixels=12544)
    assert vlm.core.lm_head.weight is vlm.core.get_input_embeddings().weight  # tied
    assert len(vlm.core.lm_head.weight) == VOCABULARY > len(vlm.tokenizer)
    assert vlm.stop_ids.tolist() == [SPECIAL["<|im_end|>"], SPECIAL["<|endoftext|>"]]
    if "internvl" not in str(checkpoint):  # see `load_tokenizer`
        assert vlm.tokenizer.chat_template == TEMPLATE
    assert len(vlm.placeholders) == 4
    file = load_file(checkpoint / "model.safetensors")
    saved = {name.split("layers.1.")[-1]: weight for name, weight in file.items()}
    loaded = vlm.core.model.language_model.layers[1].mlp.down_proj.base_layer.weight
    assert torch.equal(loaded, saved["mlp.down_proj.weight"].float())  # not randomly initialized
    example = Scenes("validation", 1)[0]
    prompt = vlm.encode(example.image, example.question)
    assert len(prompt.image_positions) == prompt.grid[0] * prompt.grid[1] >= 9


def test_training_look_probe_and_resume_work_and_nothing_warns(run):
    folder, out, err = run
    metrics = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert all(torch.tensor(row["grad_norm"]).isfinite() for row in metrics)
    assert "after step 2" in out and "before training" in out and "after training" in out
    for name in ("run/report.html", "look.png", "probe/probe.png"):
        assert (folder / name).stat().st_size > 1000
    bars = ("evaluate", "train", "probe")  # everything else on stderr is a warning
    lines = [line for part in err.splitlines() for line in part.split("\r") if line.strip()]
    assert [line for line in lines if not line.startswith(bars)] == []
