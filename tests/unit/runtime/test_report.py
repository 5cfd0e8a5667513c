"""Pictures, curves and pages: sizes, escaping, valid markup."""

import html.parser
import io
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image

from micro_diffusion.runtime import report


def square(colour: str, size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def test_pictures_keep_the_colours() -> None:
    images = torch.zeros(1, 3, 4, 6)
    images[0, 0], images[0, 1] = 1.0, 0.5
    (picture,) = report.pictures(images)
    assert picture.size == (6, 4)
    assert picture.getpixel((0, 0)) == (255, 128, 0)


def test_png_carries_its_notes() -> None:
    notes = {"prompt": "a piñata, 猫", "seed": "3"}
    picture = Image.open(io.BytesIO(report.png_bytes(square("red"), notes)))
    assert {key: picture.info[key] for key in notes} == notes


def test_grid_holds_every_picture_in_reading_order() -> None:
    colours = ["#ff0000", "#00ff00", "#0000ff", "#ff00ff", "#00ffff"]
    sheet = report.grid([square(c) for c in colours], ["a", "b", "c", "d", "e"], columns=2, size=64)
    assert sheet.width == report.GAP + 2 * (64 + report.GAP)
    row_height = (sheet.height - report.GAP) // 3
    for i, colour in enumerate(colours):
        centre = (report.GAP + (i % 2) * (64 + report.GAP) + 32, report.GAP + (i // 2) * row_height + 32)
        assert sheet.getpixel(centre) == square(colour).getpixel((0, 0))


@pytest.mark.parametrize("caption", ["", "word", "word " * 60, "w" * 300, "crêpe “quoted”", "短い猫の絵"])
def test_captions_stay_inside_their_cell(caption: str) -> None:
    size = 96
    sheet = report.grid([square("white")] * 2, [caption, ""], columns=2, size=size)
    right_cell = sheet.crop((report.GAP + size + report.GAP, 0, sheet.width, sheet.height))
    left_margin = sheet.crop((0, 0, report.GAP // 2, sheet.height))
    assert right_cell.getextrema() == left_margin.getextrema() == ((255, 255),) * 3
    words = sheet.crop((0, report.GAP + size, report.GAP + size, sheet.height))
    assert (words.getextrema()[0][0] < 255) == bool(caption)


def test_a_grid_needs_as_many_captions_as_pictures() -> None:
    with pytest.raises(ValueError, match="as many captions"):
        report.grid([square("red")], [])


def test_pairs_put_the_drawn_picture_left() -> None:
    sheet = report.pairs_grid([square("red")], [square("blue")], ["a"], columns=1, size=64)
    y = sheet.height - 64
    assert sheet.getpixel((report.GAP + 8, y)) == (255, 0, 0)
    assert sheet.getpixel((report.GAP + 64 + 2 + 8, y)) == (0, 0, 255)


def test_table_has_labels_left_and_on_top() -> None:
    rows = [[square("red"), square("green")], [square("blue"), square("black")]]
    sheet = report.table_grid(rows, ["a cat", "a dog"], ["noto", "twemoji"])
    assert sheet.width == report.CELL + 2 * (report.CELL + report.GAP)
    assert sheet.getpixel((sheet.width - 40, sheet.height - 40)) == (0, 0, 0)
    assert sheet.crop((0, 0, report.CELL, sheet.height)).getextrema()[0][0] < 255
    with pytest.raises(ValueError, match="zip"):
        report.table_grid(rows, ["only one"], ["noto", "twemoji"])


def svg_points(svg: str, colour: str) -> list[tuple[float, float]]:
    """Of the line of that colour, in pixels."""
    paths = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path")
    (line,) = (path for path in paths if "clip-path" in path.attrib and colour in path.attrib["style"])
    numbers = list(map(float, re.findall(r"[-\d.]+", line.attrib["d"])))
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_curve_is_straight_where_the_data_is_exponential_on_a_log_axis() -> None:
    points = [(float(x), math.exp(-x / 10)) for x in range(50)]
    svg = report.curve_svg(
        {"loss": points}, title="a & b", x_label="<x>", y_label="y", log_y=True, marks=[(25, "half")]
    )
    (left, top), *between, (right, bottom) = svg_points(svg, "#1f77b4")
    assert right > left + 300 and bottom > top + 150
    for x, y in between:
        assert y == pytest.approx(top + (x - left) / (right - left) * (bottom - top), abs=0.1)
    assert "half" in svg and "a &amp; b" in svg and "&lt;x&gt;" in svg


def test_curve_copes_with_one_point_long_runs_odd_names_and_what_is_not_finite() -> None:
    long = [(float(i), 1.0 + i % 7) for i in range(10_000)] + [(10_000.0, math.nan), (10_001.0, math.inf)]
    svg = report.curve_svg({"_long $": long, "dot $": [(5.0, 3.0)]}, title="t", x_label="x", y_label="y")
    assert 100 < len(svg_points(svg, "#1f77b4")) <= 300
    assert len(svg_points(svg, "#ff7f0e")) == 1 and svg.count("#ff7f0e") >= 3  # its dot, and the legend's
    assert "_long $" in svg and "dot $" in svg
    with pytest.raises(ValueError, match="finite point"):
        report.curve_svg({"loss": [(0.0, math.nan)]}, title="t", x_label="x", y_label="y")


def test_a_curve_is_the_same_again_and_names_nothing_twice() -> None:
    one, again, other = (
        report.curve_svg({"a": [(0.0, 1.0), (1.0, 2.0)]}, title=title, x_label="x", y_label="y") for title in "ttu"
    )
    assert one == again
    names = [set(re.findall(r'id="([^"]*)"', svg)) for svg in (one, other)]
    assert names[0] and not names[0] & names[1]


class Checker(html.parser.HTMLParser):
    """Every tag that is opened is closed, and nothing is fetched."""

    void = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert "href" not in values
        if tag == "img":
            self.images += 1
            assert values["alt"] and str(values["src"]).startswith("data:image/png;base64,")
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"path", "rect", "use"}  # SVG, written <path/>

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_valid_and_needs_nothing_else() -> None:
    svg = report.curve_svg({"a": [(0.0, 1.0), (1.0, 2.0)]}, title="t", x_label="x", y_label="y")
    body = (
        report.paragraph("1 < 2 & 3")
        + report.figure(square("red"), alt='a "red" square', caption="<one>")
        + report.figure(svg, alt="a line", caption="two")
        + report.facts({"model": "a <b>", "seed": 0})
        + report.commands(["micro-diffusion generate 'a & b'"])
    )
    page = report.html_page("<title>", "lead & more", {"first": body})
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == [] and checker.images == 1
    assert "1 &lt; 2 &amp; 3" in page and "<b>" not in page
    assert page.replace("http://www.w3.org/", "").count("http") == 0
