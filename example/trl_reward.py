"""SAYO's reward in a stock GRPOTrainer of TRL.

Install this repository with `pip install git+` and its address, and start this where example/ is.
"""

import torch
from datasets import Dataset
from sayo_mini.data import region_mask
from sayo_mini.extras.scale_trl import TrlProcessor
from sayo_mini.json_lines import JsonLines
from sayo_mini.model import Completions, load_vlm
from sayo_mini.reward import attention_reward, select_tokens
from trl import GRPOConfig, GRPOTrainer

vlm = load_vlm("Qwen/Qwen3-VL-2B-Instruct", load_in_4bit=False)  # with LoRA
vlm.tokenizer.padding_side = "left"


@torch.no_grad()
def attention(completion_ids, image, question, boxes, **_):
    """r_v of every completion."""
    values = []
    for ids, image, question, boxes in zip(completion_ids, image, question, boxes):
        prompt, ids = vlm.encode(image, question), torch.tensor([ids])
        mask = torch.ones_like(ids).bool()  # (1, C)
        scores = vlm.score(prompt, Completions(ids, mask))
        region = region_mask(boxes, image.size, prompt.grid)
        selected = select_tokens(scores.entropy, mask)
        values += attention_reward(scores.attention, region, selected).tolist()
    vlm.model.train()  # `score` switches to eval mode
    return values


rows = [vars(example) for example in JsonLines("example/example.jsonl")]
rows = [x | {"prompt": [{"role": "user", "content": x["question"]}]} for x in rows]
GRPOTrainer(
    vlm.model,
    attention,
    GRPOConfig("runs/trl", max_completion_length=110),
    Dataset.from_list(rows),
    # without torchvision
    processing_class=TrlProcessor(vlm.image_processor, vlm.tokenizer, vlm.core.config),
).train()
