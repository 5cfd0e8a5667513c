"""Checkpoints by name: own model folders, pipeline folders, the paper's released files and Composer's checkpoints.

A model folder is model.safetensors and a config.json that names all that drawing needs.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import micro_diffusion.embedded
from micro_diffusion.diffusion.objectives import EDM, OBJECTIVES, Flow
from micro_diffusion.models.dit import DiT, DiTConfig
from micro_diffusion.models.pos_embed import sincos_2d
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.models.pretrained import first_line, hub_file, load_tensors, part_folder
from micro_diffusion.models.text_encoders import DFN5B, T5_XXL
from micro_diffusion.runtime.files import UserError, atomic_folder, write_atomic
from micro_diffusion.runtime.parse import choose, parse, read_json

FORMAT, VERSION = "micro-diffusion model", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
PIPELINE_WEIGHTS, PIPELINE_CONFIG = "transformer/diffusion_pytorch_model.safetensors", "transformer/config.json"

SDXL, OSTRIS = "stabilityai/stable-diffusion-xl-base-1.0", "ostris/vae-kl-f8-d16"
AUTOENCODERS = {4: SDXL, 16: OSTRIS}  # of official checkpoints, by channels
TEXT_ENCODERS = {1024: (DFN5B, 77), 4096: (f"{T5_XXL}?mask=none", 120)}  # by width, with their positions
HUB = "VSehwag24/MicroDiT"
EMBEDDED, SHIPPED = "embedded", Path(micro_diffusion.embedded.__path__[0], "checkpoint")


@dataclass(frozen=True)
class Released:
    """A released model with its results as published: FID-30K on COCO 2014, and GenEval."""

    data: str
    channels: int
    fid: float
    geneval: float

    @property
    def autoencoder(self) -> str:
        """The one whose latents it draws."""
        return AUTOENCODERS[self.channels]


RELEASED = {
    "dit_4_channel_22M_real_only_data.pt": Released("22 M real", 4, fid=12.72, geneval=0.46),
    "dit_4_channel_37M_real_and_synthetic_data.pt": Released("37 M real and synthetic", 4, fid=12.66, geneval=0.46),
    "dit_16_channel_37M_real_and_synthetic_data.pt": Released("37 M real and synthetic", 16, fid=13.04, geneval=0.40),
    "dit_4_channel_0.5B_synthetic_data.pt": Released("490 M synthetic", 4, fid=13.26, geneval=0.52),
}


@dataclass(frozen=True)
class Part:
    """A pretrained part by name, and the hash of its weights: other weights would make other pictures."""

    name: str
    sha256: str | None  # None: not known, as for the parts of the released models


@dataclass(frozen=True)
class ModelCard:
    """All that is needed to draw with a model, and where it comes from."""

    dit: DiTConfig
    objective: EDM | Flow
    autoencoder: Part
    text_encoder: Part
    resolution: int  # pixels
    images_seen: int
    recipe: str
    text_length: int | None = None  # tokens that captions were padded to in training; None: to the longest of the batch

    def to_json(self) -> str:
        """Readable, with the objective's name beside its fields."""
        (name,) = (name for name, kind in OBJECTIVES.items() if type(self.objective) is kind)
        values = dataclasses.asdict(self)
        values["objective"] = {"name": name, **values["objective"]}
        return json.dumps({"format": FORMAT, "version": VERSION, **values}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ModelCard":
        """The inverse of `to_json`; UserError names what is unknown, missing or impossible."""
        values = read_json(text, CONFIG)
        if values.pop("format", None) != FORMAT:
            raise UserError(f"{CONFIG} does not describe a model of this program; give a run's model folder.")
        if (version := values.pop("version", None)) != VERSION:
            raise UserError(f"{CONFIG} has version {version}, this program reads {VERSION}; install the newer program.")
        objective = values.get("objective")
        name = objective.pop("name", None) if isinstance(objective, dict) else None
        kind = choose(OBJECTIVES, str(name), f"objective in {CONFIG} named")
        values["objective"] = parse(kind, objective, f"{CONFIG}.objective")
        return parse(cls, values, CONFIG)


def write_folder(folder: Path, weights: Mapping[str, Tensor], *, card: ModelCard) -> None:
    """Write a model folder from tensors, in the dtypes that they have."""
    with atomic_folder(folder) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_atomic(temporary / CONFIG, card.to_json())
        (temporary / WEIGHTS).chmod((temporary / CONFIG).stat().st_mode)  # safetensors lets its owner alone read


def load_checkpoint(
    name: str, *, autoencoder: str | None = None, text_encoder: str | None = None
) -> tuple[DiT, ModelCard]:
    """The transformer of a checkpoint, on the CPU in float32, and its card; see `read_checkpoint`."""
    weights, card = read_checkpoint(name, autoencoder=autoencoder, text_encoder=text_encoder)
    return build(weights, card, where=name), card


def read_checkpoint(
    name: str, *, autoencoder: str | None = None, text_encoder: str | None = None
) -> tuple[dict[str, Tensor], ModelCard]:
    """The tensors, as they are stored, and the card of a run, a model or pipeline folder, a .pt or .safetensors file.

    `name` is a path, `embedded` (what ships with the package), a released model's file name, or on the hub `OWNER/NAME`
    (a folder) or `OWNER/NAME/FILE`. A file with a .json of the same name beside it is described by that, any other by
    its shapes. `autoencoder` and `text_encoder` name other parts than the card. Raises UserError for what is not there,
    damaged or of no known shape.
    """
    path = _find(name)
    if path.is_dir():
        weights, card = _read_folder(path)
    else:
        weights, beside = _read_tensors(path), path.with_suffix(".json")
        text = beside.read_text(encoding="utf-8") if beside.is_file() else ""
        card = ModelCard.from_json(text) if FORMAT in text else _card(weights, path)
    if autoencoder:
        card = replace(card, autoencoder=Part(autoencoder, None))
    if text_encoder:
        card = replace(card, text_encoder=Part(text_encoder, None))
    if not (card.autoencoder.name and card.text_encoder.name):
        sizes = f"{card.dit.in_channels} latent channels and text {card.dit.caption_channels} wide"
        raise UserError(f"{path} has {sizes}: name its --autoencoder and --text-encoder.")
    return weights, card


def build(weights: Mapping[str, Tensor], card: ModelCard, *, where: str) -> DiT:
    """The card's transformer with these weights, in float32; UserError if they do not fit."""
    try:
        with torch.device("meta"):  # no time spent on initial weights
            dit = DiT(card.dit)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} describes no possible model: {error}.") from error
    _check_fit(weights, dit.state_dict(), where=where)
    dit.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return dit


