"""Where the model looks: on held-out questions before and after training, on one image, and layer by layer, head by
head. Nothing here trains."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import reward as R
from config import flags, refuse, saved, settings
from data import Example, InputError, example_region, reading, upright
from look import answer_sheet, heat_table
from model import Completions
from page import pack_map

PAGE = 70_000  # characters of maps an answer
ASKED = 8  # held-out questions answered side by side
SHOWN = 8  # held-out examples whose maps go into report.html; the first four into look.png


@dataclass
class Gaze:
    """One answer and the attention behind it. Everything on the CPU."""

    completion: Completions  # of one answer
    attention: torch.Tensor  # (C, N), aligned, mean over the layers and heads chosen
    entropy: torch.Tensor  # (C,)
    selected: torch.Tensor  # (C,) bool, the tokens whose attention counts

    @property
    def map(self):
        """Mean attention of the selected tokens, (N,)."""
        return self.attention[self.selected].mean(0)


@torch.no_grad()
def gaze(vlm, prompt, cfg, completion=None, selected=None):
    """The greedy answer, or the given one, and where the model looks while it writes it."""
    completion = completion or vlm.sample(prompt, 1, cfg.max_completion_length, temperature=0)
    scores = vlm.score(prompt, completion)
    if selected is None:
        selected = R.select_tokens(scores.entropy, completion.mask, cfg.token_fraction)[0]
    attention = R.align_attention(scores.attention, scores.prompt_attention, cfg.alignment)[0]  # (C, N)
    return Gaze(completion, attention.cpu(), scores.entropy[0].cpu(), selected.cpu())


def asked(example, cfg):
    """An example's question as it is put to the model."""
    return f"{example.question} {cfg.instruction}".strip()


def ask(vlm, example, cfg):
    """The Prompt of an example. Raises: InputError naming it."""
    try:
        return vlm.encode(example.image, asked(example, cfg))
    except ValueError as error:  # of the image processor, or that the question is no plain text
        raise InputError(f"example {example.id}: {error}") from None


def evaluate(vlm, examples, cfg, name, before=None):
    """Greedy answers to held-out questions, and where the model looks while it writes them.

    Every map is also held against the *next* question's box: a map that finds any box as well as its own shows a
    habit, not a look at what was asked. The attention on fixed text is that of this model while it is made to write
    the answers of `before`, at the tokens selected then: what training did to attention itself, apart from the words.
    Returns: a list of dicts, one an example.
    """
    results = []
    for i in tqdm(range(len(examples)), desc=f"evaluate {name}"):
        if i % ASKED == 0:
            batch = [examples[j] for j in range(i, min(i + ASKED, len(examples)))]
            prompts = [ask(vlm, example, cfg) for example in batch]
            answers = vlm.sample_groups(prompts, 1, cfg.max_completion_length, temperature=0)
        example, prompt, answer = batch[i % ASKED], prompts[i % ASKED], answers[i % ASKED]
        old = before[i] if before else None
        region = example_region(example, prompt.grid)
        other = example_region(examples[(i + 1) % len(examples)], prompt.grid)
        own = fixed = gaze(vlm, prompt, cfg, answer)
        if old:
            ids, chosen = (torch.tensor(old[key], device=vlm.device) for key in ("ids", "selected"))
            fixed = gaze(vlm, prompt, cfg, Completions(ids[None], torch.ones_like(chosen)[None]), chosen)
        text = own.completion.texts[0]
        results.append({
            "id": example.id, "text": text, "ids": own.completion.ids[0].tolist(), "selected": own.selected.tolist(),
            "correct": R.accuracy_reward(text, example.answer), "length": len(own.entropy),
            "area": region.float().mean().item(), **R.localization(own.map, region),
            "permuted_auroc": R.localization(own.map, other)["auroc"],
            **{f"fixed_{key}": value for key, value in R.localization(fixed.map, region).items()},
            "to_region": rounded(own.attention[:, region].sum(1)), "to_image": rounded(own.attention.sum(1)),  # (C,)
            "grid": prompt.grid, "map": own.map.tolist() if i < 4 else None,
            "page": for_page(vlm, prompt, own, cfg) if i < SHOWN else None,
        })  # fmt: skip
    return results


