"""scenes.py: scenes are the same every time, well-formed, and in one split only."""

from collections import Counter
from itertools import combinations

import pytest
from PIL import Image

from config import InputError
from scenes import BACKGROUND, COLORS, LARGE_SCENES, NAMES, Card, Scenes


def layouts(count, split="train", **settings):
    scenes = Scenes(split, count, **settings)
    return [scenes.layout(i) for i in range(count)]


def test_scenes_are_the_same_every_time_and_on_every_machine():
    # A deliberate change to the scenes changes these two cards, and every result measured on them.
    assert Scenes("train", 1).layout(0)[0] == Card("black", "pink", (94, 68, 110, 84))
    assert Scenes("test", 1).layout(0)[0] == Card("orange", "blue", (68, 3, 82, 17))
    for style in ({}, LARGE_SCENES):
        first, again = (Scenes("train", count, seed=3, **style)[2] for count in (3, 9))
        assert first.image.tobytes() == again.image.tobytes() and first == again


def test_every_seed_split_and_index_gives_a_different_scene():
    sets = [Scenes(split, 3, seed) for split in ("train", "validation", "test") for seed in (0, 1)]
    assert len({example.image.tobytes() for scenes in sets for example in scenes}) == 18
    assert [example.id for example in sets[-1]] == ["test-1-0", "test-1-1", "test-1-2"]
    for index in (3, -1):
        with pytest.raises(IndexError):
            sets[0][index]
    assert len(sets[0]) == 3


@pytest.mark.parametrize("cards, size", [(1, 15), (2, 1)])
def test_no_scene_is_in_two_splits(cards, size):
    # One card at one of four places: random splits would share many scenes. Two cards: the same two
    # must be in the same split if the question is about the other one.
    style = dict(cards=(cards, cards), card_size=(size, size), image_size=cards + size)
    counts = {"train": 700, "validation": 300, "test": 300}
    scenes = []
    for seed, (split, count) in enumerate(counts.items()):
        scenes.append(set(map(frozenset, layouts(count, split, seed=seed, **style))))
    assert all(scenes) and not any(a & b for a, b in combinations(scenes, 2))


@pytest.mark.parametrize(
    "settings, size, card_sizes, counts",
    [
        (dict(cards=(2, 10)), 112, range(14, 19), range(2, 11)),
        (LARGE_SCENES, 448, range(56, 81), [8]),
    ],
)
def test_cards_are_everywhere_in_the_image_and_apart(settings, size, card_sizes, counts):
    drawn = layouts(150, **settings)
    boxes = [[card.box for card in cards] for cards in drawn]
    for a, b in (pair for scene in boxes for pair in combinations(scene, 2)):
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
    boxes = sum(boxes, [])
    assert {x2 - x1 for x1, _, x2, _ in boxes} == {y2 - y1 for _, y1, _, y2 in boxes}
    assert {x2 - x1 for x1, _, x2, _ in boxes} == set(card_sizes)
    edges = [f(box[i] for box in boxes) for i, f in enumerate([min, min, max, max])]
    assert edges == [0, 0, size, size]
    quadrants = Counter((x1 + x2 < size, y1 + y2 < size) for x1, y1, x2, y2 in boxes)
    assert len(quadrants) == 4 and min(quadrants.values()) > 0.8 * len(boxes) / 4
    assert {len(cards) for cards in drawn} == set(counts)
    assert all(len({card.color for card in cards}) == len(cards) for cards in drawn)


def test_the_answer_cannot_be_guessed_from_the_question_and_one_pair_is_withheld():
    drawn = layouts(500)
    pairs = {(card.color, card.mark) for cards in drawn for card in cards}
    asked = {(cards[0].color, cards[0].mark) for cards in drawn}
    unseen = {(color, NAMES[(i + 3) % 10]) for i, color in enumerate(NAMES)}
    assert pairs == {(a, b) for a in NAMES for b in NAMES if a != b} - unseen
    assert len(asked) > 75  # of 80


@pytest.mark.parametrize("settings", [{}, dict(cards=(10, 10)), LARGE_SCENES])
def test_the_question_names_one_card_and_the_answer_is_its_mark(settings):
    scenes = Scenes("test", 20, **settings)
    for i, example in enumerate(scenes):
        cards = scenes.layout(i)
        what = "number is" if settings == LARGE_SCENES else "color is the dot"
        assert example.question == f"What {what} on the {cards[0].color} card?"
        assert example.answer == cards[0].mark and example.boxes == [cards[0].box]
        size = example.image.width
        bare = Image.new("RGB", (size, size), BACKGROUND)
        for card in cards:
            bare.paste(COLORS[card.color], card.box)
            tile = example.image.crop(card.box)
            bare.paste(tile, card.box)
            counts = Counter(tile.get_flattened_data())
            if settings == LARGE_SCENES:  # enough contrast and ink to read the digit
                paper = sum(COLORS[card.color])
                ink, count = max(counts.items(), key=lambda item: abs(sum(item[0]) - paper))
                assert abs(sum(ink) - paper) > 250 and count > 30
            else:  # the dot is in the center, visible, and smaller than the card
                assert set(counts) == {COLORS[card.color], COLORS[card.mark]}
                assert tile.getpixel((tile.width // 2, tile.height // 2)) == COLORS[card.mark]
                assert 0.1 < counts[COLORS[card.mark]] / tile.width**2 < 0.4
            assert tile.getpixel((0, 0)) == COLORS[card.color]
        assert bare.tobytes() == example.image.tobytes()  # nothing is outside the cards


def test_a_crowded_scene_has_all_its_cards_unless_they_cannot_fit(monkeypatch):
    # Three cards of this size often leave no room for the fourth. The layout then starts over.
    crowded = dict(cards=(4, 4), card_size=(35, 35), image_size=100)
    assert {len(cards) for cards in layouts(20, "validation", **crowded)} == {4}
    monkeypatch.setattr(Scenes, "_draw_layout", lambda *_: [])
    with pytest.raises(InputError, match="4 cards of 35 px do not fit in 100 px"):
        layouts(1, **crowded)
