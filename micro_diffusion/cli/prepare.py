"""`micro-diffusion prepare`: pictures with captions become a latent store."""

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from micro_diffusion.runtime.files import UserError

if TYPE_CHECKING:
    import torch

    from micro_diffusion.data.prepare import PrepareReport
    from micro_diffusion.data.records import Record
    from micro_diffusion.data.store import StoreInfo
    from micro_diffusion.data.stream import Stream
    from micro_diffusion.models.autoencoders import Autoencoder
    from micro_diffusion.models.text_encoders import TextEncoder
    from micro_diffusion.runtime.distributed import World
    from micro_diffusion.training.config import Recipe

AutoencoderName = Annotated[str, arg(help="embedded, a folder in diffusers format, or a name on the hub.")]
Device = Annotated[str, arg(help="auto, cpu, cuda or mps.")]
FOR_ALL = ("min_size", "max_aspect", "caption_rule")  # whatever the source
PATIENCE = 30 * 86400.0  # seconds that ranks, which need not finish together, wait for each other


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What is taken of a source, and how its captions are cleaned."""

    subset: str | None = None
    """emoji: only a named subset of the training split, such as quickstart."""
    augment: int | None = None
    """emoji: so many varied copies of each drawing besides."""
    count: int | None = None
    """emoji-scenes: so many scenes. Default: 100000."""
    table: str | None = None
    """Folder, archive: captions from this CSV, JSONL or Parquet table."""
    validation: float | None = None
    """The part of the pictures that training never sees, where a source has no such split. Default 0.02."""
    fraction: float | None = None
    """Only the first share of the data, such as 0.01."""
    downloads: Path | None = None
    """Where downloaded files are kept. Default: downloads."""
    min_size: int = 0
    """Leave out pictures with a shorter edge of fewer pixels."""
    max_aspect: float = 0.0
    """Leave out pictures that are longer than this to 1."""
    caption_rule: Literal["none", "light", "first-line", "paper"] = "light"
    """How captions are cleaned."""

    @property
    def chosen(self) -> dict[str, object]:
        """The options that are not as they come, by name."""
        options = vars(SourceOptions()).items()
        return {name: getattr(self, name) for name, default in options if getattr(self, name) != default}

    def open(self, source: str) -> "Iterator[Record]":
        """The source's records; UserError for a source that is not there or an option that it has no use for."""
        from micro_diffusion.data.records import hold_out
        from micro_diffusion.data.sources import SOURCES

        name, _, address = source.partition(":")
        if name not in SOURCES or (name == "folder" and not address):
            name, address = "folder", source
        own_split, takes = name in ("emoji", "coco"), inspect.signature(SOURCES[name]).parameters
        general = FOR_ALL if own_split else (*FOR_ALL, "validation")
        options = {name: value for name, value in self.chosen.items() if name not in general}
        if useless := [option for option in options if option not in takes]:
            raise UserError(f"--{useless[0]} does nothing with the source {source!r}; leave it out.")
        if name == "folder" and not Path(address).is_dir():
            raise UserError(f"There is no folder {address!r}, and no source of that name: {', '.join(SOURCES)}.")
        needed = [option for option, value in takes.items() if value.default is value.empty]
        if missing := set(needed) - options.keys() - ({"address"} if address else set()):
            hint = f"write {name}:ADDRESS" if "address" in missing else f"add --{missing.pop()}"
            raise UserError(f"The source {name!r} needs more: {hint}.")
        records = SOURCES[name](*([address] if address else []), **options)
        return records if own_split else hold_out(records, 0.02 if self.validation is None else self.validation)

    def info(self, source: str, autoencoder: "Autoencoder", text_encoder: "TextEncoder") -> "StoreInfo":
        """What a store's head says of the source and the encoders."""
        from micro_diffusion.data.store import AutoencoderInfo, StoreInfo, TextInfo

        latents = AutoencoderInfo(autoencoder.name, autoencoder.sha256, autoencoder.scaling_factor,
                                  autoencoder.shift_factor, autoencoder.channels, autoencoder.downscale)  # fmt: skip
        text = TextInfo(text_encoder.sha256, text_encoder.width, text_encoder.max_length, text_encoder.text_mask_policy)
        return StoreInfo(latents, {text_encoder.name: text}, source=source, caption_rule=self.caption_rule,
                         min_size=self.min_size, max_aspect=self.max_aspect)  # fmt: skip

    def stream(self, source: str, recipe: "Recipe", autoencoder: "Autoencoder", text_encoder: "TextEncoder", *,
               run: Path, device: "torch.device") -> "Stream":  # fmt: skip
        """The source's pictures, to be encoded while the first stage trains; other stages replace the resolution."""
        from micro_diffusion.data.stream import Stream

        told = " ".join([source, *(f"--{name} {value}" for name, value in self.chosen.items() if name != "downloads")])
        return Stream(partial(self.open, source), recipe.stages[0].resolution, autoencoder.encode, text_encoder.encode,
                      self.info(told, autoencoder, text_encoder), recipe.seed, run / "source.jsonl",
                      text_length=recipe.text_length, device=device)  # fmt: skip


