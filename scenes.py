"""Generated visual search: colored cards with marks, and a question about one card."""

import random
import zlib
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from config import InputError
from data import Example

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

# Settings of Scenes for real models. An image token of Qwen-VL covers 28 or 32 pixels per side, so
# the default cards, made for the model in tiny/, would be smaller than a token.
LARGE_SCENES = {"image_size": 448, "card_size": (56, 80), "marks": "digits"}


@dataclass(frozen=True)
class Card:
    """A square card. Do not rename or reorder fields: the split hashes the repr of cards."""

    color: str
    mark: str  # the color name of its dot, or the digit on it
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scenes:
    """Visual search: colored cards, each with a mark; the question asks for the mark of one card.

    `Scenes("train", 512)[7]` is an Example. It is generated on demand and is the same every time.
    The answer requires finding the card: its position is uniform over the whole image, cards never
    overlap, and no two cards have the same color.

    Args: split, "train", "validation" or "test". A hash of the layout determines the split, so no
    scene is in two splits, even with different seeds; count, the number of scenes; cards and
    card_size, (minimum, maximum), with sizes in pixels; image_size, pixels per side; marks, "dots"
    or "digits".
    """

    split: str
    count: int
    seed: int = 0
    cards: tuple[int, int] = (8, 8)
    card_size: tuple[int, int] = (14, 18)
    image_size: int = 112
    marks: str = "dots"

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        cards = self.layout(index)
        card, image = cards[0], draw(cards, self.image_size)
        name = f"{self.split}-{self.seed}-{index}"
        return Example(image, question(card), card.mark, [card.box], name)

    def layout(self, index):
        """The cards of scene `index`, as a list. The question is about the first.
        Raises: InputError if the cards do not fit."""
        rng = random.Random(f"{self.seed} {self.split} {index}")
        for _ in range(10_000):
            cards = self._draw_layout(rng)
            slot = zlib.crc32(repr(sorted(cards, key=str)).encode()) % 10
            if cards and self.split == {0: "validation", 1: "test"}.get(slot, "train"):
                return cards
        raise InputError(
            f"{self.cards[1]} cards of {self.card_size[1]} px do not fit in {self.image_size} px"
        )

    def _draw_layout(self, rng):
        """Cards at random places, or [] if one did not fit."""
        cards = []
        for color in rng.sample(NAMES, rng.randint(*self.cards)):
            if self.marks == "digits":
                mark = rng.choice("0123456789")
            else:
                # One dot color per card color never occurs, so it could test generalization.
                unseen = NAMES[(NAMES.index(color) + 3) % len(NAMES)]
                mark = rng.choice([m for m in NAMES if m not in (color, unseen)])
            box = self._find_place(rng, cards)
            if not box:
                return []
            cards.append(Card(color, mark, box))
        return cards

    def _find_place(self, rng, cards):
        """A random box that neither overlaps nor touches a card, or None after 200 attempts."""
        for _ in range(200):
            size = rng.randint(*self.card_size)
            x, y = (rng.randint(0, self.image_size - size) for _ in range(2))
            box = (x, y, x + size, y + size)
            if not any(_touch(box, card.box) for card in cards):
                return box
        return None


def _touch(a, b):
    """Whether two boxes overlap or share an edge."""
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def question(card):
    """The question about the mark of `card`."""
    what = "number is" if card.mark.isdigit() else "color is the dot"
    return f"What {what} on the {card.color} card?"


def draw(cards, image_size):
    """The image of a scene: RGB, `image_size` pixels per side."""
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
