"""Pictures with their prompts under them, curves, and pages that need nothing else: no network, no plotting library."""

import base64
import html
import io
import math
import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

PAPER, INK, FAINT = "#ffffff", "#1f2430", "#6b7280"
GAP, FONT_SIZE, MAX_LINES = 10, 12, 4
COLOURS = ("#2f6fde", "#e0632f", "#2a9d63", "#a855c7", "#c99a00", "#d6457f")
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")

Series = Mapping[str, Sequence[tuple[float, float]]]


def pictures(images: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Float images in [0, 1] as RGB pictures."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(p.permute(1, 2, 0).contiguous().cpu().numpy(), "RGB") for p in pixels]


def png_bytes(picture: Image.Image, notes: Mapping[str, str] | None = None) -> bytes:
    """The picture as PNG; `notes` become its text chunks (prompt, seed, settings)."""
    info = PngInfo()
    for key, value in (notes or {}).items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info, optimize=True)
    return buffer.getvalue()


class _Label(NamedTuple):
    """A text broken into lines that fit a width, with the font that can draw it."""

    lines: list[str]
    font: Any
    height: int


def _label(text: str, width: int, *, size: int = FONT_SIZE, max_lines: int = MAX_LINES) -> _Label:
    """Pillow's own font draws ASCII only: accents are folded away, other scripts use a system font if there is one."""
    text = unicodedata.normalize("NFKD", text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}))
    text = " ".join("".join(c for c in text if not unicodedata.combining(c)).split())
    font: Any = ImageFont.load_default(size)
    for name in WIDE_FONTS if not text.isascii() else ():
        try:
            font = ImageFont.truetype(name, size)
            break
        except OSError:
            continue
    room = max(width // 3, 8)  # in characters: the largest number at which every line fits
    while True:
        lines = textwrap.wrap(text, room, max_lines=max_lines, placeholder=" ...") or [""]
        if room <= 8 or all(font.getlength(line) <= width for line in lines):
            return _Label(lines, font, math.ceil(len(lines) * size * 1.3))
        room -= 1


def _write(draw: ImageDraw.ImageDraw, label: _Label, centre: float, top: float, colour: str = INK) -> None:
    step = label.height / len(label.lines)
    for i, line in enumerate(label.lines):
        draw.text((centre, top + i * step), line, fill=colour, font=label.font, anchor="ma")


def _fit(picture: Image.Image, height: int) -> Image.Image:
    width = round(picture.width * height / picture.height)
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def grid(
    images: Sequence[Image.Image], captions: Sequence[str], *, columns: int | None = None, size: int = 128
) -> Image.Image:
    """Pictures in reading order, each scaled to `size` pixels of height, with its caption wrapped under it."""
    if not images or len(images) != len(captions):
        raise ValueError(f"a grid needs as many captions as pictures, at least one: {len(images)}, {len(captions)}")
    columns = min(columns or math.ceil(math.sqrt(len(images) * 1.5)), len(images))
    cells = [_fit(image, size) for image in images]
    width = max(cell.width for cell in cells)
    labels = [_label(caption, width) for caption in captions]
    rows = [range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)]
    heights = [size + 4 + max(labels[i].height for i in row) + GAP for row in rows]
    sheet = Image.new("RGB", (GAP + columns * (width + GAP), GAP + sum(heights)), PAPER)
    draw, top = ImageDraw.Draw(sheet), GAP
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = GAP + column * (width + GAP)
            sheet.paste(cells[i], (left + (width - cells[i].width) // 2, top))
            _write(draw, labels[i], left + width / 2, top + size + 4)
        top += height
    return sheet


def pairs_grid(
    drawn: Sequence[Image.Image],
    true: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    columns: int = 5,
    size: int = 96,
) -> Image.Image:
    """Each cell holds the drawn picture on the left and the true one on the right, the prompt under both."""
    pairs = []
    for left, right in zip(drawn, true, strict=True):
        left, right = _fit(left, size), _fit(right, size)
        pair = Image.new("RGB", (left.width + right.width + 2, size), "#d7dae0")
        pair.paste(left, (0, 0))
        pair.paste(right, (left.width + 2, 0))
        pairs.append(pair)
    body = grid(pairs, captions, columns=columns, size=size)
    head = _label("in each pair: drawn by the model (left), true picture (right)", body.width - 2 * GAP)
    sheet = Image.new("RGB", (body.width, body.height + head.height + GAP), PAPER)
    sheet.paste(body, (0, head.height + GAP))
    _write(ImageDraw.Draw(sheet), head, body.width / 2, GAP, FAINT)
    return sheet


def table_grid(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str], *, size: int = 128
) -> Image.Image:
    """Rows by columns of pictures: labels on the left and on top."""
    margin = size
    left_labels = [_label(text, margin - 2 * GAP) for text in row_labels]
    top_labels = [_label(text, size) for text in column_labels]
    top = GAP + max(label.height for label in top_labels) + 4
    sheet = Image.new("RGB", (margin + len(top_labels) * (size + GAP), top + len(rows) * (size + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(top_labels):
        _write(draw, label, margin + column * (size + GAP) + size / 2, GAP)
    for row, (label, cells) in enumerate(zip(left_labels, rows, strict=True)):
        y = top + row * (size + GAP)
        _write(draw, label, margin / 2, y + (size - label.height) / 2)
        for column, cell in enumerate(cells):
            sheet.paste(_fit(cell, size), (margin + column * (size + GAP), y))
    return sheet


class Axis(NamedTuple):
    """A range of values and the pixels that it covers."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """At most a handful of round values inside the range."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(powers) <= 3 else (1,)
            marks = [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]
            return marks if len(marks) > 1 else [self.low, self.high]
        raw = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(s * unit for s in (1, 2, 5, 10) if s * unit >= raw)
        return [i * step for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def _axis(values: Sequence[float], start: float, stop: float, *, log: bool = False) -> Axis:
    low, high = min(values), max(values)
    return Axis(low, high if high > low else low + abs(low or 1), start, stop, log)  # one value still gets a range


def _number(value: float) -> str:
    for limit, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / unit:.3g} {letter}"
    return f"{value:.4g}"


def _thin(points: Sequence[tuple[float, float]], limit: int = 300) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of its neighbours."""
    width = math.ceil(len(points) / limit)
    chunks = [points[i : i + width] for i in range(0, len(points), width)] if points else []
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


CURVE_STYLE = """<style>.curve{font:12px system-ui,sans-serif;background:#fff}.curve text{fill:#1f2430}
.curve .axis{stroke:#8a90a0;stroke-opacity:.35}@media(prefers-color-scheme:dark){
.curve{background:#171a21}.curve text{fill:#e4e7ee}}</style>"""


def curve_svg(
    series: Series,
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Lines over common axes as one SVG; `marks` are labelled upright lines such as the starts of stages."""
    width, height, left, right, top, bottom = 760, 400, 64, 744, 84, 352
    lines = {
        name: _thin([(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log_y)])
        for name, points in series.items()
    }
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("a curve needs at least one finite point")
    across = _axis([x for x, _ in points] + [x for x, _ in marks], left, right)
    up = _axis([y for _, y in points], bottom, top, log=log_y)

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(words)}</text>'

    def line(path: str, more: str = 'class="axis"') -> str:
        return f'<path d="{path}" {more}/>'

    out = [
        f'<svg class="curve" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{html.escape(title)}</title>{CURVE_STYLE}",
        text(left, 20, title, 'font-size="14" font-weight="600"'),
        text((left + right) / 2, height - 8, x_label, 'text-anchor="middle"'),
        text(0, 0, y_label, f'transform="translate(14 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle"'),
    ]
    for y in up.ticks():
        out += [line(f"M{left} {up.at(y):.1f}H{right}"), text(left - 6, up.at(y) + 4, _number(y), 'text-anchor="end"')]
    out += [text(across.at(x), bottom + 18, _number(x), 'text-anchor="middle"') for x in across.ticks()]
    for x, name in marks:
        u = across.at(x)
        out += [line(f"M{u:.1f} {top - 14}V{bottom}"), text(u + 4, top - 6, name, 'font-size="11"')]
    legend = float(left)
    for i, (name, line_points) in enumerate(lines.items()):
        colour = f'stroke="{COLOURS[i % len(COLOURS)]}"'
        path = " ".join(
            f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in (line_points * 2 if len(line_points) == 1 else line_points)
        )
        out.append(f'<polyline {colour} fill="none" stroke-width="1.8" stroke-linecap="round" points="{path}"/>')
        out += [line(f"M{legend:.0f} 42h18", f'{colour} stroke-width="3"'), text(legend + 24, 46, name)]
        legend += 48 + 7 * len(name)
    return "\n".join([*out, "</svg>"])


def curve_png(svg: str, *, scale: int = 2) -> Image.Image:
    """What `curve_svg` wrote, as a picture; it knows the few shapes that are used there."""
    root = ElementTree.fromstring(svg)
    width, height = (int(side) * scale for side in root.attrib["viewBox"].split()[2:])
    sheet, font = Image.new("RGB", (width, height), PAPER), ImageFont.load_default(FONT_SIZE * scale)
    draw = ImageDraw.Draw(sheet)
    for shape in root:
        kind, at = shape.tag.rpartition("}")[2], shape.attrib
        if kind == "polyline":
            points = [float(number) * scale for number in at["points"].replace(",", " ").split()]
            draw.line(points, at["stroke"], 2 * scale, joint="curve")
        elif kind == "path":  # "M x y", then "H x", "V y" or "h dx"
            x, y, to = (float(number) * scale for number in re.findall(r"[\d.]+", at["d"]))
            end = (x, to) if "V" in at["d"] else (to if "H" in at["d"] else x + to, y)
            draw.line([(x, y), end], at.get("stroke", "#d8dbe2"), scale * int(at.get("stroke-width", 1)))
        elif kind == "text" and "transform" in at:  # the label of the upright axis
            strip = Image.new("RGB", (height, 2 * FONT_SIZE * scale), PAPER)
            ImageDraw.Draw(strip).text((height / 2, 0), shape.text or "", INK, font, "ma")
            sheet.paste(strip.rotate(90, expand=True), (2 * scale, 18 * scale))
        elif kind == "text":
            anchor = {"middle": "ms", "end": "rs"}.get(at.get("text-anchor", ""), "ls")
            draw.text((float(at["x"]) * scale, float(at["y"]) * scale), shape.text or "", INK, font, anchor)
    return sheet


def paragraph(text: str) -> str:
    """Plain text as one paragraph."""
    return f"<p>{html.escape(text)}</p>"


def figure(picture: Image.Image | str, *, alt: str, caption: str) -> str:
    """A picture as a data URI, or an SVG text as it is, with its caption; `alt` says what is to be seen."""
    if isinstance(picture, str):
        inner = f'<div role="group" aria-label="{html.escape(alt)}">{picture}</div>'
    else:
        data = base64.b64encode(png_bytes(picture)).decode()
        inner = (
            f'<img alt="{html.escape(alt)}" width="{picture.width}" height="{picture.height}" '
            f'src="data:image/png;base64,{data}">'
        )
    return f'<figure><div class="wide">{inner}</div><figcaption>{html.escape(caption)}</figcaption></figure>'


def facts(rows: Mapping[str, object]) -> str:
    """A two-column table of names and values."""
    cells = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f'<div class="wide"><table>{cells}</table></div>'


def commands(lines: Sequence[str]) -> str:
    """Command lines to copy."""
    return f"<pre><code>{html.escape(chr(10).join(lines))}</code></pre>"


STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1f2430;--faint:#5d6473;--line:#e2e5eb;--soft:#f5f6f9}
@media(prefers-color-scheme:dark){:root{--paper:#171a21;--ink:#e4e7ee;--faint:#a3abba;--line:#2e3440;--soft:#20242d}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:2.5rem 1.25rem 4rem}h1{font-size:2rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.25rem;margin:2.5rem 0 .5rem;padding-top:1.25rem;border-top:1px solid var(--line)}
p{max-width:46rem}.lead{font-size:1.125rem;color:var(--faint)}figure{margin:1rem 0}.wide{overflow-x:auto}
img,.curve{max-width:100%;height:auto;display:block;border:1px solid var(--line);border-radius:8px}
figcaption{font-size:.875rem;color:var(--faint);margin-top:.5rem}table{border-collapse:collapse;font-size:.9375rem}
th,td{text-align:left;vertical-align:top;padding:.35rem 1.25rem .35rem 0;border-bottom:1px solid var(--line)}
th{font-weight:500;color:var(--faint)}td{font-variant-numeric:tabular-nums}
pre{background:var(--soft);border:1px solid var(--line);border-radius:8px;padding:1rem;overflow-x:auto;font-size:14px}
"""


def html_page(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """One self-contained page, light or dark as the reader's system is; headings with their bodies, already HTML."""
    body = "\n".join(f"<section><h2>{html.escape(name)}</h2>\n{text}</section>" for name, text in sections.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n{body}\n</main>\n</body>\n</html>\n'
    )
