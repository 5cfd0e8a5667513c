"""`micro-diffusion train`: a recipe and latent stores become a run folder with a model in it."""

import json
import logging
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.parse import choose, nearest
from micro_diffusion.training.options import DEFAULTS, Options

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from micro_diffusion.data.store import Store
    from micro_diffusion.models.autoencoders import Autoencoder
    from micro_diffusion.models.dit import DiT
    from micro_diffusion.models.text_encoders import TextEncoder
    from micro_diffusion.runtime.distributed import World
    from micro_diffusion.training.config import Recipe
    from micro_diffusion.training.stages import State

FROM_CHECKPOINT = ("model", "objective", "sigma_data", "flow_shift", "start_from", "start_from_sha256")
STUCK = 75
SAMPLE_PROMPTS, SAMPLE_STEPS, SAMPLE_GUIDANCE = 8, 20, 2.0


@dataclass(frozen=True)
class Train:
    """Train a recipe on latent stores. The same command, run again, goes on where it stopped."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """A recipe's name (quickstart, emoji), a recipe.json, or file.py:function."""
    store: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="STORE")]
    """A store made by prepare, here or at an address (docs/data.md); several are mixed by their size."""
    run: Annotated[Path, arg(metavar="RUN")]
    """Folder for checkpoints, log, samples and the model."""
    settings: Annotated[UseAppendAction[tuple[tuple[str, ...], ...]], arg(name="set", metavar="KEY=VALUE ...")] = ()
    """Change the recipe, as in --set seed=1 stages.0.images=64000."""
    start_from: Annotated[Path | None, arg(metavar="NAME_OR_PATH")] = None
    """Fine-tune this checkpoint: its model, encoders and objective replace the recipe's (docs/models.md)."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    options: Annotated[Options, arg(name="")] = field(default_factory=Options)

    def __call__(self) -> None:
        from torch import cuda

        from micro_diffusion.runtime.distributed import join
        from micro_diffusion.training.parallel import make_deterministic

        options = self.options
        if options.deterministic:
            make_deterministic()
        changes = [setting for group in self.settings for setting in group]
        recipe, weights = override(find_recipe(self.recipe), changes), None
        if self.start_from:
            recipe, weights = fine_tuning(recipe, self.start_from.as_posix(), run=self.run, changes=changes)
        with join(cuda=self.device in ("auto", "cuda") and cuda.is_available(), timeout=options.timeout) as world:
            logging.basicConfig(format="micro-diffusion: %(message)s")
            logging.getLogger("micro_diffusion").setLevel(logging.ERROR if world.rank else logging.INFO)
            train_recipe(
                recipe, self.store, self.run, device=self.device, weights=weights, options=options, world=world
            )
        if not world.rank:
            print(
                f"The model is in {self.run / 'model'}; draw with: micro-diffusion generate --model {self.run} PROMPT"
            )


def find_recipe(name: str) -> "Recipe":
    """A recipe by its name, from a JSON file, or from a function of a Python file (`file.py:function`)."""
    from micro_diffusion.recipes.recipe import RECIPES
    from micro_diffusion.training.config import Recipe

    file, _, function = name.partition(":")
    if Path(file).suffix not in (".json", ".py"):
        return choose(RECIPES, name, "recipe")()
    if not Path(file).is_file():
        raise UserError(f"There is no recipe file {file}.")
    if Path(file).suffix == ".json":
        return Recipe.from_json(Path(file).read_text())
    made = runpy.run_path(file).get(function or "recipe", lambda: None)()
    if not isinstance(made, Recipe):
        raise UserError(
            f"{file} has no function {function or 'recipe'!r} that returns a Recipe; name it as file.py:name."
        )
    return made


def override(recipe: "Recipe", settings: Sequence[str]) -> "Recipe":
    """The recipe with `key=value` settings; keys are dotted paths, values JSON or plain words."""
    data: Any = json.loads(recipe.to_json())
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write it as key=value.")
        *path, last = key.split(".")
        place = data
        for name in path:
            place = place[_known(place, name, key)]
        place[_known(place, last, key)] = _value(text)
    return type(recipe).from_json(json.dumps(data))


def fine_tuning(
    recipe: "Recipe", name: str, *, run: Path, changes: Sequence[str]
) -> "tuple[Recipe, Mapping[str, Tensor] | None]":
    """The recipe with what a checkpoint decides, and the checkpoint's weights.

    Each stage's positions span the coordinates that the checkpoint was trained on. A run that has begun from `name`
    keeps all that in its own recipe and checkpoints: then the weights are None, and `name` need not exist any more.
    """
    from micro_diffusion.diffusion.objectives import EDM
    from micro_diffusion.models.released import hash_tensors, load_checkpoint
    from micro_diffusion.training.checkpoint import latest
    from micro_diffusion.training.config import Recipe

    set_here = {key: value for key, _, value in (change.partition("=") for change in changes)}

    def refuse(key: str) -> None:
        raise UserError(f"--set {key} does nothing with --start-from: the checkpoint decides it.")

    for key in set_here:
        if key.split(".")[0] in FROM_CHECKPOINT or key.endswith("pos_interp_scale"):
            refuse(key)
    saved, weights = run / "recipe.json", None
    before = Recipe.from_json(saved.read_text()) if saved.is_file() and latest(run / "checkpoints") else None
    if before is not None and before.start_from == name:
        span = before.stages[0].resolution / before.stages[0].pos_interp_scale
        kept = {"autoencoder", "text_encoder", "text_length"} - set_here.keys()  # what is set must still be the same
        taken = {key: getattr(before, key) for key in (*FROM_CHECKPOINT, *kept)}
    else:
        parts = {key: set_here.get(key) for key in ("autoencoder", "text_encoder")}
        dit, card = load_checkpoint(name, **parts)
        weights, span = dit.state_dict(), card.resolution / card.dit.pos_interp_scale
        taken = {
            "model": replace(card.dit, pos_interp_scale=1.0),
            "objective": "edm" if isinstance(card.objective, EDM) else "flow",
            "sigma_data": getattr(card.objective, "sigma_data", 0.9),
            "flow_shift": getattr(card.objective, "shift", 1.0),
            "text_length": card.text_length or recipe.text_length,
            "autoencoder": card.autoencoder.name,
            "text_encoder": card.text_encoder.name,
            "start_from": name,
            "start_from_sha256": hash_tensors(weights),
        }
        if "text_length" in set_here and taken["text_length"] != recipe.text_length:
            refuse("text_length")
    stages = tuple(replace(stage, pos_interp_scale=stage.resolution / span) for stage in recipe.stages)
    return replace(recipe, stages=stages, **taken), weights


def _known(place: Any, name: str, key: str) -> Any:
    """The key or index of that name in `place`; UserError naming the nearest one."""
    known: dict[str, Any] = {}
    if isinstance(place, list | dict):
        known = {str(each): each for each in (place if isinstance(place, dict) else range(len(place)))}
    if name not in known:
        raise UserError(f"--set {key}: there is no setting {name!r}; {nearest(name, known)}")
    return known[name]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def train_recipe(
    recipe: "Recipe", folders: Sequence[str], run: Path, *, device: str, weights: "Mapping[str, Tensor] | None" = None,
    options: Options = DEFAULTS, world: "World | None" = None,
) -> None:  # fmt: skip
    """Open what the recipe needs, check that it fits together, and train; on a signal exit with 128 + its number."""
    from torch import device as torch_device

    from micro_diffusion.data.loader import Loader, require
    from micro_diffusion.data.store import Store
    from micro_diffusion.models.autoencoders import load_autoencoder
    from micro_diffusion.models.text_encoders import load_text_encoder
    from micro_diffusion.runtime.device import pick_device
    from micro_diffusion.runtime.distributed import ALONE, Stuck
    from micro_diffusion.training.hooks import Progress, Samples, TensorBoard
    from micro_diffusion.training.loop import Interrupted, train

    if not folders:
        raise UserError("Training needs a store: make one with 'micro-diffusion prepare' and give it with --store.")
    stores, chosen = [Store.open(folder) for folder in folders], pick_device(device)
    world = world or ALONE
    encoders = torch_device("cpu") if world.rank else chosen  # rank 0 draws the samples
    autoencoder = load_autoencoder(recipe.autoencoder, device=encoders)
    text_encoder = load_text_encoder(recipe.text_encoder, device=encoders)
    resolutions = sorted({stage.resolution for stage in recipe.stages})
    for resolution in resolutions:
        require(
            stores, resolution=resolution, text_encoder=recipe.text_encoder,
            autoencoder_sha256=autoencoder.sha256, text_encoder_sha256=text_encoder.sha256,
        )  # fmt: skip
    check_widths(recipe, autoencoder, text_encoder)

    def open_loaders(stores: Sequence[Store], split: str) -> dict[int, Loader]:
        open_one = partial(Loader, text_encoder=recipe.text_encoder, seed=recipe.seed, text_length=recipe.text_length)
        return {size: open_one(stores, resolution=size, split=split) for size in resolutions}

    held_out = [store for store in stores if any(set(part.splits) - {"train"} for part in store.parts)]
    captions = first_captions(held_out[0] if held_out else stores[0], held_out=bool(held_out))
    board = TensorBoard(run / "tensorboard")
    draw = sampler(recipe, autoencoder, text_encoder, captions)
    samples = Samples(draw, run / "samples", every=recipe.sample_every, board=board)
    try:
        train(
            recipe, run=run, loaders=open_loaders(stores, "train"),
            validation=open_loaders(held_out, "validation") if held_out else None,
            downscale=autoencoder.downscale, device=chosen,
            release=releaser(recipe, autoencoder.sha256, text_encoder.sha256),
            hooks=(Progress(recipe.images), board, samples), weights=weights, options=options, world=world,
        )  # fmt: skip
    except Interrupted as stopped:
        print(f"micro-diffusion: {stopped}", file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None
    except Stuck as error:
        print(f"micro-diffusion: {error}; the same command resumes", file=sys.stderr, flush=True)
        os._exit(STUCK)


def check_widths(recipe: "Recipe", autoencoder: "Autoencoder", text_encoder: "TextEncoder") -> None:
    """Raise UserError if the model does not take what the encoders give."""
    for setting, gives in (("in_channels", autoencoder.channels), ("caption_channels", text_encoder.width)):
        takes = getattr(recipe.model, setting)
        if takes != gives and recipe.start_from:
            raise UserError(f"{recipe.start_from} was trained with {setting} {takes}, but the encoder gives {gives}.")
        if takes != gives:
            raise UserError(
                f"The model's {setting} is not that of the store: train with --set model.{setting}={gives}."
            )


def first_captions(store: "Store", *, held_out: bool, count: int = SAMPLE_PROMPTS) -> list[str]:
    """Captions of a few rows, spread over the first part that has any of that kind."""
    for part in range(len(store.parts)):
        rows = store.rows(part)
        texts = [
            captions[0]
            for captions, split in zip(rows["captions"].to_pylist(), rows["split"].to_pylist(), strict=True)
            if (split != "train") == held_out
        ]
        if texts:
            return [texts[i * len(texts) // count] for i in range(min(count, len(texts)))]
    raise UserError(f"The store {store.path} has no rows to train on.")


def sampler(
    recipe: "Recipe", autoencoder: "Autoencoder", text_encoder: "TextEncoder", captions: Sequence[str]
) -> "Callable[[DiT], Image.Image]":
    """A function that draws the same captions from the same noise with the weights of the moment."""
    from micro_diffusion.models.model import LatentDiffusion
    from micro_diffusion.runtime.report import grid, pictures

    def draw(dit: "DiT") -> "Image.Image":
        model = LatentDiffusion(
            dit,
            recipe.make_objective(recipe.stages[0]),
            load_vae=lambda: autoencoder,
            load_text_encoder=lambda: text_encoder,
            text_length=recipe.text_length,
            precision=recipe.precision,
        )
        images = model.generate(
            captions, num_inference_steps=SAMPLE_STEPS, guidance_scale=SAMPLE_GUIDANCE, seed=recipe.seed
        )
        return grid(pictures(images), captions, columns=4)

    return draw


def releaser(recipe: "Recipe", autoencoder_sha256: str, text_encoder_sha256: str) -> "Callable[[Path, State], None]":
    """A function that writes the weights of the moment as a model folder."""
    from micro_diffusion.models.checkpoints import ModelCard, Part, write_folder

    def release(folder: Path, state: "State") -> None:
        stage = recipe.stages[state.stage]
        card = ModelCard(
            dit=state.shown.config,
            objective=recipe.make_objective(stage),
            autoencoder=Part(recipe.autoencoder, autoencoder_sha256),
            text_encoder=Part(recipe.text_encoder, text_encoder_sha256),
            resolution=stage.resolution,
            images_seen=state.images,
            recipe=recipe.name,
            text_length=recipe.text_length,
        )
        write_folder(folder, state.shown.state_dict(), card=card)

    return release
