"""Train the embedded autoencoder: `python scripts/train_autoencoder.py --out DIR --seconds 300` on one GPU.

It sees the training split of the embedded drawings only, as they are and varied:
cropped, turned, recoloured, laid over each other, outlined. Written in diffusers format with float16 weights, the
scaling factor measured on the training split. Reported: PSNR on held-out concepts, and on a style that it never saw
(`--unseen FILE`, made by `build_emoji.py --openmoji FILE`).
"""

import argparse
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

import micro_diffusion.embedded
from micro_diffusion.runtime.report import pictures, png_bytes, table_grid

EMOJI = Path(micro_diffusion.embedded.__path__[0], "emoji.parquet")
PEAK_RATE, WARMUP, BETAS, WEIGHT_DECAY = 2e-3, 0.02, (0.9, 0.99), 1e-4
SSIM_WEIGHT, LOG_WEIGHT, KL_WEIGHT = 0.1, 0.02, 1e-4
CLIP = 1.0
WARM_STEPS = 20


def build(widths: tuple[int, ...], layers: int) -> AutoencoderKL:
    """Eight times down to four channels; no attention, so any size will do."""
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=layers,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=128,
    )


def read(path: Path, *, split: str | None = None, limit: int | None = None) -> Tensor:
    """Pictures of a table as uint8, (n, 3, h, w)."""
    table = pq.read_table(path, columns=["image", "split"])
    rows = zip(table["image"].to_pylist(), table["split"].to_pylist(), strict=True)
    images = [image for image, its_split in rows if split in (None, its_split)][:limit]
    arrays = [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


# ------------------------------------------------------------------------------------------------ variations


def vary(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures in [0, 1], each varied in its own way."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(len(x), *shape, device=x.device, generator=generator)

    def some(share: float, changed: Tensor) -> Tensor:
        return torch.where(draw(1, 1, 1) < share, changed, x)

    x = some(0.3, torch.minimum(x, x.flip(0)))  # one drawing over another: both stand on white
    x = move(x, zoom=0.6 * 4 ** draw(), turn=(draw() - 0.5) * math.pi, shift=draw(2) - 0.5)
    order = draw(3).argsort(dim=1)
    x = some(0.4, x.gather(1, order[:, :, None, None].expand_as(x)))
    x = some(0.2, 1 - x)
    x = some(0.4, x ** (0.4 + 1.6 * draw(3, 1, 1)))
    low = draw(3, 1, 1) * 0.6
    x = some(0.2, low + (1 - low) * x)
    steps = F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1)
    outline = (steps.amax(1, keepdim=True) > 0.12).float()
    thick = torch.where(draw(1, 1, 1) < 0.5, F.max_pool2d(outline, 3, 1, 1), outline)
    return some(0.4, x * (1 - thick) + thick * 0.25 * draw(3, 1, 1))


def move(x: Tensor, *, zoom: Tensor, turn: Tensor, shift: Tensor) -> Tensor:
    """Zoom, turn and shift each picture; what comes in from outside is white."""
    cos, sin = turn.cos() / zoom, turn.sin() / zoom
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return 1 - F.grid_sample(1 - x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# ------------------------------------------------------------------------------------------------ loss


def dissimilarity(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """1 - SSIM, averaged over scales: structure as it is perceived (Wang et al. 2003, multi-scale SSIM)."""
    total = torch.zeros((), device=a.device)
    for _ in range(scales):
        mean_a, mean_b, aa, bb, ab = (F.avg_pool2d(t, 7, 1) for t in (a, b, a * a, b * b, a * b))
        var_a, var_b, cov = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
        c1, c2 = 0.01**2, 0.03**2
        ssim = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        total = total + 1 - ssim.mean()
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return total / scales


def loss_terms(out: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
    """L1, perceptual, log squared error (which is PSNR, so that easy pictures get crisp too) and KL."""
    error = out - x
    return {
        "l1": error.abs().mean(),
        "ssim": SSIM_WEIGHT * dissimilarity(out / 2 + 0.5, x / 2 + 0.5),
        "log": LOG_WEIGHT * (error.square().mean((1, 2, 3)) + 1e-5).log().mean(),
        "kl": KL_WEIGHT * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
    }


# ------------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def reconstruct(model: AutoencoderKL, x: Tensor) -> Tensor:
    """uint8 pictures through the autoencoder, back in [0, 1]."""
    device = next(model.parameters()).device
    parts = [part.to(device).float() / 127.5 - 1 for part in x.split(64)]
    return torch.cat([(model.decode(model.encode(p).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1) for p in parts])


def psnr(model: AutoencoderKL, x: Tensor) -> Tensor:
    """PSNR of each picture, dB, after rounding to 8 bits."""
    error = (reconstruct(model, x) * 255).round() - x.to(next(model.parameters()).device).float()
    return 20 * math.log10(255) - 10 * error.square().mean((1, 2, 3)).clamp(min=1e-6).log10()


@torch.no_grad()
def latent_std(model: AutoencoderKL, x: Tensor) -> float:
    """Standard deviation of the latents, posterior samples, over all channels."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    parts = [model.encode(part.to(device).float() / 127.5 - 1).latent_dist.sample(generator) for part in x.split(64)]
    return float(torch.cat(parts).std())


def show(model: AutoencoderKL, x: Tensor, labels: list[str]) -> bytes:
    """Originals above reconstructions."""
    rows = [pictures(x.float() / 255), pictures(reconstruct(model, x))]
    return png_bytes(table_grid(rows, ["original", "reconstruction"], labels))


# ------------------------------------------------------------------------------------------------ training


def train(model: AutoencoderKL, data: Tensor, check: Tensor, args: argparse.Namespace) -> int:
    """Train for so many seconds after the first steps (which compile); returns the images seen."""
    device = torch.device(args.device)
    data = data.to(device)
    generator = torch.Generator(device).manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            posterior = model.encode(x).latent_dist
            out = model.decode(posterior.sample()).sample
        return out.float(), posterior.mean.float(), posterior.logvar.float()

    run = torch.compile(forward) if args.compile else forward
    started, step, printed = time.monotonic(), 0, 0.0
    while (elapsed := time.monotonic() - started) < args.seconds or step < WARM_STEPS:
        if step == WARM_STEPS:  # compilation is not training
            started, elapsed = time.monotonic(), 0.0
        chosen = torch.randint(len(data), (args.batch_size,), device=device, generator=generator)
        x = data[chosen].float() / 255
        plain = round(len(x) * (1 - args.varied))
        x = torch.cat([x[:plain], vary(x[plain:], generator)])
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device, generator=generator) < 0.5, x.flip(3), x)
        x = (x * 2 - 1).clamp(-1, 1).contiguous(memory_format=torch.channels_last)
        done = elapsed / args.seconds if step >= WARM_STEPS else 0.0
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, done / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * done))
        out, mean, logvar = run(x)
        terms = loss_terms(out, x, mean, logvar)
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if done and elapsed - printed > args.every:
            printed = elapsed
            shown = "  ".join(f"{name} {value.item():.4f}" for name, value in terms.items())
            print(f"{elapsed:5.0f} s  {step * args.batch_size:9,} images  {psnr(model, check).mean():.2f} dB  {shown}",
                  flush=True)  # fmt: skip
    return step * args.batch_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the autoencoder, report.json and grid.png")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 48, 96, 120])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--data", type=Path, default=EMOJI, help="a table of pictures with their splits")
    parser.add_argument("--start", type=Path, help="go on from this folder's autoencoder")
    parser.add_argument("--rate", type=float, default=PEAK_RATE, help="highest learning rate")
    parser.add_argument("--varied", type=float, default=0.6, help="share of the pictures that are varied")
    parser.add_argument("--unseen", type=Path, help="a table of pictures in a style that is not embedded")
    parser.add_argument("--limit", type=int, help="so many training pictures (to rehearse)")
    parser.add_argument("--every", type=float, default=15, help="seconds between two lines")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    data, held_out = read(args.data, split="train", limit=args.limit), read(args.data, split="held_out_concept")
    model = AutoencoderKL.from_pretrained(args.start) if args.start else build(tuple(args.widths), args.layers)
    model = model.float().to(args.device, memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data)} pictures", flush=True)
    images = train(model, data, held_out[:: max(1, len(held_out) // 128)], args)

    # what ships is rounded to float16 and measured as it ships
    model = model.half().float().eval()
    model.register_to_config(scaling_factor=round(1 / latent_std(model, data[::4]), 5))
    report: dict[str, Any] = {
        "held_out_concepts_db": float(psnr(model, held_out).mean()),
        "train_db": float(psnr(model, data[::16]).mean()),
        "scaling_factor": model.config.scaling_factor,
        "parameters": sum(p.numel() for p in model.parameters()),
        "images": images,
        "seconds": args.seconds,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
    }
    shown = [(held_out[:: max(1, len(held_out) // 10)][:10], "held-out concept")]
    if args.unseen:
        unseen = read(args.unseen)
        report["unseen_style_db"] = float(psnr(model, unseen).mean())
        shown.append((unseen[:: max(1, len(unseen) // 4)][:4], "unseen style"))
    args.out.mkdir(parents=True, exist_ok=True)
    grid = show(model, torch.cat([x for x, _ in shown]), [label for x, label in shown for _ in x])
    model.half().save_pretrained(args.out, safe_serialization=True)
    report["bytes"] = sum(path.stat().st_size for path in args.out.iterdir())
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "grid.png").write_bytes(grid)
    print(json.dumps(report, indent=2), flush=True)


if __name__ == "__main__":
    main()
