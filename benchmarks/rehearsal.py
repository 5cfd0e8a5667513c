"""A full-size rehearsal of drawing with a released model, with random weights in the real formats.

Writes an official .pt of MicroDiT_XL_2 at 512 px (float32, 4.7 GB), an SDXL-size autoencoder (diffusers format) and an
H/14-size text tower (OpenCLIP hub format), loads them through the package's own loading code, draws 4 pictures with
30 Heun steps and guidance 5, eager and compiled, and measures what bf16 costs in accuracy. Seconds, peak GPU memory and
errors go into one JSON file.

    python benchmarks/rehearsal.py --out rehearsal.json              about 3 minutes on an H100
    python benchmarks/rehearsal.py --out tiny.json --device cpu --tiny     a rehearsal of the rehearsal
"""

import argparse
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from micro_diffusion.diffusion.objectives import EDM, Prediction
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.model import LatentDiffusion, sample_latents, text_network
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.models.text_encoders import TextFeatures
from micro_diffusion.runtime.device import pick_device

PROMPTS = ["An elegant squirrel pirate on a ship"] * 4
# stabilityai/stable-diffusion-xl-base-1.0, vae/config.json
SDXL_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
# apple/DFN5B-CLIP-ViT-H-14-378, open_clip_config.json; its vision tower is replaced by one matrix
TEXT_TOWER = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the numbers")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="small parts and 3 steps, to see that it runs")
    parser.add_argument("--folder", type=Path, help="where the weights are written (7 GB); default: a temporary folder")
    asked = parser.parse_args()
    device = pick_device(asked.device)
    numbers: dict[str, Any] = {"torch": torch.__version__, "device": device_name(device), "tiny": asked.tiny}

    def note(**values: Any) -> None:
        numbers.update(values)
        print(json.dumps(values), flush=True)
        asked.out.write_text(json.dumps(numbers, indent=2) + "\n")

    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # the text tower that is cut out
        rehearse(Path(folder), device, tiny=asked.tiny, note=note)


def rehearse(folder: Path, device: torch.device, *, tiny: bool, note: Callable[..., None]) -> None:
    """All of it, in order."""
    torch.manual_seed(0)
    steps = 3 if tiny else 30
    checkpoint, seconds = timed(lambda: write_checkpoint(folder / "dit_4_channel_random.pt", device, tiny=tiny))
    note(checkpoint_gb=checkpoint.stat().st_size / 1e9, write_checkpoint_s=seconds)
    autoencoder, text_encoder = (
        write_autoencoder(folder / "vae", tiny=tiny),
        write_text_tower(folder / "clip", tiny=tiny),
    )
    note(autoencoder="SDXL" if autoencoder else "none: diffusers is missing, latents only")
    note(text_encoder="openclip" if text_encoder else "random features: open_clip is missing")

    reset_peak(device)
    model, seconds = timed(
        lambda: LatentDiffusion.from_checkpoint(
            str(checkpoint), device=device, autoencoder=autoencoder or "missing", text_encoder=text_encoder or "missing"
        )
    )
    note(load_transformer_s=seconds, parameters=sum(p.numel() for p in model.dit.parameters()))
    if text_encoder:
        _, seconds = timed(lambda: model.text_encoder)
        note(load_text_encoder_s=seconds)
    else:
        features = random_text(len(PROMPTS), device)
        model.encode_prompts = lambda prompts, mask=None: features
    if autoencoder:
        _, seconds = timed(lambda: model.vae)
        note(load_autoencoder_s=seconds)

    def draw(steps: int = steps) -> Tensor:
        return model.generate(
            prompt=PROMPTS,
            num_inference_steps=steps,
            guidance_scale=5.0,
            seed=2024,
            batch_size=len(PROMPTS),
            return_only_latents=not autoencoder,
        )

    text = model.encode_prompts(PROMPTS)
    errors, seconds = timed(lambda: Bf16Errors(model.dit, text, steps=steps))
    note(float32_and_autocast_s=seconds, **errors.reference)
    for mode in ("eager", "compiled"):
        if mode == "compiled":
            model.compile_transformer()
        _, warm = timed(lambda: draw(2))
        reset_peak(device)
        images, seconds = timed(draw)
        note(**{f"{mode}_first_call_2_steps_s": warm, f"{mode}_s": seconds, f"{mode}_peak_gb": peak_gb(device)})
        note(**{f"{mode}_pictures": list(images.shape), f"{mode}_finite": bool(images.isfinite().all())})
        note(**errors.of(mode))
    if autoencoder:
        latents = torch.randn(4, 4, *model.dit.config.latent_size, device=device)
        _, seconds = timed(lambda: model.vae.decode(latents))
        note(decode_s=seconds)


