"""Images a second that `prepare` encodes, and what training waits for its data; random weights; JSON on stdout.

    python -m benchmarks.encode                       one GPU: an autoencoder of SDXL's size, a text tower of H/14's
    python -m benchmarks.encode --tiny                the same steps with toys on a CPU

Pictures are JPEGs of noise-like texture, decoded in threads as `prepare` does it. Then a stand-in for training takes
batches from the store at a fixed rate (--images-per-second), and the share of that time spent waiting is told.
"""

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from micro_diffusion.data.loader import Loader
from micro_diffusion.data.prepare import prepare
from micro_diffusion.data.records import Caption, Record
from micro_diffusion.data.store import AutoencoderInfo, Store, StoreInfo, TextInfo
from micro_diffusion.models.autoencoders import Autoencoder

POSITIONS, VOCABULARY = 77, 49_408


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


def waiting(store: Store, *, resolution: int, rate: float, batch_size: int, seconds: float) -> dict[str, float]:
    """The share of time that a step of `batch_size / rate` seconds waits for its batch."""
    loader, step, waited = Loader([store], resolution=resolution, text_encoder="random", seed=0), batch_size / rate, 0.0
    batches = loader.batches(0, int(rate * seconds), batch_size)
    next(batches)
    begin = time.perf_counter()
    for _ in batches:
        here = time.perf_counter()
        waited += here - begin
        time.sleep(step)
        begin = time.perf_counter()
    return {"images_per_second": rate, "loader_wait_share": round(waited / seconds, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--images", type=int)
    parser.add_argument("--images-per-second", type=float, default=1500.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    device = torch.device("cpu" if args.tiny else "cuda")
    vae = make_autoencoder((8, 8, 8, 8), 1) if args.tiny else make_autoencoder((128, 256, 512, 512), 2)
    text = TextTower(64, 2) if args.tiny else TextTower(1024, 24)
    vae, text = vae.to(device), text.to(device).eval()
    if not args.tiny:
        vae, text = vae.to(torch.bfloat16), text.to(torch.bfloat16)
    resolutions, size, batch_size = ((32, 64), 128, 16) if args.tiny else ((256, 512), 768, 32)
    count = args.images or (64 if args.tiny else 4096)
    with tempfile.TemporaryDirectory() as name:
        found = encode_speed(
            Path(name), vae, text, device=device, count=count, size=size, batch_size=batch_size, resolutions=resolutions
        )
        store = Store.open(Path(name) / "timed")
        found |= waiting(
            store, resolution=resolutions[0], rate=args.images_per_second, batch_size=min(256, count // 2),
            seconds=args.seconds,
        )  # fmt: skip
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"device": where, "cores": os.cpu_count(), "torch": torch.__version__, "images": count, **found}))


if __name__ == "__main__":
    main()
