"""Drawing what metrics score: shared by ranks, resumed after a kill, from noise that is the same on every machine."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from micro_diffusion.evaluation.pictures import PROMPTS, Prompt, file_name, prompts_text
from micro_diffusion.models.checkpoints import hash_tensors
from micro_diffusion.models.model import LatentDiffusion
from micro_diffusion.runtime.distributed import ALONE, World
from micro_diffusion.runtime.files import UserError, atomic_file, remove_leftovers, user_error, write_atomic
from micro_diffusion.runtime.parse import read_json
from micro_diffusion.runtime.report import pictures

GENERATION = "generation.json"


@dataclass(frozen=True)
class Drawing:
    """What decides the pictures besides the model and the prompts."""

    steps: int = 30
    guidance: float = 3.0
    guidance_interval: tuple[float, float] | None = None
    sampler: str = "heun"


def draw_prompts(
    model: LatentDiffusion, prompts: Sequence[Prompt], out: Path, *, name: str, drawing: Drawing, batch_size: int = 16,
    world: World = ALONE, on_batch: Callable[[float], object] = bool,
) -> None:  # fmt: skip
    """A picture a prompt into `out`, but for those that are there, with `PROMPTS` and `GENERATION`; `name` is noted.

    Every rank of the `world` calls this. Neighbours are drawn together whoever draws them and whatever is there, so
    that the pictures are the same to the last bit; another batch size changes their rounding. `on_batch` is told what
    part of the work is done. UserError, with nothing drawn, where `out` holds pictures of something else.
    """
    made: dict[str, Any] = json.loads(json.dumps({"model": name} | _description(model, drawing)))
    _check(out, made, prompts)
    files = [out / file_name(index) for index in range(len(prompts))]
    parts = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    mine = [part for part in parts if not all(file.is_file() for file in files[part])][world.rank :: world.size]
    world.agree()  # all have looked before any file is written
    if world.rank == 0:
        remove_leftovers(out)
        write_atomic(out / GENERATION, json.dumps(made, indent=2) + "\n")
        write_atomic(out / PROMPTS, prompts_text(prompts))
    world.agree()
    for number, part in enumerate(mine, 1):
        texts, seeds, _ = zip(*prompts[part], strict=True)
        crowded = f"{len(texts)} pictures at once do not fit into memory; lower --batch-size."
        with user_error(crowded, torch.OutOfMemoryError):
            images = model.generate(
                texts, seed=seeds, num_inference_steps=drawing.steps, guidance_scale=drawing.guidance,
                guidance_interval=drawing.guidance_interval, sampler=drawing.sampler,
                batch_size=min(batch_size, len(prompts)),
            )  # fmt: skip
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(_save, files[part], pictures(images)))
        on_batch(number / len(mine))
    world.agree()  # all are drawn


def _save(file: Path, picture: Image.Image) -> None:
    if not file.is_file():
        with atomic_file(file) as temporary:
            picture.save(temporary, "PNG")


def _description(model: LatentDiffusion, drawing: Drawing) -> dict[str, Any]:
    """All that decides what a prompt and its seed become, up to rounding."""
    height, width = (side * model.vae.downscale for side in model.dit.config.latent_size)
    return {
        "weights": hash_tensors({name: tensor.cpu() for name, tensor in model.dit.state_dict().items()}),
        "autoencoder": model.vae.sha256, "text_encoder": model.text_encoder.sha256,
        "objective": f"{model.objective}", "size": f"{width} x {height}",
        "precision": model.precision if model.device.type == "cuda" else "float32", **asdict(drawing),
    }  # fmt: skip


def _check(out: Path, made: dict[str, Any], prompts: Sequence[Prompt]) -> None:
    """Raise UserError unless the pictures in the folder, if any, were made so, of the same prompts."""
    differing = []
    if (file := out / GENERATION).is_file():
        before = read_json(file.read_text(), str(file))
        pairs = [(key, before.get(key), value) for key, value in made.items() if key != "model"]
        differing = [f"{key} {str(old)[:12]}, not {str(new)[:12]}" for key, old, new in pairs if old != new]
    elif any(out.glob("*.png")):
        differing = [f"no {GENERATION}"]
    if (out / PROMPTS).is_file() and (out / PROMPTS).read_text(encoding="utf-8") != prompts_text(prompts):
        differing.append("other prompts or seeds")
    if differing:
        raise UserError(f"The pictures in {out} are of something else ({'; '.join(differing)}): name another folder.")
