"""The recipes that the command line knows by name."""

from collections.abc import Callable

from micro_diffusion.recipes.emoji import emoji, quickstart
from micro_diffusion.training.config import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {"quickstart": quickstart, "emoji": emoji}
