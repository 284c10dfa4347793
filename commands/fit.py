"""`fit`: will a run fit on a card? Predicts the peak memory of its phases from the model's
config.json alone, and finds flags that make it fit on a smaller card."""

from dataclasses import replace

from transformers import AutoConfig

from analysis.predict_memory import image_grid, rehearse
from config import TINY, Config, InputError, is_tiny
from runtime.parser import build_config
from sources.pretrained import SUPPORTED

GB = 2**30
CARDS = (6, 8, 12, 16, 24)  # GB
CONTEXT = 0.75  # GB: the CUDA context, its libraries and their workspaces
FRAGMENTATION = 0.05  # of the peak: memory that PyTorch's allocator reserves but cannot use
PROMPT_TOKENS = 128  # the chat template, the instruction and a long question
PHASES = {
    "loading": "the weights, loaded and quantized one matrix at a time",
    "sampling": "keys and values of all completions",
    "scoring": "the forward passes: rewards, reference",
    "update": "backward pass and optimizer",
    "evaluation": "answers and attention maps of all layers and heads",
}
STEPS = 16  # evenly spaced values of max_pixels to try


def run_fit(given, train_step):
    """Print the memory that a run with these flags needs, and which cards it fits on.

    Args: given, a dict of flags, including `prompt_tokens`; train_step, the function in sayo_mini.
    Returns: the exit code. Raises: InputError.
    """
    given = dict(given)
    text_tokens = given.pop("prompt_tokens", PROMPT_TOKENS)
    if text_tokens < 2:
        raise InputError(f"--prompt_tokens {text_tokens}: must be at least 2")
    name = given.get("model_name_or_path", Config.model_name_or_path)
    cfg = build_config(given, TINY if is_tiny(name) else {})
    plan = Plan(read_config(name), cfg, train_step, text_tokens)
    peaks = plan.peaks()
    print_setting(name, plan)
    for phase, what in PHASES.items():
        if phase in peaks:
            print(f"{phase:>12} {peaks[phase] / GB:6.2f} GB  {what}")
    room = f"the largest + {FRAGMENTATION:.0%} for fragmentation + {CONTEXT} GB for CUDA"
    print(f"{'needed':>12} {plan.needed():6.2f} GB  {room}")
    for card in CARDS:
        print(f"{card:>12} GB card: {verdict(plan, card)}")
    return 0


def print_setting(name, plan):
    cfg, (rows, cols) = plan.cfg, image_grid(plan.config, plan.cfg.max_pixels)
    weights = "in NF4" if cfg.load_in_4bit else "in bf16"
    print(f"{name} {weights}, computed in bf16. Predicted, not measured; a display needs more.")
    print(
        f"{cfg.prompts_per_step} questions per step, {cfg.num_generations} completions of "
        f"{cfg.max_completion_length} tokens; prompts of {rows * cols} image tokens (--max_pixels) "
        f"and {plan.text_tokens} others (--prompt_tokens)"
    )


def read_config(name):
    """The transformers configuration of a hub model or a folder. Raises: InputError."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        advice = "check the name and the network, or use a folder with the model's config.json"
        raise InputError(
            f"{name}: no config.json ({str(error).splitlines()[0]}): {advice}"
        ) from None
    if config.model_type not in SUPPORTED:
        supported = " and ".join(SUPPORTED)
        raise InputError(f"{name} has type {config.model_type}; supported: {supported}")
    return config


class Plan:
    """A run and its predicted peak memory, also with changed flags."""

    def __init__(self, config, cfg, train_step, text_tokens):
        self.config, self.cfg, self.text_tokens = config, cfg, text_tokens
        self.train_step, self.known = train_step, {}

    def peaks(self, **changes):
        """{phase: peak bytes} with these flags changed."""
        key = tuple(changes.items())
        if key not in self.known:
            cfg, same = replace(self.cfg, **changes), {}
            if changes and "max_pixels" not in changes:  # the evaluation does not change
                same = {k: v for k, v in self.peaks().items() if k == "evaluation"}
                cfg = replace(cfg, eval_examples=0)
            found = rehearse(self.config, cfg, self.train_step, self.text_tokens)
            self.known[key] = found | same
        return self.known[key]

    def needed(self, **changes):
        """The GB that a card needs with these flags changed."""
        return with_room(max(self.peaks(**changes).values()))

    def largest(self, flag, values, card):
        """The largest of ascending `values` with which the run fits, or None if none does."""
        if flag != "max_pixels" and with_room(self.peaks().get("evaluation", 0)) > card:
            return None  # only smaller images reduce the memory of the evaluation
        if self.needed(**{flag: values[0]}) > card:
            return None
        low, high = 0, len(values)  # values[low] fits, values[high] does not
        while high - low > 1:
            middle = (low + high) // 2
            if self.needed(**{flag: values[middle]}) <= card:
                low = middle
            else:
                high = middle
        return values[low]


def with_room(peak):
    """The GB that a card needs for `peak` allocated bytes."""
    return peak / GB * (1 + FRAGMENTATION) + CONTEXT


def verdict(plan, card):
    if plan.needed() <= card:
        return "fits"
    smaller = {flag: values for flag, values in remedies(plan).items() if values}
    if plan.needed(**{flag: values[0] for flag, values in smaller.items()}) > card:
        return "does not fit, even with the smallest settings"
    found = {flag: plan.largest(flag, values, card) for flag, values in smaller.items()}
    found = [f"--{flag} {value}" for flag, value in found.items() if value]
    return f"fits with {' or '.join(found)}" if found else "fits only with several lower settings"


def remedies(plan):
    """{flag: smaller values to try, ascending}."""
    cfg, most = plan.cfg, plan.cfg.max_pixels
    batch = min(cfg.completions_per_forward or cfg.num_generations, cfg.num_generations)
    return {
        "completions_per_forward": range(1, batch),
        "num_generations": range(2, cfg.num_generations),
        "max_pixels": [most * i // STEPS for i in range(1, STEPS)],
        "prompts_per_step": range(1, cfg.prompts_per_step),
    }
