"""Looking at a model: every layer and head apart, the probe, and `sayo_mini.py look` on a picture of one's own."""

import json
from statistics import fmean

import pytest
import torch
from conftest import TINY, ask, load
from PIL import Image
from safetensors.torch import load_file, save_file

import reward as R
import sayo_mini
from config import TINY as PRESET
from config import Config, numbers
from data import region_mask
from evaluate import best, evaluate, for_page, gaze, most_telling, probe
from page import pack_map
from scenes import Scenes

CFG = Config(**PRESET)
SCENES = Scenes("validation", 4)
FAST = ["--device", "cpu", "--no-load_in_4bit", "--model_name_or_path", str(TINY)]


@pytest.mark.parametrize("layers, heads", [((-1,), None), ((0, 2), (1, 3))])
def test_maps_of_every_layer_and_head_are_what_score_averages(layers, heads):
    vlm = load(layers=layers, heads=heads)
    prompt, completions = ask(vlm, G=2)
    maps = vlm.maps(prompt, completions)  # (L, H, 1 + G*C, N)
    G, C = completions.ids.shape
    assert maps.shape == (4, 4, 1 + G * C, 49)
    with torch.no_grad():
        scores = vlm.score(prompt, completions)
    mean = maps[vlm.layers][:, vlm.heads].mean((0, 1))
    assert torch.allclose(mean[1:].view(G, C, -1), scores.attention, atol=1e-6)
    assert torch.allclose(mean[0], scores.prompt_attention, atol=1e-6)


@pytest.mark.parametrize("alignment", ["query", "predict"])
def test_the_probe_agrees_with_an_evaluation_of_one_layer_and_head(alignment):
    cfg = Config(**PRESET | {"alignment": alignment})
    auroc, permuted, gap = probe(load(), SCENES, cfg)
    assert auroc.shape == permuted.shape == gap.shape == (5, 5)
    # The tokens chosen, and so the text, do not depend on whose attention counts.
    for layer, head in ((0, 1), (3, 2), (3, 4), (4, 4)):
        where = {"layers": (layer,) if layer < 4 else None, "heads": (head,) if head < 4 else None}
        rows = evaluate(load(**where), SCENES, cfg, "one")
        assert auroc[layer, head] == pytest.approx(sum(r["auroc"] for r in rows) / 4, abs=1e-5)
        right, wrong = ([r["auroc"] for r in rows if r["correct"] == c] for c in (1, 0))
        assert right and wrong and gap[layer, head] == pytest.approx(fmean(right) - fmean(wrong), abs=1e-5)
        assert permuted[layer, head] == pytest.approx(sum(r["permuted_auroc"] for r in rows) / 4, abs=1e-5)


