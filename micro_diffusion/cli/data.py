"""`micro-diffusion data`: look into a latent store, or check it."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from micro_diffusion.runtime.files import UserError, write_atomic

if TYPE_CHECKING:
    from micro_diffusion.data.store import Store


@dataclass(frozen=True)
class Data:
    """Tell what a latent store holds, or verify it: hashes, shapes, finite values."""

    action: Positional[Literal["inspect", "verify"]]
    """inspect: counts, sizes, captions, what was left out; verify: every file against what prepare noted."""
    store: Annotated[Positional[Path], arg(metavar="STORE")]
    """A store made by prepare."""
    page: Path | None = None
    """inspect: also write an HTML page of random pictures, decoded from their latents, with their captions."""
    pictures: int = 24
    """Pictures on the page."""
    seed: int = 0
    """Which pictures."""
    autoencoder: str | None = None
    """Decode with this one: where the store's own is not found by its name."""

    def __call__(self) -> None:
        from micro_diffusion.data.inspect import problems, summary
        from micro_diffusion.data.store import Store

        store = Store.open(self.store)
        if self.action == "verify":
            if found := list(problems(store)):
                raise UserError("\n".join([*found, "Prepare the store again into a new folder."]))
            print(f"{self.store}: {len(store):,} pictures in {len(store.parts)} parts, all as they were written")
            return
        told = summary(store)
        print("\n".join(f"{name}: {value}" for name, value in told.items()))
        if self.page:
            write_atomic(self.page, self._page(store, told))
            print(f"{self.page}: {self.pictures} of the pictures")

    def _page(self, store: "Store", told: dict[str, str]) -> str:
        from micro_diffusion.data.loader import Loader
        from micro_diffusion.models.autoencoders import load_autoencoder
        from micro_diffusion.runtime.report import facts, figure, grid, html_page, pictures

        info, size = store.info, max(store.info.resolutions)
        autoencoder = load_autoencoder(self.autoencoder or info.autoencoder.name)
        if autoencoder.sha256 != info.autoencoder.sha256:
            raise UserError(f"The store was made with another autoencoder ({info.autoencoder.name}); --autoencoder it.")
        split = "train" if any("train" in part.splits for part in store.parts) else "validation"
        loader = Loader([store], resolution=size, text_encoder=next(iter(info.text_encoders)), seed=0, split=split)
        chosen = random.Random(self.seed).sample(range(len(loader)), min(self.pictures, len(loader)))
        batch = loader.rows(chosen)
        tables = (store.rows(part).select(["key", "captions"]) for part in range(len(store.parts)))
        captions = {row["key"]: row["captions"][0] for table in tables for row in table.to_pylist()}
        drawn = grid(pictures(autoencoder.decode(batch.latents)), [captions[key] for key in batch.keys], columns=6)
        shown = figure(drawn, alt="pictures with captions", caption=f"{split}, {size} px, decoded from the latents")
        return html_page(self.store.name, info.source, {"Facts": facts(told), "Pictures": shown})