def _check_fit(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, where: str) -> None:
    """Raise UserError for the first tensor that is missing, unknown or of another shape."""
    advice = f"The weights in {where} are not of the model that their configuration describes"
    for name, tensor in wanted.items():
        if name not in weights:
            raise UserError(f"{advice}: the tensor {name} is missing.")
        if weights[name].shape != tensor.shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            raise UserError(f"{advice}: the tensor {name} has the shape {shapes}.")
    for name in weights.keys() - wanted.keys():
        raise UserError(f"{advice}: nothing has a tensor {name}.")


def hash_tensors(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and bits, the same in whatever format they were stored."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _find(name: str) -> Path:
    if name == EMBEDDED and not SHIPPED.is_dir():
        raise UserError("This package has no checkpoint in it; name one with --model, or: micro-diffusion quickstart.")
    path = SHIPPED if name == EMBEDDED else Path(name)
    if path.exists():
        return path
    file = path.name if path.name in RELEASED else f"{path.name}.pt"
    repository = name.removesuffix(path.name).rstrip("/")
    if file in RELEASED and repository in ("", HUB):
        return hub_file(HUB, file)
    if name == HUB:
        raise UserError(f"{HUB} holds several models; choose one of: {', '.join(RELEASED)}.")
    is_file = path.suffix in (".pt", ".safetensors")
    if is_file and repository.count("/") == 1 and not path.is_absolute():
        return hub_file(repository, path.name)
    if not is_file and name.count("/") == 1 and not path.is_absolute():
        return part_folder(name, [CONFIG, "model_index.json", PIPELINE_CONFIG], weights=[[WEIGHTS, "transformer/*"]])
    raise UserError(f"There is no file or folder {name}, and no released model of that name ({', '.join(RELEASED)}).")


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], ModelCard]:
    """Of a run, a model folder, or a pipeline folder."""
    if (folder / "model").is_dir():
        folder = folder / "model"
    elif (folder / "checkpoints").is_dir():
        raise UserError(f"The run {folder} has no model yet: it appears at the end of the first stage.")
    pipeline = (folder / "transformer").is_dir()
    foreign = f"{folder} is no pipeline folder of this program: export one with --to diffusers."
    files = (PIPELINE_CONFIG, PIPELINE_WEIGHTS) if pipeline else (CONFIG, WEIGHTS)
    for file in files:
        if not (folder / file).is_file():
            raise UserError(foreign if pipeline else f"{folder} is not a model folder: it has no {file}.")
    text, weights = (folder / files[0]).read_text(encoding="utf-8"), folder / files[1]
    if pipeline:
        card = read_json(text, PIPELINE_CONFIG).get("card")
        if card is None:
            raise UserError(foreign)
        text = json.dumps(card)
    return _read_tensors(weights), ModelCard.from_json(text)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The transformer's tensors in a file of any kind, official or Composer's; UserError if it is damaged."""
    content = load_tensors(path)
    if isinstance(content, dict) and isinstance(content.get("state"), dict):
        content = content["state"].get("model")
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict of a transformer; give a released file or a model folder.")
    prefix = "dit." if any(name.startswith("dit.") for name in content) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items() if name.startswith(prefix)}


def _card(weights: Mapping[str, Tensor], path: Path) -> ModelCard:
    """What the paper's models have in common, at the sizes that the shapes tell; other parts have no name."""
    config = config_from_shapes(weights, where=str(path))
    text_encoder, length = TEXT_ENCODERS.get(config.caption_channels, ("", None))
    fine = config.pos_interp_scale > 1  # the paper's stages at 512 px
    return ModelCard(
        dit=config, objective=EDM(p_mean=0.0, p_std=0.6) if fine else EDM(),
        autoencoder=Part(AUTOENCODERS.get(config.in_channels, ""), None), text_encoder=Part(text_encoder, None),
        resolution=config.latent_size[0] * 8, images_seen=0, recipe=path.stem, text_length=length,
    )  # fmt: skip


