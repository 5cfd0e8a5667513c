"""`micro-diffusion generate`: prompts become PNG files and a grid."""

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from micro_diffusion.cli.prepare import Device
from micro_diffusion.runtime.files import UserError, write_atomic

if TYPE_CHECKING:
    from PIL import Image
    from rich.progress import Progress

    from micro_diffusion.models.model import LatentDiffusion

GRID_LIMIT = 400  # pictures in grid.png


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a model draws."""

    steps: int = 30
    """Sampling steps."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these noise levels, a lower and a higher one, as in 0.3 5; faster, and often better."""
    sampler: str = "heun"
    """heun, euler or dpmpp_2m."""
    autoencoder: str | None = None
    """Another autoencoder than the model names: embedded, a folder in diffusers format, or a name on the hub."""
    text_encoder: str | None = None
    """Another text encoder than the model names; see docs/models.md."""
    batch_size: int = 16
    """Pictures drawn at once: what memory has to hold."""
    precision: Literal["bf16", "float32"] = "bf16"
    """Of the transformer on CUDA; elsewhere it is float32."""
    compile: bool = False
    """Compile the transformer: a minute or two first, then faster; for many pictures."""
    device: Device = "auto"

    def load(self, name: str) -> "LatentDiffusion":
        """The model of that name, ready to draw."""
        from micro_diffusion.models.model import LatentDiffusion
        from micro_diffusion.runtime.device import pick_device

        model = LatentDiffusion.from_checkpoint(name, device=pick_device(self.device), autoencoder=self.autoencoder,
                                                text_encoder=self.text_encoder, precision=self.precision)  # fmt: skip
        if self.compile:
            model.compile_transformer()
        return model


@dataclass(frozen=True)
class Generate(Sampling):
    """Draw pictures for prompts: one PNG each, and grid.png with the prompts under the pictures."""

    model: Annotated[Path, arg(metavar="NAME_OR_PATH", aliases=("--checkpoint",))] = Path("embedded")
    """A run, a model or pipeline folder, a .pt or .safetensors file, a released model's name, or a name on the hub;
    embedded: the small one that ships with the package."""
    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="[PROMPT ...]")] = ()
    """What to draw."""
    prompts_file: Path | None = None
    """A text file, one prompt a line."""
    template: str | None = None
    """Prompts with gaps, such as "{}, in {} style"; each {} takes the words of one --fill."""
    fill: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="WORDS")] = ()
    """Words for one gap of the template, as in "a cat|a dog"; two fills make a table of rows and columns."""
    out: Path = Path("pictures")
    """Folder for the pictures."""
    seed: int = 0
    """The noise that a picture starts from; a prompt's second picture has the next seed."""
    per_prompt: int = 1
    """Pictures of each prompt."""
    guidance: float = 3.0
    """Guidance scale; 1 is none."""

    def __call__(self) -> None:
        fills = [[word.strip() for word in fill.split("|")] for fill in self.fill]
        prompts = self.all_prompts(fills)
        if self.steps < 1 or self.per_prompt < 1 or self.batch_size < 1:
            raise UserError("--steps, --per-prompt and --batch-size must be at least 1.")
        from rich.console import Console
        from rich.progress import Progress

        from micro_diffusion.runtime.report import grid, png_bytes, table_grid

        model = self.load(self.model.as_posix())
        self.out.mkdir(parents=True, exist_ok=True)
        shown: list[Image.Image] = []
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            for number, (prompt, seed, picture) in enumerate(self.draw(model, prompts, bar), 1):
                notes = {"prompt": prompt, "seed": str(seed), "settings": self.settings}
                write_atomic(self.out / file_name(number, prompt), png_bytes(picture, notes))
                shown += [picture] if len(shown) < GRID_LIMIT else []
        captions = [prompt for prompt in prompts for _ in range(self.per_prompt)][:GRID_LIMIT]
        if len(fills) == 2 and self.per_prompt == 1 and len(shown) == len(prompts) == len(fills[0]) * len(fills[1]):
            columns = len(fills[1])
            sheet = table_grid([shown[i : i + columns] for i in range(0, len(shown), columns)], *fills)
        else:
            sheet = grid(shown, captions)
        write_atomic(self.out / "grid.png", png_bytes(sheet))
        print(f"{len(prompts) * self.per_prompt} pictures and grid.png are in {self.out}")

    def draw(
        self, model: "LatentDiffusion", prompts: Sequence[str], bar: "Progress"
    ) -> "Iterator[tuple[str, int, Image.Image]]":
        """Prompt, seed and picture, in order; a picture does not depend on what is drawn with it.

        The bar counts the sampling steps of all pictures.
        """
        import torch

        from micro_diffusion.runtime.report import pictures

        def on_step(step: int, level: float, state: torch.Tensor) -> torch.Tensor:
            bar.advance(task, len(state))
            return state

        wanted = [(prompt, self.seed + copy) for prompt in prompts for copy in range(self.per_prompt)]
        task, at_once = bar.add_task("drawing", total=len(wanted) * self.steps), min(self.batch_size, len(wanted))
        for start in range(0, len(wanted), at_once):
            some, seeds = zip(*wanted[start : start + at_once], strict=True)
            try:
                images = model.generate(some, num_inference_steps=self.steps, guidance_scale=self.guidance,
                                        guidance_interval=self.guidance_interval, sampler=self.sampler, seed=seeds,
                                        batch_size=at_once, on_step=on_step)  # fmt: skip
            except torch.OutOfMemoryError as error:
                raise UserError(f"{len(some)} pictures at once do not fit into memory; lower --batch-size.") from error
            yield from zip(some, seeds, pictures(images), strict=True)

    @property
    def settings(self) -> str:
        """What else decides a picture, for the PNG's metadata."""
        within = " from {:g} to {:g}".format(*self.guidance_interval) if self.guidance_interval else ""
        return f"model {self.model}, {self.sampler}, {self.steps} steps, guidance {self.guidance:g}{within}"

    def all_prompts(self, fills: Sequence[Sequence[str]]) -> list[str]:
        """Prompts from the command line, the file and the template; UserError when there is none."""
        prompts = list(self.prompts)
        if self.prompts_file:
            if not self.prompts_file.is_file():
                raise UserError(f"There is no file of prompts {self.prompts_file}.")
            prompts += self.prompts_file.read_text(encoding="utf-8").splitlines()
        gaps = (self.template or "").count("{}")
        if gaps != len(fills):
            raise UserError(f"--template has {gaps} gaps {{}} but there are {len(fills)} --fill; give one for each.")
        if self.template:
            pieces = self.template.split("{}")
            for words in itertools.product(*fills):
                prompts.append("".join(itertools.chain(*zip(pieces, [*words, ""], strict=True))))
        prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
        if not prompts:
            raise UserError("There is nothing to draw: give a prompt, --prompts-file or --template with --fill.")
        return prompts


def file_name(number: int, prompt: str) -> str:
    """`001-a-red-apple-in-twemoji-style.png`: safe on every system."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain)[:60].strip("-")
    return f"{number:03d}-{words}.png" if words else f"{number:03d}.png"
