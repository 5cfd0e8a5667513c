"""`micro-diffusion prepare`: pictures with captions become a latent store."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from micro_diffusion.runtime.files import UserError

if TYPE_CHECKING:
    from micro_diffusion.data.records import Record
    from micro_diffusion.data.store import StoreInfo
    from micro_diffusion.models.autoencoders import Autoencoder
    from micro_diffusion.models.text_encoders import TextEncoder


@dataclass(frozen=True)
class Prepare:
    """Encode pictures and captions into a latent store. Killed and run again, it does only what is missing."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """emoji (the drawings that come with the package), or a folder of pictures, each with its caption in name.txt."""
    out: Annotated[Path, arg(metavar="STORE")]
    """Folder of the store; a store that is there gains what it lacks."""
    resolutions: tuple[int, ...] = (64, 128)
    """Pixels of the shorter edge, one set of latents each."""
    subset: str | None = None
    """emoji: only a named subset of the training split, such as quickstart."""
    augment: int = 0
    """emoji: so many varied copies of each drawing besides."""
    table: Path | None = None
    """Folder: captions from this CSV, JSONL or Parquet table."""
    validation: float | None = None
    """Folder: the part of the pictures that training never sees. Default 0.02."""
    autoencoder: str = "embedded"
    """embedded, a folder in diffusers format, or a name on the hub."""
    text_encoder: str = "embedded"
    """embedded, a folder in transformers format, or a name on the hub."""
    caption_rule: str = "light"
    """How captions are cleaned: none or light."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    batch_size: int = 32
    """Pictures encoded at once."""
    rows_per_part: int = 4096
    """Records in a part, the unit of restart."""

    def records(self) -> "Iterator[Record]":
        """The source's records; UserError for a source that is not there or a setting that it has no use for."""
        from micro_diffusion.data.sources import SOURCES

        folder = {"--table": self.table, "--validation": self.validation}
        emoji = {"--subset": self.subset, "--augment": self.augment or None}
        named = self.source in SOURCES and self.source != "folder"
        for option, value in (folder if named else emoji).items():
            if value is not None:
                raise UserError(f"{option} does nothing with the source {self.source!r}; leave it out.")
        if named:
            return SOURCES[self.source](subset=self.subset, augment=self.augment)
        if not Path(self.source).is_dir():
            names = ", ".join(name for name in SOURCES if name != "folder")
            raise UserError(f"There is no folder {self.source!r}, and no source of that name (there is: {names}).")
        validation = 0.02 if self.validation is None else self.validation
        return SOURCES["folder"](Path(self.source), table=self.table, validation=validation)

    def __call__(self) -> None:
        from micro_diffusion.data.prepare import prepare
        from micro_diffusion.models.autoencoders import load_autoencoder
        from micro_diffusion.models.text_encoders import load_text_encoder
        from micro_diffusion.runtime.device import pick_device

        records = self.records()
        device = pick_device(self.device)
        autoencoder = load_autoencoder(self.autoencoder, device=device)
        text_encoder = load_text_encoder(self.text_encoder, device=device)
        for resolution in self.resolutions:
            if resolution < 1 or resolution % autoencoder.downscale:
                raise UserError(
                    f"--resolutions: {resolution} is not a multiple of the autoencoder's {autoencoder.downscale}."
                )
        with counter() as progress:
            report = prepare(
                records,
                self.out,
                resolutions=self.resolutions,
                encode_images=autoencoder.encode,
                encode_text=text_encoder.encode,
                info=store_info(autoencoder, text_encoder, caption_rule=self.caption_rule, source=self.source),
                rows_per_part=self.rows_per_part,
                batch_size=self.batch_size,
                progress=progress,
            )
        print(
            f"{self.out}: {report.rows:,} pictures in {report.parts} parts, {report.parts_written} of them written now"
        )
        for reason, count in report.rejected.items():
            print(f"  left out: {count:,} ({reason})")
        if report.rejected:
            print(f"  see {report.rejects_file}")


def store_info(
    autoencoder: "Autoencoder", text_encoder: "TextEncoder", *, caption_rule: str, source: str
) -> "StoreInfo":
    """What the store's head says of its encoders."""
    from micro_diffusion.data.store import AutoencoderInfo, StoreInfo, TextInfo

    latents = AutoencoderInfo(
        name=autoencoder.name,
        sha256=autoencoder.sha256,
        scaling_factor=autoencoder.scaling_factor,
        shift_factor=autoencoder.shift_factor,
        channels=autoencoder.channels,
        downscale=autoencoder.downscale,
    )
    text = TextInfo(
        text_encoder.sha256, text_encoder.width, text_encoder.max_length, text_mask=text_encoder.text_mask_policy
    )
    return StoreInfo(latents, {text_encoder.name: text}, caption_rule=caption_rule, source=source)


@contextlib.contextmanager
def counter() -> Iterator[Callable[[int, int], None]]:
    """A line that tells how many records were seen and rejected; shown on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting")
        started = time.monotonic()

        def show(seen: int, rejected: int) -> None:
            speed = seen / max(time.monotonic() - started, 1e-9)
            bar.update(task, description=f"{seen:,} pictures, {rejected:,} left out, {speed:,.0f}/s")

        yield show
