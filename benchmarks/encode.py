"""Images a second that `prepare` encodes, and what training waits for its data; random weights; JSON on stdout.

    python -m benchmarks.encode                       one GPU: an autoencoder of SDXL's size, a text tower of H/14's
    python -m benchmarks.encode --tiny                the same steps with toys on a CPU

Pictures are JPEGs of noise-like texture, decoded in threads as `prepare` does it. Then loader and feed serve a device
that is busy at a fixed rate (--images-per-second) from a store of the paper's shapes (256 px, 77 tokens of 1,024), with
float16 and with int8 states, and the share of the steps spent waiting is told. Imports torch, numpy, pillow, pyarrow,
filelock, jaxtyping and, for the autoencoder, diffusers; about a minute on one H100.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.loader import WIDTH, write_store
from micro_diffusion.data.loader import Loader
from micro_diffusion.data.prepare import prepare
from micro_diffusion.data.records import Caption, Record
from micro_diffusion.data.store import AutoencoderInfo, StoreInfo, TextInfo
from micro_diffusion.models.autoencoders import Autoencoder
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.feed import feed

POSITIONS, VOCABULARY = 77, 49_408
PATCHES = 16 * 16  # of a picture of 256 px
WARM = 3  # steps before waiting counts


class TextTower(nn.Module):
    """A transformer of CLIP's shape: width, depth, heads of 64, all positions after the final LayerNorm."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.tokens, self.width = nn.Embedding(VOCABULARY, width), width
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        device = self.tokens.weight.device
        states = self.blocks(self.tokens(torch.randint(VOCABULARY, (len(captions), POSITIONS), device=device)))
        return states, torch.ones(len(captions), POSITIONS, dtype=torch.bool)


def make_autoencoder(widths: tuple[int, ...], layers: int) -> Autoencoder:
    """Of SDXL's kind, with random weights."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        latent_channels=4, block_out_channels=widths, layers_per_block=layers,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=min(32, widths[0]), scaling_factor=0.13025,
    )  # fmt: skip
    return Autoencoder(model, name="random", sha256="0")


def records(count: int, size: int) -> Iterator[Record]:
    """JPEGs that cost what photographs cost to decode."""
    draw, pictures = np.random.default_rng(0), []
    for _ in range(16):
        rough = Image.fromarray(draw.integers(0, 256, (size // 8, size // 8, 3), np.uint8))
        buffer = io.BytesIO()
        rough.resize((size, size * 3 // 4), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    for number in range(count):
        yield Record(f"{number:08}", pictures[number % 16], (Caption("a caption of some words"),), "random")


def encode_speed(
    folder: Path, vae: Autoencoder, text: TextTower, *, device: torch.device, count: int, size: int, batch_size: int,
    resolutions: tuple[int, ...],
) -> dict[str, float]:  # fmt: skip
    """Images a second of the whole of `prepare`, after a warm-up."""
    info = StoreInfo(
        AutoencoderInfo("random", "0", vae.scaling_factor, 0.0, vae.channels, vae.downscale),
        {"random": TextInfo("0", text.width, POSITIONS, "none")},
    )
    seconds = {}
    for name, number in (("warm", batch_size), ("timed", count)):
        start = time.perf_counter()
        prepare(
            records(number, size), folder / name, resolutions=resolutions, encode_images=vae.encode,
            encode_text=text.encode, info=info, batch_size=batch_size, rows_per_part=max(256, count // 8),
            device=device,
        )  # fmt: skip
        seconds[name] = time.perf_counter() - start
    return {"encode_images_per_second": round(count / seconds["timed"], 1)}


def waiting(
    folder: Path, *, device: torch.device, text_dtype: str, rows: int, rate: float, batch_size: int, seconds: float
) -> dict[str, float]:
    """The share of its steps that training waits for a batch: real loader and feed, a device busy for the rest.

    A wait ends when the batch lies on the device, float32 and with its captions dropped.
    """
    store = write_store(folder / text_dtype, rows=rows, tokens=POSITIONS, resolutions=(256,), dtype=text_dtype)
    loader, busy = Loader([store], resolution=256, text_encoder="random", seed=0), batch_size / rate
    steps = max(3, int(seconds / busy))
    stage = Stage(
        name="256 px masked", resolution=256, images=(steps + WARM) * batch_size, batch_size=batch_size,
        learning_rate=1e-4, mask_ratio=0.75, start="scratch",
    )  # fmt: skip
    model = PRESETS["MicroDiT_XL_2"](in_channels=4, caption_channels=WIDTH)
    recipe = Recipe("benchmark", model, (stage,), text_length=POSITIONS)
    cycles, waited = cycles_of(busy) if device.type == "cuda" else 0, []
    with contextlib.closing(
        feed(loader, recipe, stage, patches=PATCHES, data=[(0, stage.images)], device=device)
    ) as batches:
        for _ in range(steps + WARM):
            begin = time.perf_counter()
            next(batches)
            if device.type == "cuda":
                torch.cuda.synchronize()
                waited.append(time.perf_counter() - begin)
                torch.cuda._sleep(cycles)
                torch.cuda.synchronize()
            else:
                waited.append(time.perf_counter() - begin)
                time.sleep(busy)
    told = np.array(waited[WARM:])
    return {
        f"wait_share_{text_dtype}": round(float(told.sum() / (told.sum() + steps * busy)), 4),
        f"longest_wait_ms_{text_dtype}": round(float(told.max()) * 1e3, 2),
    }


def cycles_of(seconds: float) -> int:
    """Of the device's clock, for a kernel that only waits; twice, so that the clock is up."""
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.cuda._sleep(10**8)
        torch.cuda.synchronize()
        each = (time.perf_counter() - begin) / 10**8
    return round(seconds / each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--images", type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--batch-size", type=int, default=256, help="of the training that waits")
    parser.add_argument("--images-per-second", type=float, default=1500.0)
    parser.add_argument("--seconds", type=float, default=8.0, help="of waiting, for each type of caption states")
    args = parser.parse_args()
    device = torch.device("cpu" if args.tiny else "cuda")
    dtype, started = torch.float32 if args.tiny else torch.bfloat16, time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - started:5.1f} s  {what}", file=sys.stderr, flush=True)

    with device:
        vae = make_autoencoder((8, 8, 8, 8), 1) if args.tiny else make_autoencoder((128, 256, 512, 512), 2)
        text = TextTower(64, 2) if args.tiny else TextTower(1024, 24)
    vae, text = vae.to(device, dtype), text.to(device, dtype).eval()
    say("encoders made")
    resolutions, size, batch_size = ((32, 64), 128, 16) if args.tiny else ((256, 512), 768, 32)
    count, rows = args.images or (64 if args.tiny else 3072), args.rows or (512 if args.tiny else 3072)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found: dict[str, float | str | None] = {"device": where, "cores": os.cpu_count(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as name:
        found |= encode_speed(
            Path(name), vae, text, device=device, count=count, size=size, batch_size=batch_size, resolutions=resolutions
        )
        say(f"encoded {count} pictures: {found['encode_images_per_second']} images/s")
        for kind in ("float16", "int8"):
            found |= waiting(
                Path(name), device=device, text_dtype=kind, rows=rows, rate=args.images_per_second,
                batch_size=args.batch_size, seconds=args.seconds,
            )  # fmt: skip
            say(f"{kind}: waits {found[f'wait_share_{kind}']:.2%} of its steps")
    print(json.dumps({**found, "images": count, "images_per_second_of_training": args.images_per_second}))


if __name__ == "__main__":
    main()