@dataclass(frozen=True)
class Prepare(SourceOptions):
    """Encode pictures and captions into a latent store. Killed and run again, it does only what is missing."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """A folder of pictures, each with its caption in name.txt; or NAME or NAME:ADDRESS as in docs/data.md: emoji (the
    drawings that come with the package), webdataset:a-{000..199}.tar, table:x.parquet, archive:x.zip, hub:OWNER/NAME,
    mds:FOLDER, cc12m, sa1b:LINKS.txt, journeydb, diffusiondb, textcaps, coco."""
    out: Annotated[Path, arg(metavar="STORE")]
    """Folder of the store; a store that is there gains what it lacks."""
    resolutions: tuple[int, ...] = (64, 128)
    """Pixels of the shorter edge, one set of latents each."""
    posterior: bool = False
    """Keep mean and deviation of the latents: training draws anew at each visit."""
    text_dtype: Literal["float16", "int8"] = "float16"
    """int8: integers with a scale for each token, half the size."""
    max_rejected: float = 0.05
    """Stop when a larger share of the records is damaged."""
    autoencoder: AutoencoderName = "embedded"
    precision: Literal["float32", "bf16"] = "float32"
    """Of the autoencoder: bf16 is 1.6 times as fast on an H100."""
    text_encoder: str = "embedded"
    """embedded, a folder in transformers format, or a name on the hub."""
    device: Device = "auto"
    batch_size: int = 32
    """Pictures encoded at once."""
    rows_per_part: int = 4096
    """Records in a part, the unit of restart."""
    engine: Literal["local", "ray"] = "local"
    """ray: on a Ray cluster, whose machines all see source and store. Under torchrun: on all GPUs of this machine."""

    def __call__(self) -> None:
        from torch import cuda

        from micro_diffusion.data.prepare import REJECTS_FILE, on_ray
        from micro_diffusion.runtime.distributed import join

        with join("auto", timeout=PATIENCE) as world:
            ray = partial(on_ray, self.work, gpus=float(cuda.is_available()))
            report = self.work(world, ray if self.engine == "ray" else None)
        if world.rank:
            return
        written = f"{report.parts_written} of them written now"
        print(f"{self.out}: {report.rows:,} pictures in {report.parts} parts, {written}")
        for reason, count in report.rejected.items():
            print(f"  left out: {count:,} ({reason})")
        if report.rejected:
            print(f"  see {self.out / REJECTS_FILE}")
        for reason, count in report.filtered.items():
            print(f"  not wanted: {count:,} ({reason})")

    def work(self, world: "World", helpers: "Callable[[], None] | None" = None) -> "PrepareReport":
        """Load the encoders and make the parts of this rank."""
        import torch

        from micro_diffusion.data.prepare import prepare
        from micro_diffusion.models.autoencoders import load_autoencoder
        from micro_diffusion.models.text_encoders import load_text_encoder
        from micro_diffusion.runtime.device import pick_device

        records, device = self.open(self.source), pick_device(self.device)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        autoencoder = load_autoencoder(self.autoencoder, device=device, dtype=dtype)
        text_encoder = load_text_encoder(self.text_encoder, device=device)
        info = self.info(self.source, autoencoder, text_encoder)
        info = replace(info, posterior=self.posterior, dtypes={**info.dtypes, "text": self.text_dtype})
        return prepare(records, self.out, resolutions=self.resolutions, encode_images=autoencoder.encode,
                       encode_text=text_encoder.encode, info=info, rows_per_part=self.rows_per_part,
                       batch_size=self.batch_size, max_rejected=self.max_rejected, device=device, world=world,
                       helpers=helpers, progress=counter())  # fmt: skip


def counter() -> "Callable[[int, int], None] | None":
    """Tells how many records were seen and rejected, in a line that is written over; on a terminal only."""
    started = time.monotonic()

    def show(seen: int, rejected: int) -> None:
        speed = seen / max(time.monotonic() - started, 1e-9)
        print(f"\r{seen:,} pictures, {rejected:,} left out, {speed:,.0f}/s ", end="", file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else None
