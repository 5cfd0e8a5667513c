"""Model folders: model.safetensors, and a config.json that names all that drawing needs."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from micro_diffusion.diffusion.objectives import EDM, OBJECTIVES, Flow
from micro_diffusion.models.dit import DiT, DiTConfig
from micro_diffusion.runtime.files import UserError, atomic_folder, write_atomic
from micro_diffusion.runtime.parse import choose, parse, read_json

FORMAT, VERSION = "micro-diffusion model", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


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
        card: ModelCard = parse(cls, values, CONFIG)
        return card


def write_folder(folder: Path, weights: Mapping[str, Tensor], *, card: ModelCard) -> None:
    """Write a model folder from tensors, in the dtypes that they have."""
    with atomic_folder(folder) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_atomic(temporary / CONFIG, card.to_json())


def read_folder(folder: Path) -> tuple[dict[str, Tensor], ModelCard]:
    """The tensors and the card of a model folder; UserError if they cannot be read."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(f"{folder} is not a model folder: it has no {file}.")
    card = ModelCard.from_json((folder / CONFIG).read_text(encoding="utf-8"))
    return read_safetensors(folder / WEIGHTS), card


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; UserError if it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again.") from error


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