def config_from_shapes(weights: Mapping[str, Tensor], *, where: str) -> DiTConfig:
    """The preset of these shapes, with latents and positions read from `pos_embed`; UserError if there is none."""
    try:
        dim, channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
        caption_channels = weights["y_embedder.y_proj.fc1.weight"].shape[1]
        positions = weights["pos_embed"].float()
    except (KeyError, ValueError) as error:
        raise UserError(f"{where} is no MicroDiT checkpoint: it lacks {first_line(error)}.") from error
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    side = math.isqrt(positions.shape[1])
    # the second patch is one column on: its first channel is sin(1 / scale)
    scale = 1 / math.asin(min(1.0, max(1e-3, positions[0, 1, 0].item()))) if side > 1 else 1.0
    near = round(4 * scale) / 4  # what it was before it was rounded to bfloat16
    scale = near if abs(near - scale) < 0.01 * scale else round(scale, 3)
    sizes = {(c.dim, c.depth, c.patch_size): make for make in PRESETS.values() for c in [make()]}
    if (dim, depth, patch_size) not in sizes:
        raise UserError(f"{where} is {dim} wide and {depth} deep, like none of: {', '.join(PRESETS)}.")
    expected = sincos_2d(dim, side, side, scale=scale)[None]
    if positions.shape != expected.shape or not torch.allclose(positions, expected, atol=1e-2):
        raise UserError(f"The positions in {where} are not those of square latents; give the model folder instead.")
    return sizes[dim, depth, patch_size](
        input_size=side * patch_size, in_channels=channels, caption_channels=caption_channels, pos_interp_scale=scale,
        text_mask="none",
    )  # fmt: skip
