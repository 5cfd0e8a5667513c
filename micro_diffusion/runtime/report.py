"""Pictures with their prompts under them, curves, and pages that need nothing else: no network, no plotting library."""

import base64
import contextlib
import html
import io
import itertools
import math
import string
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import micro_diffusion.embedded

TEMPLATE = Path(micro_diffusion.embedded.__path__[0], "report.html")
PAPER, INK, FAINT = "#ffffff", "#1f2430", "#6b7280"
CELL, GAP, FONT_SIZE, LINE, MAX_LINES, MAX_POINTS = 128, 10, 12, 15.6, 4, 300
COLOURS = ("#2f6fde", "#e0632f", "#2a9d63", "#a855c7", "#c99a00", "#d6457f")
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")

Images = Sequence[Image.Image]
Points = Sequence[tuple[float, float]]
Marks = Sequence[tuple[float, str]]


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


def _text(words: str, width: int, colour: str = INK) -> Image.Image:
    """A strip of that width with the words in its middle, on as many lines as they need and `MAX_LINES` at most.

    Pillow's own font draws ASCII only: accents are folded away, other scripts use a system font if there is one.
    """
    words = unicodedata.normalize("NFKD", words.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}))
    words = " ".join("".join(c for c in words if not unicodedata.combining(c)).split())
    font: Any = ImageFont.load_default(FONT_SIZE)
    for name in WIDE_FONTS if not words.isascii() else ():
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(name, FONT_SIZE)
            break
    for room in range(max(width // 3, 8), 7, -1):  # in characters: the largest number at which every line fits
        lines = textwrap.wrap(words, room, max_lines=MAX_LINES, placeholder=" ...") or [""]
        if all(font.getlength(line) <= width for line in lines):
            break
    strip = Image.new("RGB", (width, math.ceil(len(lines) * LINE)), PAPER)
    for i, line in enumerate(lines):
        ImageDraw.Draw(strip).text((width / 2, i * LINE), line, fill=colour, font=font, anchor="ma")
    return strip


def _fit(picture: Image.Image, height: int) -> Image.Image:
    width = round(picture.width * height / picture.height)
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _sheet(rows: Sequence[Images], *, gap: int, margin: int = 0, paper: str = PAPER) -> Image.Image:
    """Rows of cells, `gap` pixels apart; each at the top of its row and in the middle of its column."""
    widths = [max(cell.width for cell in column if cell) for column in itertools.zip_longest(*rows)]
    heights = [max(cell.height for cell in row) for row in rows]
    size = [2 * margin + sum(sides) + gap * (len(sides) - 1) for sides in (widths, heights)]
    sheet, top = Image.new("RGB", (size[0], size[1]), paper), margin
    for row, height in zip(rows, heights, strict=True):
        left = margin
        for cell, width in zip(row, widths, strict=False):  # the last row may be short
            sheet.paste(cell, (left + (width - cell.width) // 2, top))
            left += width + gap
        top += height + gap
    return sheet


def grid(images: Images, captions: Sequence[str], *, columns: int | None = None, size: int = CELL) -> Image.Image:
    """Pictures in reading order, each scaled to `size` pixels of height, with its caption wrapped under it."""
    if not images or len(images) != len(captions):
        raise ValueError(f"a grid needs as many captions as pictures, at least one: {len(images)}, {len(captions)}")
    columns = min(columns or math.ceil(math.sqrt(len(images) * 1.5)), len(images))
    fitted = [_fit(image, size) for image in images]
    width = max(picture.width for picture in fitted)
    cells = [_sheet([[image], [_text(words, width)]], gap=4) for image, words in zip(fitted, captions, strict=True)]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    return _sheet(rows, gap=GAP, margin=GAP)


def pairs_grid(drawn: Images, true: Images, prompts: Sequence[str], *, columns: int = 5, size: int = 96) -> Image.Image:
    """Each cell holds the drawn picture on the left and the true one on the right, the prompt under both."""
    pairs = [_sheet([[_fit(a, size), _fit(b, size)]], gap=2, paper="#d7dae0") for a, b in zip(drawn, true, strict=True)]
    body = grid(pairs, prompts, columns=columns, size=size)
    head = _text("in each pair: drawn by the model (left), true picture (right)", body.width - 2 * GAP, FAINT)
    return _sheet([[ImageOps.expand(head, (0, GAP, 0, 0), PAPER)], [body]], gap=0)


def table_grid(rows: Sequence[Images], row_labels: Sequence[str], column_labels: Sequence[str]) -> Image.Image:
    """Rows by columns of pictures: labels on the left and on top."""
    cells = [[Image.new("RGB", (1, 1), PAPER), *(_text(label, CELL) for label in column_labels)]]
    for label, pictures_of_row in zip(row_labels, rows, strict=True):
        left = _text(label, CELL - 2 * GAP)
        middle = (0, max(0, CELL - left.height) // 2, 0, 0)
        cells.append([ImageOps.expand(left, middle, PAPER), *(_fit(picture, CELL) for picture in pictures_of_row)])
    return _sheet(cells, gap=GAP, margin=GAP)


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
        round_values = [digit * 10.0**power for power in range(-30, 31) for digit in (1, 2, 5)]
        if self.log:
            marks = [value for value in round_values if self.low <= value <= self.high]
            return marks[:: 1 if len(marks) < 9 else 3] if len(marks) > 1 else [self.low, self.high]
        step = next(value for value in round_values if 5 * value >= self.high - self.low)
        return [i * step for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def _axis(values: Sequence[float], start: float, stop: float, *, log: bool = False) -> Axis:
    low, high = min(values), max(values)
    return Axis(low, high if high > low else low + abs(low or 1), start, stop, log)  # one value still gets a range


def _number(value: float) -> str:
    for limit, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / unit:.3g} {letter}"
    return f"{value:.4g}"


CURVE_STYLE = """<style>.curve{font:12px system-ui,sans-serif;background:#fff}.curve text{fill:#1f2430}
.curve .axis{stroke:#8a90a0;stroke-opacity:.35}@media(prefers-color-scheme:dark){
.curve{background:#171a21}.curve text{fill:#e4e7ee}}</style>"""


def loss_curve(logs: Mapping[str, Sequence[Mapping[str, Any]]], *, marks: Marks = ()) -> str:
    """The training loss that logs tell of, over images seen."""
    points = {name: [(row["images"], row["loss"]) for row in rows if row.get("loss")] for name, rows in logs.items()}
    return curve_svg(points, title="Training loss", x_label="images seen", y_label="loss (log scale)",
                     log_y=True, marks=marks)  # fmt: skip


def curve_svg(series: Mapping[str, Points], *, title: str, x_label: str, y_label: str,
              log_y: bool = False, marks: Marks = ()) -> str:  # fmt: skip
    """Lines over common axes as one SVG; `marks` are labelled upright lines such as the starts of stages.

    A line has at most `MAX_POINTS` points, each the mean of its neighbours, and a single one is drawn as a dot.
    """
    width, height, left, right, top, bottom = 760, 400, 64, 744, 84, 352
    lines: dict[str, list[list[float]]] = {}
    for name, values in series.items():
        if finite := [(x, y) for x, y in values if math.isfinite(y) and (y > 0 or not log_y)]:
            parts = np.array_split(np.array(finite), min(len(finite), MAX_POINTS))
            lines[name] = [part.mean(0).tolist() for part in parts] * (2 if len(finite) == 1 else 1)
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
        path = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in line_points)
        out.append(f'<polyline {colour} fill="none" stroke-width="1.8" stroke-linecap="round" points="{path}"/>')
        out += [line(f"M{legend:.0f} 42h18", f'{colour} stroke-width="3"'), text(legend + 24, 46, name)]
        legend += 48 + 7 * len(name)
    return "\n".join([*out, "</svg>"])


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def figure(picture: Image.Image | str, *, alt: str, caption: str) -> str:
    """A picture as a data URI, or an SVG text as it is, with its caption; `alt` says what is to be seen."""
    alt = html.escape(alt)
    if isinstance(picture, str):
        inner = f'<div role="group" aria-label="{alt}">{picture}</div>'
    else:
        source = f"data:image/png;base64,{base64.b64encode(png_bytes(picture)).decode()}"
        inner = f'<img alt="{alt}" width="{picture.width}" height="{picture.height}" src="{source}">'
    return f'<figure><div class="wide">{inner}</div><figcaption>{html.escape(caption)}</figcaption></figure>'


def facts(rows: Mapping[str, object]) -> str:
    """A two-column table of names and values."""
    return table((), {name: [value] for name, value in rows.items()})


def table(heads: Sequence[str], rows: Mapping[str, Sequence[object]]) -> str:
    """A table of values by their names, with a head over each column if there are any."""
    top = [f"<tr><td></td>{''.join(f'<th>{html.escape(head)}</th>' for head in heads)}</tr>"] if heads else []
    for name, values in rows.items():
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
        top.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    return f'<div class="wide"><table>{"".join(top)}</table></div>'


def commands(lines: Sequence[str]) -> str:
    """Command lines to copy."""
    return f"<pre><code>{html.escape(chr(10).join(lines))}</code></pre>"


def html_page(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """One self-contained page, light or dark as the reader's system is; headings with their bodies, already HTML."""
    body = "\n".join(f"<section><h2>{html.escape(name)}</h2>\n{text}</section>" for name, text in sections.items())
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), lead=html.escape(lead), body=body)
