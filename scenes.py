"""Visual search, drawn from a seed: coloured cards, each with a mark, and a question about one of them."""

import random
import zlib
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from data import Example, InputError

COLORS = {
    "red": (215, 35, 35),
    "green": (30, 140, 50),
    "blue": (35, 70, 215),
    "yellow": (250, 220, 40),
    "orange": (250, 140, 25),
    "purple": (120, 40, 160),
    "pink": (255, 150, 200),
    "cyan": (60, 215, 225),
    "white": (255, 255, 255),
    "black": (15, 15, 15),
}
NAMES = list(COLORS)
BACKGROUND = (128, 128, 128)


@dataclass(frozen=True)
class Card:
    """A square card; `mark` is the colour name of its dot, or the digit written on it."""

    color: str
    mark: str
    box: tuple[int, int, int, int]


def seen_pair(color, mark):
    """Whether training scenes may hold this card and dot. One dot colour a card is kept for a test of transfer."""
    return (NAMES.index(mark) - NAMES.index(color)) % len(NAMES) != 3


@dataclass(frozen=True)
class Scenes:
    """Visual search: coloured cards, each with a mark; the question names one card and asks for its mark.

    `Scenes("train", 512)[7]` is an Example, drawn when asked for and the same whenever asked. The answer cannot be
    known without finding the card: positions are uniform over the whole image (the border included), cards never
    overlap, and no two have the same colour.

    Args: split, "train", "validation" or "test"; no scene is in two of them, whatever the seeds, because a hash of
    the layout decides to which it belongs; cards and card_size, (least, most), the size in pixels; marks, "dots" or
    "digits"; unseen_pairs, whether the card asked for has the dot that `seen_pair` keeps out of all other scenes.
    """

    split: str
    count: int
    seed: int = 0
    cards: tuple[int, int] = (8, 8)
    card_size: tuple[int, int] = (14, 18)
    image_size: int = 112
    marks: str = "dots"
    unseen_pairs: bool = False

    def __post_init__(self):
        if self.split not in ("train", "validation", "test"):
            raise InputError(f"no split {self.split!r}: scenes come as train, validation and test")
        if not 1 <= self.cards[0] <= self.cards[1] <= len(COLORS):
            raise InputError(f"cards {self.cards}: least and most, from 1 to {len(COLORS)}, each of another colour")
        if not 1 <= self.card_size[0] <= self.card_size[1] <= self.image_size:
            raise InputError(f"card_size {self.card_size}: least and most, from 1 to the image's {self.image_size}")
        if self.marks not in ("dots", "digits"):
            raise InputError(f"no marks {self.marks!r}: there are dots and digits")

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        cards = self.layout(index)
        return Example(draw(cards, self.image_size), question(cards[0]), cards[0].mark, [cards[0].box],
                       f"{self.split}-{self.seed}-{index}")  # fmt: skip

    def layout(self, index):
        """The cards of scene `index`, a list; the question asks for the first."""
        rng = random.Random(f"{self.seed} {self.split} {index}")
        for _ in range(10_000):
            cards = self._draw_layout(rng)
            slot = zlib.crc32(repr(sorted(cards, key=str)).encode()) % 10
            if cards and self.split == {0: "validation", 1: "test"}.get(slot, "train"):
                return cards
        raise InputError(f"{self.cards[1]} cards of {self.card_size[1]} px do not fit in {self.image_size} px")

    def _draw_layout(self, rng):
        cards = []
        for color in rng.sample(NAMES, rng.randint(*self.cards)):
            if self.marks == "digits":
                mark = rng.choice("0123456789")
            else:
                seen = not (self.unseen_pairs and not cards)
                mark = rng.choice([m for m in NAMES if m != color and seen_pair(color, m) == seen])
            for _ in range(200):
                size = rng.randint(*self.card_size)
                x, y = rng.randint(0, self.image_size - size), rng.randint(0, self.image_size - size)
                if all(x + size < a or c < x or y + size < b or d < y for a, b, c, d in (o.box for o in cards)):
                    break
            else:
                return []  # too full: begin again
            cards.append(Card(color, mark, (x, y, x + size, y + size)))
        return cards


def question(card):
    """The question that names `card` by its colour."""
    return f"What {'number is' if card.mark.isdigit() else 'color is the dot'} on the {card.color} card?"


def draw(cards, image_size):
    """The picture of a scene: RGB, `image_size` pixels square."""
    image = Image.new("RGB", (image_size, image_size), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for card in cards:
        x1, y1, x2, y2 = card.box
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=COLORS[card.color])
        if card.mark.isdigit():
            ink = "white" if sum(COLORS[card.color]) < 384 else "black"
            font = ImageFont.load_default(size=0.7 * (y2 - y1))
            pen.text(((x1 + x2) / 2, (y1 + y2) / 2), card.mark, fill=ink, font=font, anchor="mm")
        else:
            r = (x2 - x1) // 4
            cx, cy = (x1 + x2 - 1) / 2, (y1 + y2 - 1) / 2
            pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=COLORS[card.mark])
    return image
