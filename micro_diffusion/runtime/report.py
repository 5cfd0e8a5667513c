"""Pictures with their prompts under them, curves, and pages that need nothing else."""

import base64
import contextlib
import html
import io
import itertools
import math
import re
import string
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
STYLE: Any = {"axes.spines.top": 0, "axes.spines.right": 0, "svg.fonttype": "none", "text.parse_math": False}
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
    from matplotlib import rc_context, ticker
    from matplotlib.figure import Figure

    # without salt no two files are the same; names of marks slant below the title
    with rc_context(STYLE | {"svg.hashsalt": title, "axes.titlepad": 50 if marks else 6}):
        chart, out = Figure(figsize=(7.6, 4.0), layout="constrained"), io.StringIO()
        axes = chart.add_subplot(title=title, xlabel=x_label, ylabel=y_label, yscale="log" if log_y else "linear")
        for name, values in series.items():
            if finite := [(x, y) for x, y in values if math.isfinite(y) and (y > 0 or not log_y)]:
                parts = np.array_split(np.array(finite), min(len(finite), MAX_POINTS))
                x, y = np.transpose([part.mean(0) for part in parts])
                axes.plot(x, y, label=f" {name}", marker="o" if len(finite) == 1 else "")
        if not axes.lines:
            raise ValueError("a curve needs at least one finite point")
        chart.legend(loc="outside lower center", ncols=4, frameon=False)
        for at, name in marks:
            axes.axvline(at, color=FAINT, linewidth=0.5)
            axes.text(at, 1.01, name, transform=axes.get_xaxis_transform(), rotation=30, rotation_mode="anchor")
        axes.xaxis.set_major_formatter(ticker.EngFormatter())
        if log_y:
            axes.yaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 3, 5)), major_formatter="{x:g}",
                           minor_formatter=ticker.NullFormatter())  # fmt: skip
        chart.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    # names of groups, which nothing refers to, would come once for each curve of a page
    return re.sub('<g id="[^"]*"', "<g", '<svg class="curve" role="img"' + out.getvalue().partition("<svg")[2])


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
