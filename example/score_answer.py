"""r_v of any answer with plain transformers: does the model look at the box while it writes?

Install this repository with `pip install git+` and its address, and start this where example/ is.
"""

import torch
from PIL import Image
from sayo_mini.data import region_mask
from sayo_mini.reward import attention_reward, select_tokens
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

base, image = "Qwen/Qwen3-VL-2B-Instruct", Image.open("example/one.png").convert("RGB")
question, boxes = "What color is the dot on the pink card?", [[19, 37, 37, 55]]
answer = "top left, a blue dot <answer> blue </answer><|im_end|>"

tokenizer = AutoTokenizer.from_pretrained(base)
processor = AutoImageProcessor.from_pretrained(base, backend="pil")
model = AutoModelForImageTextToText.from_pretrained(base, attn_implementation="eager")
pixels = processor(images=[image], return_tensors="pt")
rows, cols = (pixels["image_grid_thw"][0, 1:] // processor.merge_size).tolist()
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
text = text.replace("<|image_pad|>", "<|image_pad|>" * rows * cols)
prompt, tokens = (torch.tensor([tokenizer.encode(each)]) for each in (text, answer))
ids, P = torch.cat([prompt, tokens], 1), prompt.shape[1]
is_image = ids == model.config.image_token_id
with torch.no_grad():
    out = model(ids, mm_token_type_ids=is_image.int(), output_attentions=True, **pixels)
entropy = torch.distributions.Categorical(logits=out.logits[:, P - 1 : -1].float()).entropy()
selected = select_tokens(entropy, torch.ones_like(entropy).bool())  # (1, C)
attention = out.attentions[-1].mean(1)[:, P:, is_image[0]]  # (1, C, N): last layer, all heads
region = region_mask(boxes, image.size, (rows, cols))
print(f"r_v {attention_reward(attention, region, selected).item():.4f}")
