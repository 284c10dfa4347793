"""Where the model looks: on held-out questions before and after training, on one image, and layer by layer, head by
head. Nothing here trains."""

from dataclasses import dataclass

import torch
from tqdm import tqdm

import reward as R
from data import example_region
from model import Completions
from page import pack_map

PAGE = 70_000  # characters of maps an answer
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


def ask(vlm, example, cfg):
    """The prompt of an example, with the instruction that every question gets."""
    return vlm.encode(example.image, f"{example.question} {cfg.instruction}".strip())


def evaluate(vlm, examples, cfg, name, before=None):
    """Greedy answers to held-out questions, and where the model looks while it writes them.

    Every map is also held against the *next* question's box: a map that finds any box as well as its own shows a
    habit, not a look at what was asked. The attention on fixed text is that of this model while it is made to write
    the answers of `before`, at the tokens selected then: what training did to attention itself, apart from the words.
    Returns: a list of dicts, one an example.
    """
    results = []
    for i in tqdm(range(len(examples)), desc=f"evaluate {name}"):
        example, old = examples[i], before[i] if before else None
        prompt = ask(vlm, example, cfg)
        region = example_region(example, prompt.grid)
        other = example_region(examples[(i + 1) % len(examples)], prompt.grid)
        own = fixed = gaze(vlm, prompt, cfg)
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

    Returns: (auroc, permuted), each (L + 1, H + 1): a row a layer, the last for all together, a column a head, the last
    for all together. `permuted` holds the same maps against the next question's box.
    """
    tables = []
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
    return torch.tensor(tables).nanmean(0).unbind()


def best(auroc):
    """The layer that finds the region best by all its heads together, and up to three heads that do best in it."""
    layer = auroc[:-1, -1].argmax().item()
    return layer, sorted(auroc[layer, :-1].topk(min(3, auroc.shape[1] - 1)).indices.tolist())
