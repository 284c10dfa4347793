"""extras/annotate.html in a real browser: json_lines.py reads its file, and the boxes are where
they were drawn."""

import pytest
from conftest import ROOT
from PIL import Image

from json_lines import JsonLines

NAMES = [f"{orientation}.jpg" for orientation in range(1, 9)] + ["6.png", "plain.webp"]
PASTED = '{"image": "odd.jpg", "question": "Why?", "answer": "so", "boxes": [[1, 1, 5, 5]]}'


@pytest.fixture
def page(browser):
    page, errors = browser.new_page(viewport={"width": 600, "height": 900}), []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto((ROOT / "extras" / "annotate.html").as_uri())
    yield page
    page.close()
    assert errors == []


@pytest.fixture
def photos(tmp_path):
    """Photos of 600 x 800 pixels as shown, stored in all ways that EXIF knows."""
    for name in NAMES:
        exif = Image.Exif()
        exif[0x0112] = int(name[0]) if name[0].isdigit() else 1
        size = (800, 600) if name[0] in "5678" else (600, 800)
        Image.new("RGB", size).save(tmp_path / name, exif=exif)
    turned = Image.open(tmp_path / "6.jpg").getexif()
    Image.new("RGB", (9, 6)).save(tmp_path / "6.avif", exif=turned)
    broken = b"Exif\0\0II*\0\xff\xff\xff\x7f"  # its directory is beyond its end
    Image.new("RGB", (9, 6)).save(tmp_path / "odd.jpg", exif=broken)
    return tmp_path


def draw_box(page, *box):
    """Draw a box with the mouse. Args: box, its corners in fractions of the photo."""
    frame = page.locator("#photo").bounding_box()
    for x, y, press in ((*box[:2], page.mouse.down), (*box[2:], page.mouse.up)):
        page.mouse.move(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"])
        press()


def add(page, question, answer):
    page.fill("#question", question)
    page.fill("#answer", answer)
    page.get_by_role("button", name="Add").click()
    return page.locator("#message").inner_text()


@pytest.mark.slow
def test_boxes_are_where_they_were_drawn_however_the_photo_is_stored(page, photos):
    page.set_input_files("#files", [photos / name for name in ["odd.jpg", "6.avif", *NAMES]])
    page.get_by_text("6.avif: a rotated AVIF; convert it to JPEG").wait_for()
    assert page.locator("#photos button").all_inner_texts() == ["odd.jpg", *NAMES]
    page.fill("#lines", PASTED)  # without a newline
    for name in NAMES:
        page.get_by_role("button", name=name).click()
        page.wait_for_function("document.getElementById('photo').complete")
        assert add(page, "Where?", name) == "a row needs a box, a question and an answer"
        draw_box(page, 0.9, 0.9, 0.5, 0.5)
        page.get_by_role("button", name="Remove the last box").click()
        draw_box(page, 0.1, 0.1, 0.3, 0.2)
        draw_box(page, 0.6, 0.5, 0.5, 1.1)  # to the left, and beyond the photo
        assert add(page, "Where?", name) == ""
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    download.value.save_as(photos / download.value.suggested_filename)
    data = JsonLines(photos / "mine.jsonl")
    assert data.rows.pop(0)["question"] == "Why?"
    assert [(row["image"], row["answer"]) for row in data.rows] == [(name, name) for name in NAMES]
    (note,) = data.notes()  # no box had to be clipped
    assert "8 of 11 images are rotated by EXIF" in note
    for example in data:
        assert example.question == "Where?" and example.image.size == (600, 800)
        expected = [(60, 80, 180, 160), (300, 400, 360, 800)]
        assert example.boxes == [pytest.approx(box, abs=2) for box in expected], example.answer
