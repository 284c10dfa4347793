"""Reading images: orientation, color modes, box clipping, and one-line errors."""

import warnings
from contextlib import contextmanager

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from config import InputError

MAX_ASPECT_RATIO = 200  # the image processors of Qwen-VL raise an error above it


@contextmanager
def image_errors(name):
    """Turn any exception in the block into an InputError that names the image.

    Pillow can raise almost any exception on a damaged file. Its warnings are silenced, because they
    are about files that it can still read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UnidentifiedImageError:
            reason = "not an image format that Pillow can read"
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        else:
            return
    raise InputError(f"cannot read the image {name!r}: {' '.join(str(reason).split())}")


def stored_size(image):
    """The (width, height) of an opened image before any EXIF rotation."""
    if image.format == "TIFF":  # only for TIFF does Pillow report the rotated size
        if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
            return image.size[::-1]
    return image.size


def clip_box(box, size):
    """The box clipped to an image of `size` (width, height). Boxes inside it are unchanged."""
    clipped = max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])
    return box if clipped == tuple(box) else clipped


def apply_exif_orientation(image, boxes):
    """Apply the EXIF orientation to an image and its boxes, and convert the image to RGB.

    Cameras store pixels in sensor order and record the orientation in EXIF. Boxes are in pixels of
    the stored image, so they must be rotated with it.

    Args: image, an opened image whose pixels are not loaded yet; boxes, a list of
    `(x1, y1, x2, y2)` in pixels of the stored image.
    Returns: (RGB image, boxes in its pixels). Transparency becomes white; 16-bit gray, 8-bit.
    """
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    width, height = stored_size(image)
    if orientation in (2, 3, 7, 8):
        boxes = [(width - x2, y1, width - x1, y2) for x1, y1, x2, y2 in boxes]
    if orientation in (3, 4, 6, 7):
        boxes = [(x1, height - y2, x2, height - y1) for x1, y1, x2, y2 in boxes]
    if orientation in (5, 6, 7, 8):
        boxes = [(y1, x1, y2, x2) for x1, y1, x2, y2 in boxes]
    image.load()  # rotates a TIFF and clears its orientation, so it is not rotated twice
    return _to_rgb(ImageOps.exif_transpose(image)), boxes


def _to_rgb(image):
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda v: v * (1 / 256)).convert("L")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