def test_best_layer_by_all_heads_and_best_heads_in_it():
    auroc = torch.tensor([[0.9, 0.9, 0.9, 0.9, 0.6], [0.7, 0.5, 0.8, 0.9, 0.7], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert best(auroc) == (1, [0, 2, 3])
    assert best(auroc[:, [0, 4]]) == (1, [0])


def test_the_most_telling_head_has_the_largest_gap():
    gap = torch.tensor([[0.1, 0.3, 0.9], [0.2, 0.4, 0.9], [0.9, 0.9, 0.9]])
    assert most_telling(gap) == (1, 1)
    assert most_telling(gap * torch.nan) is None  # all answers right, or all wrong


def test_probe_prints_the_flags_and_draws_the_table(tmp_path, capsys):
    flags = [*FAST, "--probe", "--eval_examples", "3", "--max_steps", "1", "--output_dir", str(tmp_path)]
    assert sayo_mini.main(flags) == 0
    out = capsys.readouterr().out
    assert "--alignment predict --layers " in out and "held against another's box" in out
    assert Image.open(tmp_path / "probe.png").width > 200
    chosen = out.split("--layers ")[1].split()
    assert sayo_mini.parse([*FAST, "--layers", chosen[0], "--heads", chosen[2]])


def test_probe_that_cannot_write_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    flags = [*FAST, "--probe", "--eval_examples", "1", "--max_steps", "1", "--output_dir", str(tmp_path / "file" / "x")]
    assert sayo_mini.main(flags) == 2
    assert "cannot write probe.png" in capsys.readouterr().err


def test_what_the_page_gets_is_what_was_captured():
    vlm = load()
    prompt = vlm.encode(SCENES[0].image, SCENES[0].question)
    own = gaze(vlm, prompt, CFG)
    page = for_page(vlm, prompt, own, CFG)
    assert page["layers"] == [0, 1, 2, 3] and page["grid"] == (7, 7) and len(page["words"]) == len(own.entropy)
    top, cells = pack_map(own.attention[5].tolist())
    assert page["maps"][3][5] == [pytest.approx(top, abs=2e-5), cells]  # the last layer is the one rewarded


# --- look ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A scene as a file, with the flags to ask about it; and its box."""
    path, example = tmp_path_factory.mktemp("photo") / "photo.png", SCENES[0]
    example.image.save(path)
    flags = ["look", "--image", str(path), "--question", example.question, *FAST]
    return flags, ",".join(map(str, example.boxes[0]))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A run's adapter/, of rank 4, with weights of some size."""
    folder = tmp_path_factory.mktemp("run")
    assert (
        sayo_mini.main(
            [*FAST, "--max_steps", "0", "--eval_examples", "0", "--lora_r", "4", "--output_dir", str(folder)]
        )
        == 0
    )
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({k: torch.full_like(v, 0.05) for k, v in load_file(path).items()}, path)
    return folder / "adapter"


def test_look_answers_scores_and_draws(tmp_path, capsys, photo):
    flags, box = photo
    assert sayo_mini.main([*flags, "--box", box, "--output", str(tmp_path / "out.png")]) == 0
    out = capsys.readouterr().out
    vlm = load(layers=numbers(CFG.layers), heads=numbers(CFG.heads))
    for name, p in vlm.model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    own = gaze(vlm, vlm.encode(SCENES[0].image, SCENES[0].question), CFG)
    region = region_mask(SCENES[0].boxes, (112, 112), (7, 7))
    r_v = R.attention_reward(own.attention[None], region, own.selected[None]).item()
    assert f"answer: {own.completion.texts[0]}" in out
    assert f"r_v {r_v:.3f}, AUROC {R.localization(own.map, region)['auroc']:.3f}" in out
    assert Image.open(tmp_path / "out.png").width == 448 + 2 * 16


def test_look_with_an_adapter_shows_before_and_after(tmp_path, capsys, photo, adapter):
    flags, box = photo
    flags = flags[:5]  # the model and its settings come from the run
    assert sayo_mini.main([*flags, "--adapter", str(adapter), "--box", box, "--output", str(tmp_path / "out.png")]) == 0
    out = capsys.readouterr().out
    before, after = (out.split(f"{when} training: ")[1].split("(", 1)[0] for when in ("before", "after"))
    assert before.split("r_v")[1] != after.split("r_v")[1]
    assert Image.open(tmp_path / "out.png").width == 2 * 448 + 3 * 16


def test_look_without_a_box_scores_nothing(tmp_path, capsys, photo):
    assert sayo_mini.main([*photo[0], "--output", str(tmp_path / "out.png")]) == 0
    assert "r_v" not in capsys.readouterr().out


def mistake(photo, adapter, tmp_path, name):
    """(flags, a word of the message) for a user's mistake."""
    flags, box = photo
    (tmp_path / "text.png").write_text("no picture")
    other, empty = tmp_path / "run" / "adapter", tmp_path / "empty"
    other.mkdir(parents=True), empty.mkdir()
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, other / "adapter_model.safetensors")
    (empty / "adapter_model.safetensors").write_bytes(b"{}")
    return {
        "no image": (["look", "--image", "none.jpg", *flags[3:]], "none.jpg"),
        "a text": (["look", "--image", str(tmp_path / "text.png"), *flags[3:]], "text.png"),
        "no question": (flags[:3], "--question"),
        "a box of words": ([*flags, "--box", "left"], "--box left"),
        "a box of three": ([*flags, "--box", "1,2,3"], "--box 1,2,3"),
        "a box outside": ([*flags, "--box", "500,500,600,600"], "outside"),
        "a flag nobody knows": ([*flags, "--bocks", "1"], "--bocks"),
        "no adapter": ([*flags, "--adapter", str(tmp_path)], "adapter"),
        "another adapter": ([*flags, "--adapter", str(other)], "another model"),
        "a broken adapter": ([*flags, "--adapter", str(empty)], "adapter"),
        "an adapter of another size": ([*flags, "--adapter", str(adapter), "--lora_r", "8"], "--lora_r"),
        "no such folder": ([*flags, "--output", str(tmp_path / "no" / "x.png")], "x.png"),
        "no picture's name": ([*flags, "--output", str(tmp_path / "x")], "--output"),
    }[name]


NAMES = ["no image", "a text", "no question", "a box of words", "a box of three", "a box outside", "no adapter",
         "a flag nobody knows", "another adapter", "a broken adapter", "an adapter of another size", "no such folder",
         "no picture's name"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_ends_in_one_line(tmp_path, capfd, photo, adapter, name):
    flags, word = mistake(photo, adapter, tmp_path, name)
    if "--output" not in flags:
        flags = [*flags, "--output", str(tmp_path / "out.png")]
    capfd.readouterr()
    assert sayo_mini.main(flags) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("sayo_mini.py: ")]
    assert len(error) == 1 and word in error[0]
    assert not (tmp_path / "out.png").exists()


def test_an_interrupted_run_has_its_page_too(tmp_path, monkeypatch):
    """Ctrl-C in the first step: the page shows what there is."""
    import signal

    def step(*args):
        signal.raise_signal(signal.SIGINT)
        return true(*args)

    true = sayo_mini.train_step
    monkeypatch.setattr(sayo_mini, "train_step", step)
    flags = [
        *FAST,
        "--prompts_per_step",
        "1",
        "--eval_examples",
        "2",
        "--max_steps",
        "3",
        "--output_dir",
        str(tmp_path),
    ]
    assert sayo_mini.main(flags) == 130
    text = (tmp_path / "report.html").read_text()
    assert "of 3 steps: not finished" in text
    assert len(json.loads(text.split('id="data">')[1].split("</script>")[0])) == 2
