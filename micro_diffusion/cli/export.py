"""`micro-diffusion export`: a model in the format of others, and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Export:
    """Write a model as a model folder, a diffusers pipeline or an official .pt file; each can be read back."""

    model: Annotated[Positional[Path], arg(metavar="NAME_OR_PATH")]
    """A run, a model or pipeline folder, a .pt or .safetensors file, a released model's name, or a name on the hub."""
    to: Literal["safetensors", "diffusers", "official"]
    """safetensors: a folder that generate and train take; diffusers: a pipeline folder; official: a .pt file."""
    out: Path | None = None
    """Folder or file to write; default: NAME-safetensors, NAME-diffusers or NAME-official.pt, here."""
    autoencoder: str | None = None
    """Name this autoencoder in the export, in place of the model's."""
    text_encoder: str | None = None
    """Name this text encoder in the export, in place of the model's."""

    def __call__(self) -> None:
        from micro_diffusion.export.formats import export

        suffix = ".pt" if self.to == "official" else ""
        name = self.model.resolve().stem if self.model.exists() else self.model.name.removesuffix(".pt")
        out = self.out or Path(f"{name}-{self.to}{suffix}")
        card = export(self.model.as_posix(), out, to=self.to,
                      autoencoder=self.autoencoder, text_encoder=self.text_encoder)  # fmt: skip
        parts = f"the autoencoder {card.autoencoder.name} and the text encoder {card.text_encoder.name}"
        print(f"{out}: {card.recipe}, with {parts}")
