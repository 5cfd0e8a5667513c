"""What metrics and benchmarks share: prompts, folders of pictures, scores."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image

from micro_diffusion.data.records import Record, Rejected, decode_image
from micro_diffusion.data.sources.tables import PICTURES
from micro_diffusion.runtime.files import UserError, user_error

PROMPTS = "prompts.jsonl"


class Prompt(NamedTuple):
    """One picture to draw."""

    text: str
    seed: int  # of its noise, whatever machine or rank draws it
    truth: Mapping[str, Any] = {}  # what a benchmark needs to score it; JSON


class PictureFolder:
    """RGB pictures, decoded when asked for: what `draw_prompts` wrote, in its order, or any folder's, sorted by name.

    Captions of any other folder are in NAME.txt beside NAME.png; `prompts` is None unless every picture has one.
    Raises UserError for a folder without pictures or of which some are not drawn yet, and for a file that is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.prompts = Path(path), read_prompts(Path(path))
        if self.prompts is not None:
            self.files = [self.path / file_name(index) for index in range(len(self.prompts))]
            if missing := sum(not file.is_file() for file in self.files):
                raise UserError(f"{missing} of {len(self.files)} pictures in {path} are not drawn: draw them first.")
            return
        found = sorted(self.path.rglob("*")) if self.path.is_dir() else []
        self.files = [file for file in found if file.suffix.lower() in PICTURES and not file.name.startswith(".")]
        if not self.files:
            raise UserError(f"There is no picture in {path}; give a folder that holds some.")
        texts = [file.with_suffix(".txt") for file in self.files]
        if all(text.is_file() for text in texts):
            self.prompts = [Prompt(text.read_text(encoding="utf-8").strip(), i) for i, text in enumerate(texts)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        chosen = self.files[index]
        return [self._decode(file) for file in chosen] if isinstance(index, slice) else self._decode(chosen)

    # no Sequence: where types are checked at run time, items of one are looked at, and here that decodes a picture
    def __iter__(self) -> Iterator[Image.Image]:
        return map(self._decode, self.files)

    def batches(self, size: int) -> Iterator[list[Image.Image]]:
        """The pictures in order, at most `size` at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def one_size(self) -> tuple[int, int]:
        """Width and height of all pictures; UserError names the first of another size. Decodes one."""
        first = self[0].size
        for file in self.files:
            try:
                with Image.open(file) as picture:
                    size = picture.size
            except OSError:
                size = self._decode(file).size  # says what is wrong with it
            if size != first:
                sizes = f"{size[0]} x {size[1]}, those before it are {first[0]} x {first[1]}"
                raise UserError(f"{file} is {sizes}: this needs pictures of one size.")
        return first

    def _decode(self, file: Path) -> Image.Image:
        with user_error(f"{file} is no picture ({{}}); draw or copy it again.", Rejected):
            return decode_image(Record(file.name, file, (), self.path.name))


@dataclass(frozen=True)
class Scores:
    """What a metric or a benchmark says of a folder."""

    protocol: str  # a sentence to stand beside the numbers: what measured, weights and their sha256, resizing, counts
    numbers: Mapping[str, float]  # in the order in which they are to be shown
    each: Mapping[str, Sequence[float]] = field(default_factory=dict)  # by picture, higher is better
    warnings: Sequence[str] = ()  # why a number is not comparable
    notes: Sequence[str] = ()  # by picture, for the report
    true: Sequence[Image.Image] = ()  # by picture, to stand beside it in the report


class Benchmark(Protocol):
    """Prompts, and what the pictures drawn for them score."""

    def prompts(self) -> list[Prompt]: ...

    def score(self, pictures: PictureFolder, device: torch.device) -> Scores: ...


def file_name(index: int) -> str:
    """Of the picture that was drawn for the prompt of that index."""
    return f"{index:06d}.png"


def read_prompts(folder: Path) -> list[Prompt] | None:
    """The prompts of a folder that `draw_prompts` wrote; None for any other."""
    if not (folder / PROMPTS).is_file():
        return None
    lines = (folder / PROMPTS).read_text(encoding="utf-8").splitlines()
    return [Prompt(**json.loads(line)) for line in lines]


def prompts_text(prompts: Sequence[Prompt]) -> str:
    """The content of `PROMPTS`: a line of JSON a prompt."""
    return "".join(json.dumps(prompt._asdict()) + "\n" for prompt in prompts)
