"""A differentiable attention loss, for comparison with the attention reward; not used by the
program. As in EASE (arXiv 2605.30912), the attention of the selected tokens is pulled to the box.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import attention
import reward
import sayo_mini
from data import example_region

WEIGHT = 1.0


def box_divergence(attention, region, selected):
    """KL(box || map) of every completion, (G,) nats, with the mean map of the selected tokens
    normalized over the image, and a uniform distribution over the box.

    Args: attention (G, C, N), region (N,) bool, selected (G, C) bool.
    """
    kept = attention.masked_fill(~selected.unsqueeze(-1), 0).sum(1)  # (G, N)
    log_map = (kept / kept.sum(1, keepdim=True)).clamp(min=1e-12).log()
    return -log_map[:, region].mean(1) - region.sum().log()


@contextmanager
def attention_loss(weight=WEIGHT):
    """Train with the policy gradient plus `weight` times the mean divergence of all completions."""
    policy_gradient = sayo_mini.accumulate_gradient

    def accumulate(vlm, groups, cfg, step_tokens, scaler, scores):
        total = 0
        for group, part in zip(groups, scores):
            rows = reward.align_attention(part.attention, part.prompt_attention, cfg.alignment)
            mask = group.completions.mask
            selected = reward.select_tokens(part.entropy, mask, cfg.token_fraction)
            region = example_region(group.example, group.prompt.grid)
            total = total + box_divergence(rows, region, selected).mean() / cfg.prompts_per_step
        (weight * total).backward(retain_graph=True)
        return policy_gradient(vlm, groups, cfg, step_tokens, scaler, scores)

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(sayo_mini, "accumulate_gradient", accumulate))
        # Record the attention with its gradient, which the logged reward does not need.
        enter(patch.object(attention, "image_attention", attention.image_attention.__wrapped__))
        reward_of = reward.attention_reward
        enter(
            patch.object(reward, "attention_reward", lambda a, *rest: reward_of(a.detach(), *rest))
        )
        yield
