"""The model that ships: able but careless, blind without the image, and no larger than promised."""

import sys

import pytest
from conftest import TINY
from transformers import AutoModelForImageTextToText, AutoTokenizer

from data import region_mask
from scenes import Scenes

sys.path.insert(0, str(TINY))
from make import GRID, SIZE, answer, cell_words, greedy, place  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(TINY)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_it_is_able_but_careless(model, tokenizer):
    placed, right = greedy(model, tokenizer, Scenes("test", 256))
    assert 0.45 <= right <= 0.75, right
    assert placed <= right + 0.05  # a wrong look carries on into the answer


def test_it_cannot_answer_without_the_image(model, tokenizer):
    """Near chance: there are ten colours, of which a dot may have eight."""
    assert greedy(model, tokenizer, Scenes("test", 256), blank=True)[1] < 0.2


def test_it_is_small_and_of_safetensors_only():
    assert (TINY / "model.safetensors").stat().st_size < 8e6
    assert not [p for p in TINY.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_every_word_of_a_scene_is_a_token(tokenizer):
    cards = Scenes("train", 1).layout(0)
    text = answer(cards[0], cards[1])
    ids = tokenizer(f"What color is the dot on the {cards[0].color} card? {text}").input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_teacher_names_the_cell_of_the_centre():
    cards = Scenes("train", 1).layout(0)
    words = cell_words(cards)
    for card in cards:
        row, column = place(card)
        cell = (int(row[1]) - 1) * GRID[1] + int(column[1]) - 1
        assert region_mask([card.box], (SIZE, SIZE), GRID)[cell]
        assert words[cell] == [card.color, card.mark, row, column]
    touched = region_mask([card.box for card in cards], (SIZE, SIZE), GRID)
    assert all(words[i] == ["."] for i in range(len(words)) if not touched[i])
