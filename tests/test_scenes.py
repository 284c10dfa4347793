"""Tests of sources/scenes.py: scenes are reproducible, well-formed and split without overlap."""

from collections import Counter
from itertools import combinations

import pytest
from PIL import Image

from config import InputError
from sources.scenes import (
    BACKGROUND,
    COLORS,
    LARGE_SCENES,
    NAMES,
    Card,
    Scenes,
    draw,
    seen_pair,
)


def layouts(count, split="train", **settings):
    drawn = Scenes(split, count, **settings)
    return [drawn.layout(i) for i in range(count)]


@pytest.fixture(scope="module")
def many():
    """The cards of 1000 scenes with the default settings."""
    return layouts(1000)


def pixels(examples):
    return [(e.image.size, e.image.mode, e.image.tobytes()) for e in examples]


@pytest.mark.parametrize("settings", [{}, LARGE_SCENES])
def test_a_scene_is_the_same_every_time(settings):
    first, again = Scenes("train", 5, seed=3, **settings), Scenes("train", 9, seed=3, **settings)
    backwards = [again[i] for i in reversed(range(5))][::-1]
    assert pixels(first) == pixels(backwards)
    assert [(e.question, e.answer, e.boxes, e.id) for e in first] == [
        (e.question, e.answer, e.boxes, e.id) for e in backwards
    ]


def test_scenes_are_the_same_in_every_process_and_on_every_machine():
    # Neither seeds nor splits may depend on hash(), which differs between processes. A deliberate
    # change to the scenes changes these two cards, and every result measured on scenes.
    assert Scenes("train", 1).layout(0)[0] == Card("black", "pink", (94, 68, 110, 84))
    assert Scenes("test", 1).layout(0)[0] == Card("orange", "blue", (68, 3, 82, 17))


def test_every_seed_split_and_index_gives_a_different_scene():
    sets = [
        Scenes(split, 4, seed=seed) for split in ("train", "validation", "test") for seed in (0, 1)
    ]
    pictures = [picture for s in sets for _, _, picture in pixels(s)]
    assert len(set(pictures)) == len(pictures) == 24
    assert len({e.id for s in sets for e in s}) == 24


def test_scenes_have_a_length_and_an_end():
    three = Scenes("test", 3)
    assert len(three) == 3 and len(list(three)) == 3
    for index in (3, -1):
        with pytest.raises(IndexError):
            three[index]


@pytest.mark.parametrize(
    "counts, settings",
    [
        pytest.param((200, 200), {}, id="default"),
        # There are so few places that random splits would share many scenes.
        pytest.param(
            (500, 500),
            dict(cards=(1, 1), card_size=(15, 15), image_size=16),
            id="one card, four places",
        ),
        # The same two cards with a question about the other one must be in the same split.
        pytest.param(
            (1500, 400), dict(cards=(2, 2), card_size=(1, 1), image_size=3), id="two cards"
        ),
    ],
)
def test_no_scene_is_in_two_splits(counts, settings):
    train, others = counts
    seen = {
        split: {frozenset(cards) for cards in layouts(n, split, seed=seed, **settings)}
        for split, n, seed in (("train", train, 0), ("validation", others, 1), ("test", others, 2))
    }
    for a, b in combinations(seen.values(), 2):
        assert not a & b
    assert all(seen.values())


