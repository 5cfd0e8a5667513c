"""The recipes that the command line knows by name."""

from collections.abc import Callable

from micro_diffusion.recipes.ablations import ABLATIONS
from micro_diffusion.recipes.emoji import emoji, quickstart
from micro_diffusion.recipes.paper import paper_22m, paper_37m, paper_37m_16_channels, paper_synthetic
from micro_diffusion.training.config import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {
    "quickstart": quickstart, "emoji": emoji, "paper-22m": paper_22m, "paper-37m": paper_37m,
    "paper-37m-16-channels": paper_37m_16_channels, "paper-synthetic": paper_synthetic, **ABLATIONS,
}  # fmt: skip