def rounded(values):
    return [round(v, 4) for v in values.tolist()]


def for_page(vlm, prompt, own, cfg):
    """What report.html shows of an answer: its words, and the map of every word on at most 12 x 12 cells, in up to six
    layers, evenly spread and the last among them; in fewer if the answer is long, to keep the page under 2 MB."""
    maps = vlm.maps(prompt, own.completion).mean(1)[:, None]  # (L, 1, 1 + C, N): mean over all heads
    aligned = [R.align_attention(layer[:, 1:], layer[0, 0], cfg.alignment)[0] for layer in maps]  # L of (C, N)
    grid = tuple(min(12, n) for n in prompt.grid)
    count = max(1, min(6, len(maps), PAGE // (grid[0] * grid[1] * len(own.entropy))))
    layers = torch.linspace(len(maps) - 1, 0, count).round().long().flip(0).tolist()
    pooled = [torch.nn.functional.adaptive_avg_pool2d(aligned[i].view(-1, *prompt.grid), grid) for i in layers]
    return {
        "words": words(vlm, own.completion), "entropy": rounded(own.entropy), "grid": grid, "layers": layers,
        "maps": [[pack_map(cell) for cell in layer.flatten(1).tolist()] for layer in pooled],
    }  # fmt: skip


def words(vlm, completion):
    """The tokens of an answer as text, one by one."""
    return [vlm.tokenizer.decode([token]) for token in completion.ids[0].tolist()]


def probe(vlm, examples, cfg):
    """How well every layer and head finds the region, in greedy answers before any training.

    Returns: auroc, permuted, gap, each (L + 1, H + 1): a row a layer, the last for all together, a column a head, the
    last for all together. `permuted`: the same maps against the next question's box. `gap`: the AUROC on right answers
    less that on wrong ones. A gaze that is the same whether the answer is right or wrong has nothing to teach.
    """
    tables, correct = [], []
    for i in tqdm(range(len(examples)), desc="probe"):
        prompt = ask(vlm, examples[i], cfg)
        own = gaze(vlm, prompt, cfg)
        maps = vlm.maps(prompt, own.completion).cpu()  # (L, H, 1 + C, N)
        maps = torch.cat([maps, maps.mean(0, keepdim=True)])
        maps = torch.cat([maps, maps.mean(1, keepdim=True)], 1)
        regions = [example_region(e, prompt.grid) for e in (examples[i], examples[(i + 1) % len(examples)])]
        rows = maps[:, :, :-1] if cfg.alignment == "predict" else maps[:, :, 1:]  # (L + 1, H + 1, C, N)
        looks = rows[:, :, own.selected].mean(2)  # (L + 1, H + 1, N)
        tables.append([[[R.localization(m, region)["auroc"] for m in layer] for layer in looks] for region in regions])
        correct.append(R.accuracy_reward(own.completion.texts[0], examples[i].answer) == 1)
    tables, correct = torch.tensor(tables), torch.tensor(correct)  # (examples, 2, L + 1, H + 1)
    auroc, permuted = tables.nanmean(0)
    return auroc, permuted, tables[correct, 0].nanmean(0) - tables[~correct, 0].nanmean(0)


def best(auroc):
    """The layer that finds the region best by all its heads together, and up to three heads that do best in it."""
    layer = auroc[:-1, -1].argmax().item()
    return layer, sorted(auroc[layer, :-1].topk(min(3, auroc.shape[1] - 1)).indices.tolist())


def most_telling(gap):
    """(layer, head) of the largest gap between right and wrong answers; None if all answers were alike."""
    heads = gap[:-1, :-1]
    return None if heads.isnan().any() else divmod(heads.argmax().item(), heads.shape[1])


def show_probe(vlm, examples, cfg):
    """`--probe`: which layers and heads find the region, before any training? Asked of training questions, which are
    still new to the model, so that the held-out ones stay unspoilt for the judgement."""
    count = min(len(examples), cfg.eval_examples or 64)
    auroc, permuted, gap = probe(vlm, [examples[i] for i in range(count)], cfg)
    print(f"AUROC of {count} questions, {cfg.alignment} rows; columns: head 0 to {auroc.shape[1] - 2}, all")
    for i, row in enumerate(auroc.tolist()):
        print(f"{'all' if i == len(auroc) - 1 else f'layer {i}':>8} " + " ".join(f"{v:.2f}" for v in row))
    (layer, heads), telling = best(auroc), most_telling(gap)
    print(f"held against another's box: {permuted[layer, -1]:.2f} in layer {layer}, {permuted.nanmean():.2f} overall; "
          f"chance is 0.50\nbest layer {layer} ({auroc[layer, -1]:.2f}), best heads in it {heads}: "
          f"--alignment {cfg.alignment} --layers {layer} --heads {','.join(map(str, heads))}")  # fmt: skip
    if telling:
        print(f"tells right answers from wrong ones best (AUROC {gap[telling]:+.2f}): "
              f"--alignment {cfg.alignment} --layers {telling[0]} --heads {telling[1]}")  # fmt: skip
    folder = Path(cfg.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        heat_table(auroc.tolist(), folder / "probe.png")
    except OSError as error:
        raise InputError(f"cannot write probe.png to --output_dir {folder}: {error.strerror}") from None
    print(f"the table as a picture: {folder / 'probe.png'}")
    return 0


def look(argv, load):
    """Ask one question about one image, and draw where the model looks while it answers. With --adapter, before and
    after training, with that run's settings."""
    parser = argparse.ArgumentParser("sayo_mini.py look", description=look.__doc__, allow_abbrev=False,
                                     epilog="The flags of training that choose a model, layers, heads, tokens and "
                                     "lengths work here too: see sayo_mini.py --help.")  # fmt: skip
    parser.error = refuse
    parser.add_argument("--image", required=True, help="any picture that Pillow reads")
    parser.add_argument("--question", required=True, help="what to ask")
    parser.add_argument("--box", metavar="x1,y1,x2,y2", help="where the answer is, in pixels: drawn, and scored")
    parser.add_argument("--adapter", type=Path, help="the adapter/ of a run: answers before and after are compared")
    parser.add_argument("--output", default="look.png", help="the picture (default: look.png)")
    own, rest = parser.parse_known_args(argv)
    ran = own.adapter and (own.adapter.parent / "config.json").exists()
    cfg = settings(flags(rest), saved(own.adapter.parent) if ran else None)
    try:
        boxes = [(float(a), float(b), float(c), float(d)) for a, b, c, d in [own.box.split(",")]] if own.box else []
    except ValueError:
        raise InputError(f"--box {own.box}: give four numbers, x1,y1,x2,y2") from None
    with reading({"image": own.image}), Image.open(own.image) as stored:
        image, boxes = upright(stored, boxes)
    example = Example(image, own.question, "", boxes, f"--image {own.image}")
    vlm = load(cfg)
    sides = [see(vlm, example, cfg, "before training" if own.adapter else "")]
    if own.adapter:
        vlm.load_adapter(own.adapter)
        sides.append(see(vlm, example, cfg, "after training"))
    try:
        answer_sheet(image, boxes, sides, own.output)
    except (OSError, ValueError) as error:
        raise InputError(f"--output {own.output}: {error}") from None
    print(f"the picture: {own.output}")
    return 0


def see(vlm, example, cfg, when):
    """One answer, printed with its scores. Returns: a side of `look.answer_sheet`."""
    prompt = ask(vlm, example, cfg)
    region = example_region(example, prompt.grid) if example.boxes else None
    found = gaze(vlm, prompt, cfg)
    print(f"{when or 'answer'}: {found.completion.texts[0]}")
    if region is not None:
        r_v = R.attention_reward(found.attention[None], region, found.selected[None]).item()
        scores = R.localization(found.map, region)
        print(f"  r_v {r_v:.3f}, AUROC {scores['auroc']:.3f}, mass / area {scores['mass_over_area']:.2f}")
    return {"caption": when, "map": found.map.tolist(), "grid": prompt.grid, "words": words(vlm, found.completion),
            "entropy": found.entropy.tolist(), "selected": found.selected.tolist()}  # fmt: skip
