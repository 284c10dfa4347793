"""Tests of the model in tiny/: it sees but makes mistakes, needs the image, and is small."""

import sys

import pytest
from conftest import TINY
from transformers import AutoModelForImageTextToText, AutoTokenizer

from data import region_mask
from sources.scenes import Scenes

sys.path.insert(0, str(TINY))
from make import GRID, SIZE, answer_text, cell_words, greedy_accuracy, place_words  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(TINY)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_it_can_see_but_makes_mistakes(model, tokenizer):
    right_place, right_answer = greedy_accuracy(model, tokenizer, Scenes("test", 256))
    assert 0.45 <= right_answer <= 0.75, right_answer
    assert right_place <= right_answer + 0.05  # a wrong place leads to a wrong answer


def test_it_cannot_answer_without_the_image(model, tokenizer):
    """Accuracy is near chance: a dot on a card can have eight of the ten colors."""
    assert greedy_accuracy(model, tokenizer, Scenes("test", 256), blank=True)[1] < 0.2


def test_it_is_small_and_contains_only_safetensors():
    assert (TINY / "model.safetensors").stat().st_size < 8e6
    assert not [p for p in TINY.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_every_word_of_a_scene_is_a_token(tokenizer):
    cards = Scenes("train", 1).layout(0)
    text = answer_text(cards[0], cards[1])
    ids = tokenizer(f"What color is the dot on the {cards[0].color} card? {text}").input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_teacher_names_the_cell_of_the_center():
    cards = Scenes("train", 1).layout(0)
    words = cell_words(cards)
    for card in cards:
        row, column = place_words(card)
        cell = (int(row[1]) - 1) * GRID[1] + int(column[1]) - 1
        assert region_mask([card.box], (SIZE, SIZE), GRID)[cell]
        assert words[cell] == [card.color, card.mark, row, column]
    touched = region_mask([card.box for card in cards], (SIZE, SIZE), GRID)
    assert all(words[i] == ["."] for i in range(len(words)) if not touched[i])
