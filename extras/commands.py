"""The commands other than `train`: their flags, and where each begins. torch is not imported here,
so that --help and mistyped flags are answered at once."""

import runpy

from config import COMMANDS, add_all_flags, add_flag

EXAMPLES = {
    "look": "--image photo.jpg --question 'What color is the mug?' --box 310,120,402,233",
    "probe": "--dataset mine.jsonl",
    "check": "mine.jsonl",
    "fit": "--model_name_or_path Qwen/Qwen3-VL-4B-Instruct --num_generations 16",
}
MODEL = "model_name_or_path load_in_4bit lora_r lora_alpha adapter max_pixels device"
ANSWER = "instruction max_completion_length token_fraction alignment"
USED = {  # the settings that a command uses; fit uses all but resume
    "look": f"{MODEL} {ANSWER} layers heads".split(),
    "probe": f"dataset skip_bad_examples allow_absolute_paths boxes {MODEL} {ANSWER} seed "
    "eval_examples output_dir".split(),
    "check": ["allow_absolute_paths", "boxes"],
}


def add_arguments(parser, command):
    """Add the arguments of a command to an argparse parser."""
    example = f"example: python sayo_mini.py {command} {EXAMPLES[command]}"
    parser.description = f"{COMMANDS[command]}\n\n{example}"
    if command == "check":
        parser.add_argument("dataset", help="the .jsonl file")
    if command == "look":
        parser.add_argument("--image", required=True, help="an image file")
        parser.add_argument("--question", required=True, help="question about the image")
        box_help = "region in pixels, drawn and scored; can be repeated (--box=-9,... if negative)"
        parser.add_argument("--box", action="append", metavar="x1,y1,x2,y2", help=box_help)
        output_help = "output image; .gif makes an animation (default: look.png)"
        parser.add_argument("--output", default="look.png", help=output_help)
    if command == "fit":
        tokens_help = "tokens of the question, instruction and chat template (default: 128)"
        parser.add_argument("--prompt_tokens", type=int, metavar="X", help=tokens_help)
        add_all_flags(parser, without="resume")
    for name in USED.get(command, []):
        add_flag(parser, name)


def run_command(command, given):
    """Run a command with its flags, a dict. Returns: the exit code. Raises: InputError."""
    if command == "look":
        from extras.look import run_look

        return run_look(given)
    if command == "probe":
        from extras.probe import run_probe

        return run_probe(given)
    if command == "check":
        from extras.check import check_dataset

        return check_dataset(**given)
    from extras.fit import run_fit

    return run_fit(given)


def main():
    """The command `sayo-mini` of an installed package."""
    runpy.run_module("sayo_mini.sayo_mini", run_name="__main__")