@pytest.mark.parametrize(
    "settings", [{}, dict(cards=(2, 10)), LARGE_SCENES], ids=["default", "2 to 10", "digits"]
)
def test_cards_are_inside_the_image_do_not_overlap_and_differ_in_color(settings):
    size = settings.get("image_size", 112)
    minimum, maximum = settings.get("card_size", (14, 18))
    for cards in layouts(300 if settings != LARGE_SCENES else 50, **settings):
        for card in cards:
            x1, y1, x2, y2 = card.box
            assert 0 <= x1 and 0 <= y1 and x2 <= size and y2 <= size
            assert x2 - x1 == y2 - y1 and minimum <= x2 - x1 <= maximum
            assert card.color in COLORS and card.mark != card.color
        for a, b in combinations([card.box for card in cards], 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert len({card.color for card in cards}) == len(cards)


def test_number_and_size_of_cards_take_every_allowed_value():
    drawn = layouts(200, cards=(3, 6))
    assert {len(cards) for cards in drawn} == {3, 4, 5, 6}
    assert {c.box[2] - c.box[0] for cards in drawn for c in cards} == {14, 15, 16, 17, 18}
    assert {len(cards) for cards in layouts(20)} == {8}


def test_cards_are_everywhere_including_the_border(many):
    boxes = [cards[0].box for cards in many]  # of the card that the question is about
    assert min(b[0] for b in boxes) == min(b[1] for b in boxes) == 0
    assert max(b[2] for b in boxes) == max(b[3] for b in boxes) == 112
    quadrants = Counter((b[0] + b[2] < 112, b[1] + b[3] < 112) for b in boxes)
    assert len(quadrants) == 4 and min(quadrants.values()) > 200  # 250 expected; 3 sigma are 41


def test_a_card_may_be_on_any_side_of_another(many):
    sides = Counter()
    for first, later in ((a.box, b.box) for cards in many for a, b in combinations(cards, 2)):
        for i, (before, after) in enumerate([("left", "right"), ("above", "below")]):
            j = 1 - i  # the other axis, on which the two must overlap
            if first[j] < later[j + 2] and later[j] < first[j + 2]:
                sides[before if later[i + 2] <= first[i] else after] += 1
    assert len(sides) == 4 and max(sides.values()) < 1.2 * min(sides.values())  # about 1500 each


def test_a_crowded_scene_has_all_its_cards():
    # Three cards of this size often leave no room for the fourth. The layout then starts over.
    for split in ("train", "validation", "test"):
        crowded = layouts(20, split, cards=(4, 4), card_size=(35, 35), image_size=100)
        assert {len(cards) for cards in crowded} == {4}


def test_the_answer_cannot_be_guessed_from_the_question(many):
    for color in NAMES:
        answers = {cards[0].mark for cards in many if cards[0].color == color}
        possible = {mark for mark in NAMES if mark != color and seen_pair(color, mark)}
        assert answers == possible and len(possible) == 8


def named_in(text):
    return [word for word in text.replace("?", " ").split() if word in COLORS]


@pytest.mark.parametrize("settings", [{}, dict(unseen_pairs=True), dict(cards=(2, 10))])
def test_the_question_names_one_card_and_its_dot_is_the_answer(settings):
    examples = Scenes("test", 60, **settings)
    for i, example in enumerate(examples):
        cards = examples.layout(i)
        (color,) = named_in(example.question)
        (card,) = [c for c in cards if c.color == color]
        assert "dot" in example.question
        assert example.answer == card.mark and example.boxes == [card.box]
        assert example.image.size == (112, 112) and example.image.mode == "RGB"
        x1, y1, x2, y2 = card.box
        assert example.image.getpixel(((x1 + x2) // 2, (y1 + y2) // 2)) == COLORS[example.answer]


def test_boxes_are_exactly_the_painted_cards(many):
    for cards in many[:20]:
        image = draw(cards, 112)
        painted = {
            (x, y) for x in range(112) for y in range(112) if image.getpixel((x, y)) != BACKGROUND
        }
        boxes = [card.box for card in cards]
        assert painted == {
            (x, y) for x1, y1, x2, y2 in boxes for x in range(x1, x2) for y in range(y1, y2)
        }
        for card in cards:
            x1, y1, x2, y2 = card.box
            counts = Counter(image.crop(card.box).get_flattened_data())
            assert set(counts) == {COLORS[card.color], COLORS[card.mark]}
            share = counts[COLORS[card.mark]] / (x2 - x1) ** 2
            assert 0.1 < share < 0.4  # the dot is visible, and smaller than the card
            corners = [(x, y) for x in (x1, x2 - 1) for y in (y1, y2 - 1)]
            assert {image.getpixel(p) for p in corners} == {COLORS[card.color]}


def test_one_dot_color_per_card_color_is_unseen():
    for color in NAMES:
        (kept_out,) = [mark for mark in NAMES if not seen_pair(color, mark)]
        assert kept_out != color


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_only_the_card_in_question_is_an_unseen_pair_and_only_with_the_flag(split):
    for cards in layouts(100, split):
        assert all(seen_pair(card.color, card.mark) for card in cards)
    for cards in layouts(100, split, unseen_pairs=True):
        assert not seen_pair(cards[0].color, cards[0].mark)
        assert all(seen_pair(card.color, card.mark) for card in cards[1:])


def test_digits_are_on_their_cards_and_are_the_answers():
    examples = Scenes("train", 20, **LARGE_SCENES)
    for i, example in enumerate(examples):
        cards = examples.layout(i)
        (color,) = named_in(example.question)
        (card,) = [c for c in cards if c.color == color]
        assert "number" in example.question
        assert example.answer == card.mark and example.boxes == [card.box]
        assert example.image.size == (448, 448)
        bare = Image.new("RGB", (448, 448), BACKGROUND)
        for c in cards:
            bare.paste(COLORS[c.color], c.box)
            tile = Counter(example.image.crop(c.box).get_flattened_data())
            paper = sum(COLORS[c.color])
            ink, inked = max(tile.items(), key=lambda item: abs(sum(item[0]) - paper))
            assert abs(sum(ink) - paper) > 250 and inked > 30  # enough contrast and size to read
            assert tile[COLORS[c.color]] > sum(tile.values()) / 2
            bare.paste(example.image.crop(c.box), c.box)
        assert bare.tobytes() == example.image.tobytes()  # no ink outside the cards
    assert {cards[0].mark for cards in layouts(100, **LARGE_SCENES)} == set("0123456789")


def test_each_digit_looks_different():
    card = Card("white", "0", (10, 10, 70, 70))
    pictures = {draw([Card(card.color, d, card.box)], 80).tobytes() for d in "0123456789"}
    assert len(pictures) == 10


@pytest.mark.parametrize(
    "args, settings, word",
    [
        (("training", 3), {}, "training"),
        (("", 3), {}, "split"),
        (("train", 3), dict(cards=(5, 11)), "11"),  # ten colors
    ],
)
def test_invalid_settings_are_an_error_that_names_them(args, settings, word):
    with pytest.raises(InputError, match=word):
        Scenes(*args, **settings)


def test_a_scene_can_have_as_many_cards_as_there_are_colors():
    (cards,) = layouts(1, cards=(10, 10))
    assert sorted(card.color for card in cards) == sorted(NAMES)