class PlainAutocast(nn.Module):
    """Autocast around whole calls of the transformer, text and all, and nothing else done for bf16."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit, self.config, self.x_embedder = dit, dit.config, dit.x_embedder

    def encode_text(self, states: Tensor, mask: Tensor, *, keys: bool) -> Tensor:
        return states

    def forward(self, x: Tensor, label: Tensor, states: Tensor, **settings: Any) -> Prediction:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.dit(x, label, states)


class Bf16Errors:
    """Error against float32 of the package's bf16 path, and of plain bf16 autocast on the same inputs.

    One call at sigma 1, and all sampling steps; the float32 reference is without TF32.
    """

    def __init__(self, dit: DiT, text: TextFeatures, *, steps: int) -> None:
        self.dit, self.text, self.steps = dit, text, steps
        noise = torch.randn(len(text.states), 4, *dit.config.latent_size, generator=torch.Generator().manual_seed(1))
        self.noise = noise.to(text.states.device)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        self.exact = self.outputs(dit, "float32")
        torch.set_float32_matmul_precision(before)
        plain = self.outputs(PlainAutocast(dit), "float32")
        self.plain = {kind: error(plain[kind], exact) for kind, exact in self.exact.items()}
        self.reference = {f"autocast_{kind}_error": value for kind, value in self.plain.items()}

    @torch.no_grad()
    def outputs(self, dit: Any, precision: str) -> dict[str, Tensor]:
        """Of a transformer: one call, and sampled latents."""
        call = text_network(dit, self.text, precision=precision)(self.noise, self.noise.new_zeros(len(self.noise)))
        latents = sample_latents(dit, EDM(), self.text, self.noise, num_inference_steps=self.steps, precision=precision)
        return {"call": call.sample, "sample": latents}

    def of(self, mode: str) -> dict[str, float]:
        """Errors of the bf16 path as it is now, and their ratios to plain autocast's."""
        found = self.outputs(self.dit, "bf16")
        errors = {kind: error(found[kind], exact) for kind, exact in self.exact.items()}
        ratios = {f"bf16_{mode}_{kind}_error_ratio": errors[kind] / self.plain[kind] for kind in errors}
        return {f"bf16_{mode}_{kind}_error": value for kind, value in errors.items()} | ratios


def write_checkpoint(path: Path, device: torch.device, *, tiny: bool) -> Path:
    """An official file: a flat state dict in float32. No weight is zero, so that every block counts."""
    make = PRESETS["MicroDiT_Tiny_2" if tiny else "MicroDiT_XL_2"]
    with device:
        dit = DiT(make(input_size=16 if tiny else 64, pos_interp_scale=1.0 if tiny else 2.0))
        for parameter in dit.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    torch.save({name: tensor.cpu() for name, tensor in dit.state_dict().items()}, path)
    return path


def write_autoencoder(folder: Path, *, tiny: bool) -> str | None:
    """A pipeline folder whose `vae` has SDXL's sizes; None without diffusers."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    from diffusers import AutoencoderKL

    sizes = SDXL_VAE | ({"block_out_channels": (32,) * 4} if tiny else {})
    AutoencoderKL(**sizes).save_pretrained(folder / "vae")
    return str(folder)


def write_text_tower(folder: Path, *, tiny: bool) -> str | None:
    """An OpenCLIP hub folder with one pickle, as on the hub; None without open_clip."""
    if importlib.util.find_spec("open_clip") is None:
        return None
    from open_clip.transformer import TextTransformer

    folder.mkdir()
    text = TEXT_TOWER | ({"layers": 2} if tiny else {})
    tower = TextTransformer(**text, output_dim=1024)
    config = {"embed_dim": 1024, "quick_gelu": True, "vision_cfg": {}, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(tower.state_dict() | {"visual.proj": torch.zeros(1280, 1024)}, folder / "open_clip_pytorch_model.bin")
    return f"openclip:{folder}"


def random_text(count: int, device: torch.device) -> TextFeatures:
    """Features as large as the text tower's."""
    states = torch.randn(count, 77, 1024, generator=torch.Generator().manual_seed(2)).to(device)
    return TextFeatures(states, torch.ones(count, 77, dtype=torch.bool, device=device))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds that it took."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def error(found: Tensor, exact: Tensor) -> float:
    """Relative error, root mean square."""
    return ((found.float() - exact).norm() / exact.norm()).item()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: torch.device) -> float | None:
    """Most memory that tensors took on the GPU since `reset_peak`."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


if __name__ == "__main__":
    main()
