"""Seconds per 1,000 pictures for features and FID, and the memory that they take; JSON on stdout or in --out.

    python -m benchmarks.features --pictures 1000 --device cuda --weights inception.pth

A folder of random PNGs is written first, outside the measured time. It is then decoded, shown to the network and turned
into mean and covariance, as `evaluate` does it, and compared with its first half. Without --weights, Inception's are
random, which changes neither time nor memory. Memory is the process's peak; the part that grows with the number of
pictures shows in --pictures 1000 against --pictures 30000.
"""

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from micro_diffusion.evaluation.features import INCEPTION, Settings, measure
from micro_diffusion.evaluation.frechet import frechet_distance
from micro_diffusion.evaluation.pictures import PictureFolder
from micro_diffusion.runtime.device import pick_device
from micro_diffusion.runtime.files import sha256, write_atomic


def write_pictures(folder: Path, count: int, *, size: int) -> PictureFolder:
    """Random blots, with as much to decode as a photograph has: a 512-pixel PNG takes about 400 kB."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        blots = Image.fromarray(draw.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8))
        pixels = np.asarray(blots.resize((size, size), Image.Resampling.BICUBIC)) + draw.integers(0, 4, (size, size, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:06}.png", compress_level=1)
    return PictureFolder(folder)


def write_weights(path: Path) -> None:
    """Inception with random weights in torch-fidelity's format."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    network = library.FeatureExtractorInceptionV3
    with mock.patch.object(library, "load_state_dict_from_url"), mock.patch.object(network, "load_state_dict"):
        model = network(INCEPTION, ["2048"])
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(model.state_dict(), path)


def peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--size", type=int, default=512, help="of the pictures, in pixels a side")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--weights", type=Path, help=f"of {INCEPTION}; random without")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights or Path(folder, "weights.pth")
        if not args.weights:
            write_weights(weights)
        pictures = write_pictures(Path(folder, "pictures"), args.pictures, size=args.size)
        half = Path(folder, "half")
        half.mkdir()
        for file in pictures.files[: args.pictures // 2]:
            (half / file.name).symlink_to(file)
        settings = Settings(device=device, batch_size=args.batch_size, weights={INCEPTION: str(weights)})
        reference = measure(PictureFolder(half), INCEPTION, settings)  # warms up, too
        before, start = peak_megabytes(), time.perf_counter()
        moments = measure(pictures, INCEPTION, settings)
        features = time.perf_counter()
        distance = frechet_distance(moments, reference)
        end = time.perf_counter()
        result = {
            "pictures": args.pictures,
            "size": args.size,
            "batch_size": args.batch_size,
            "network": INCEPTION,
            "weights": sha256(weights)[:12] if args.weights else "random",
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or str(device),
            "threads": args.threads,
            "torch": torch.__version__,
            "seconds_per_1000_pictures": round((features - start) / args.pictures * 1000, 2),
            "frechet_seconds": round(end - features, 2),
            "peak_MB": peak_megabytes(),
            "peak_MB_before": before,
            "frechet_distance": distance,
        }
    text = json.dumps(result, indent=1)
    if args.out:
        write_atomic(args.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
