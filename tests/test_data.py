"""data.py: boxes to image tokens, the scenes of a run, epochs and prompts."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data
from config import TINY, Config, InputError
from data import Example, region_mask
from scenes import LARGE_SCENES, Scenes

INF, NAN = math.inf, math.nan


def cells(boxes, image_size, grid):
    """The marked cells as [(row, column), ...]."""
    mask = region_mask(boxes, image_size, grid)
    assert mask.dtype == torch.bool and mask.shape == (grid[0] * grid[1],)
    return [divmod(i, grid[1]) for i in mask.nonzero()[:, 0].tolist()]


@pytest.mark.parametrize(
    "boxes, expected",
    [  # a 100 x 60 image, cells of 25 x 20: 3 rows, 4 columns
        ([(25, 20, 50, 40)], [(1, 1)]),  # half-open: no neighbor
        ([(0, 0, math.nextafter(25, INF), 20)], [(0, 0), (0, 1)]),
        ([(math.nextafter(25, 0), 0, 50, 20)], [(0, 0), (0, 1)]),
        ([(0, 0, 5e-324, 5e-324)], [(0, 0)]),  # the smallest positive float
        ([(-1e300, 20, 1e300, 40)], [(1, 0), (1, 1), (1, 2), (1, 3)]),  # the rest is ignored
        ([(0, 0, 5, 5), (76, 41, 77, 42), (5, 5, 30, 10)], [(0, 0), (0, 1), (2, 3)]),  # a union
    ],
)
def test_the_region_of_boxes(boxes, expected):
    assert cells(boxes, (100, 60), (3, 4)) == expected


def test_the_edges_of_cells_are_exact():
    # As a float, 10 / 3 is a little more than a third of 10, so this box reaches the second cell.
    assert cells([(0, 0, 10 / 3, 1)], (10, 1), (1, 3)) == [(0, 0), (0, 1)]
    assert cells([(0, 0, math.nextafter(10 / 3, 0), 1)], (10, 1), (1, 3)) == [(0, 0)]


NOT_FOUR, EMPTY, OUTSIDE = "is not four finite numbers", "is empty or inverted", "lies outside"


@pytest.mark.parametrize(
    "problem, boxes",
    [
        (NOT_FOUR, [(*[1] * i, v, *[9] * (3 - i)) for v in (NAN, INF, -INF) for i in range(4)]),
        (NOT_FOUR, [(10, 10, 20), (10, 10, 20, 20, 30)]),
        (EMPTY, [(10, 10, 10, 20), (10, 10, 20, 10), (20, 10, 10, 30), (10, 30, 20, 10)]),
        (OUTSIDE, [(-9, 10, 0, 20), (100, 10, 120, 20), (10, -9, 20, 0), (10, 60, 20, 80)]),
    ],
)
def test_a_bad_box_is_an_error_that_names_it(problem, boxes):
    for box in boxes:
        with pytest.raises(ValueError) as error:
            region_mask([(0, 0, 5, 5), box], (100, 60), (3, 4))
        assert str(error.value).startswith(f"box {list(box)} {problem}")


def test_the_region_of_an_example():
    image = Image.new("RGB", (100, 60))
    region = data.example_region(Example(image, "?", "!", [(75, 0, 100, 20)]), (3, 4))
    assert region.nonzero()[:, 0].tolist() == [3]
    with pytest.raises(InputError, match="^example nine: no boxes: a region needs at least one$"):
        data.example_region(Example(image, "?", "!", [], "nine"), (3, 4))


def test_scenes_are_small_for_the_tiny_model_and_large_for_others():
    cfg = Config(**TINY | dict(max_steps=7, prompts_per_step=3, eval_examples=5, seed=4))
    assert data.load_datasets(cfg) == (Scenes("train", 21, 4), Scenes("test", 5))
    cfg = Config(model_name_or_path="other", max_steps=0, eval_examples=5, seed=4)
    train_set = Scenes("train", 1, 4, **LARGE_SCENES)
    assert data.load_datasets(cfg) == (train_set, Scenes("test", 5, **LARGE_SCENES))
    for settings, count in ((TINY, 256), ({}, 64)):
        assert len(data.load_datasets(Config(**settings))[1]) == count


def test_every_epoch_is_a_new_permutation():
    def stream(seed, count):
        return [data.epoch_index(k, 10, seed) for k in range(count)]

    epochs = [stream(3, 40)[i : i + 10] for i in (0, 10, 20, 30)] + [stream(4, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5
    generator = torch.Generator().manual_seed(3 + 1000003)  # a resumed run needs the same order
    assert epochs[1] == torch.randperm(10, generator=generator).tolist()
    cfg = Config(prompts_per_step=4, seed=3)
    data.permutation.cache_clear()
    steps = [data.step_examples("abcdefghij", step, cfg) for step in range(3)]
    assert data.permutation.cache_info().misses == 2  # epochs
    assert sum(steps, []) == ["abcdefghij"[i] for i in stream(3, 12)]


@pytest.mark.parametrize("instruction, text", [("Look.", r"Why\? Look\."), ("", r"Why\?")])
def test_the_prompt_is_the_question_and_the_instruction(instruction, text):
    def encode(image, text):
        raise ValueError(f"no room for {text}")

    example, vlm = Example(None, "Why?", "so", [], "nine"), SimpleNamespace(encode=encode)
    with pytest.raises(InputError, match=rf"^example nine: no room for {text}$"):
        data.encode_example(vlm, example, Config(instruction=instruction))
