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
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from tyro.conf import Positional, UseAppendAction, arg

from micro_diffusion.cli.evaluate import during_training
from micro_diffusion.cli.prepare import Device, SourceOptions
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.parse import choose, nearest
from micro_diffusion.training.options import DEFAULTS, Options

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from micro_diffusion.data.loader import Batches, Loader
    from micro_diffusion.data.store import Store
    from micro_diffusion.data.stream import Stream
    from micro_diffusion.models.autoencoders import Autoencoder
    from micro_diffusion.models.dit import DiT
    from micro_diffusion.models.model import LatentDiffusion
    from micro_diffusion.models.text_encoders import TextEncoder
    from micro_diffusion.runtime.distributed import World
    from micro_diffusion.training.config import Recipe
    from micro_diffusion.training.hooks import Hook
    from micro_diffusion.training.stages import State

FROM_CHECKPOINT = ("model", "objective", "sigma_data", "flow_shift", "start_from", "start_from_sha256")
DECIDED = "--set {} does nothing with --start-from: the checkpoint decides it."
STUCK = 75
SAMPLE_PROMPTS = 8
SAMPLING: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 2.0}


@dataclass(frozen=True)
class Train(SourceOptions):
    """Train a recipe on latent stores, or on pictures as they are. The same command, run again, goes on."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """A recipe's name (quickstart, emoji, paper-37m, ...), a recipe.json, or file.py:function."""
    store: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="STORE")]
    """A store made by prepare, here or at an address (docs/data.md); several are mixed by their size."""
    run: Annotated[Path, arg(metavar="RUN")]
    """Folder for checkpoints, log, samples and the model."""
    settings: Annotated[UseAppendAction[tuple[tuple[str, ...], ...]], arg(name="set", metavar="KEY=VALUE ...")] = ()
    """Change the recipe, as in --set seed=1 stages.0.images=64000."""
    start_from: Annotated[Path | None, arg(metavar="NAME_OR_PATH")] = None
    """Fine-tune this checkpoint: its model, encoders and objective replace the recipe's (docs/models.md)."""
    price: float | None = None
    """Dollars for an hour of one GPU, to count what the run costs; default: typical of the GPU; 0 counts none."""
    wandb: Annotated[str | None, arg(metavar="PROJECT")] = None
    """Also log to this project at Weights & Biases (pip install 'micro-diffusion[wandb]')."""
    evaluate: Annotated[str | None, arg(metavar="BENCHMARK,PROMPTS")] = None
    """Also score the average's pictures, as in emoji,16: at ends of stages, and --set evaluate_every=IMAGES."""
    device: Device = "auto"
    source: Annotated[str | None, arg(metavar="SOURCE")] = None
    """In place of a store: pictures as prepare takes them, encoded as they are needed, in their order."""
    options: Annotated[Options, arg(name="")] = field(default_factory=Options)

    def __call__(self) -> None:
        from micro_diffusion.runtime.distributed import join
        from micro_diffusion.training.parallel import make_deterministic

        if self.options.deterministic:
            make_deterministic()
        changes = [setting for group in self.settings for setting in group]
        recipe, weights = override(find_recipe(self.recipe), changes), None
        if self.start_from:
            recipe, weights = fine_tuning(recipe, self.start_from.as_posix(), run=self.run, changes=changes)
        if self.source and self.store:
            raise UserError("Training reads a --store or a --source, not both.")
        if self.chosen and not self.source:
            option = next(iter(self.chosen)).replace("_", "-")
            raise UserError(f"--{option} does nothing without --source: a store has its own.")
        stream = partial(self.stream, self.source) if self.source else None
        with join(self.device, timeout=self.options.timeout) as world:
            logging.basicConfig(format="micro-diffusion: %(message)s")
            logging.getLogger("micro_diffusion").setLevel(logging.ERROR if world.rank else logging.INFO)
            train_recipe(recipe, self.store, self.run, device=self.device, weights=weights, stream=stream, world=world,
                         price=self.price, wandb=self.wandb, evaluate=self.evaluate, options=self.options)  # fmt: skip
        if not world.rank:
            print(f"The model is in {self.run / 'model'}; to draw: micro-diffusion generate --model {self.run} PROMPT")


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
    made = runpy.run_path(file).get(function := function or "recipe", lambda: None)()
    if not isinstance(made, Recipe):
        raise UserError(f"{file} has no function {function!r} that returns a Recipe; name it as file.py:name.")
    return made


def override(recipe: "Recipe", settings: Sequence[str]) -> "Recipe":
    """The recipe with `key=value` settings; keys are dotted paths, values JSON or plain words."""
    data: Any = json.loads(recipe.to_json())
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write it as key=value.")
        place, holder, index = data, data, None
        for name in key.split("."):
            table = place if isinstance(place, dict) else dict(enumerate(place)) if isinstance(place, list) else {}
            known = {str(each): each for each in table}
            if name not in known:
                raise UserError(f"--set {key}: there is no setting {name!r}; {nearest(name, known)}")
            holder, index = place, known[name]
            place = holder[index]
        try:
            holder[index] = json.loads(text)
        except ValueError:
            holder[index] = text  # a plain word
    return type(recipe).from_json(json.dumps(data))


def fine_tuning(recipe: "Recipe", name: str, *, run: Path,
                changes: Sequence[str]) -> "tuple[Recipe, Mapping[str, Tensor] | None]":  # fmt: skip
    """The recipe with what a checkpoint decides, and the checkpoint's weights.

    Each stage's positions span the coordinates that the checkpoint was trained on. A run that has begun from `name`
    keeps all that in its own recipe and checkpoints: then the weights are None, and `name` need not exist any more.
    """
    from micro_diffusion.diffusion.objectives import EDM
    from micro_diffusion.models.checkpoints import hash_tensors, load_checkpoint
    from micro_diffusion.training.checkpoint import latest
    from micro_diffusion.training.config import Recipe

    set_here = {key: value for key, _, value in (change.partition("=") for change in changes)}
    for key in set_here:
        if key.split(".")[0] in FROM_CHECKPOINT or key.endswith("pos_interp_scale"):
            raise UserError(DECIDED.format(key))
    saved, weights = run / "recipe.json", None
    before = Recipe.from_json(saved.read_text()) if saved.is_file() and latest(run / "checkpoints") else None
    if before is not None and before.start_from == name:
        span = before.stages[0].resolution / before.stages[0].pos_interp_scale
        kept = {"autoencoder", "text_encoder", "text_length"} - set_here.keys()  # what is set must still be the same
        taken = {key: getattr(before, key) for key in (*FROM_CHECKPOINT, *kept)}
    else:
        dit, card = load_checkpoint(name, **{part: set_here.get(part) for part in ("autoencoder", "text_encoder")})
        weights, span = dit.state_dict(), card.resolution / card.dit.pos_interp_scale
        taken = {
            "model": replace(card.dit, pos_interp_scale=1.0), "text_length": card.text_length or recipe.text_length,
            "autoencoder": card.autoencoder.name, "text_encoder": card.text_encoder.name,
            "start_from": name, "start_from_sha256": hash_tensors(weights),
            "objective": "edm" if isinstance(card.objective, EDM) else "flow",
            "sigma_data": getattr(card.objective, "sigma_data", 0.9),
            "flow_shift": getattr(card.objective, "shift", 1.0),
        }  # fmt: skip
        if "text_length" in set_here and taken["text_length"] != recipe.text_length:
            raise UserError(DECIDED.format("text_length"))
    stages = tuple(replace(stage, pos_interp_scale=stage.resolution / span) for stage in recipe.stages)
    return replace(recipe, stages=stages, **taken), weights


def train_recipe(recipe: "Recipe", folders: Sequence[str], run: Path, *, device: str, price: float | None = None,
                 weights: "Mapping[str, Tensor] | None" = None, stream: "Callable[..., Stream] | None" = None,
                 wandb: str | None = None, evaluate: str | None = None, options: Options = DEFAULTS,
                 world: "World | None" = None) -> None:  # fmt: skip
    """Open what the recipe needs, check that it fits together, and train; on a signal exit with 128 + its number."""
    from micro_diffusion.data.loader import require
    from micro_diffusion.data.store import Store
    from micro_diffusion.models.autoencoders import load_autoencoder
    from micro_diffusion.models.text_encoders import load_text_encoder
    from micro_diffusion.runtime.device import pick_device
    from micro_diffusion.runtime.distributed import ALONE, Stuck
    from micro_diffusion.training.loop import Interrupted, train

    if not folders and not stream:
        raise UserError("Training needs a store: make one with 'micro-diffusion prepare' and give it with --store.")
    stores, chosen = [Store.open(folder) for folder in folders], pick_device(device)
    world = world or ALONE
    # rank 0 draws the samples; the others encode only what they train on as it comes
    encoders = "cpu" if world.rank and not stream else chosen
    autoencoder = load_autoencoder(recipe.autoencoder, device=encoders)
    text_encoder = load_text_encoder(recipe.text_encoder, device=encoders)
    having = by_resolution(recipe, stores, quiet=world.rank > 0)
    for resolution, some in having.items():
        require(some, resolution=resolution, text_encoder=recipe.text_encoder,
                autoencoder_sha256=autoencoder.sha256, text_encoder_sha256=text_encoder.sha256)  # fmt: skip
    parts = Parts(recipe, autoencoder, text_encoder)
    parts.check_widths()

    held_out = [store for store in stores if any(set(part.splits) - {"train"} for part in store.parts)]
    kept = {size: [store for store in some if store in held_out] for size, some in having.items()}
    source = stream(recipe, autoencoder, text_encoder, run=run, device=chosen) if stream else None
    streamed = {size: replace(source, resolution=size) for size in having} if source else None
    loaders: Mapping[int, Batches] = streamed or open_loaders(recipe, having, "train")
    unseen = bool(held_out)
    captions = source.captions(SAMPLE_PROMPTS) if source else first_captions((held_out or stores)[0], held_out=unseen)
    if recipe.evaluate_every and not evaluate:
        raise UserError("evaluate_every does nothing without --evaluate: name a benchmark, or set it to 0.")
    hooks = [] if world.rank else make_hooks(parts, run, captions, price=price, wandb=wandb, evaluate=evaluate,
                                             device=chosen)  # fmt: skip
    try:
        validation = open_loaders(recipe, kept, "validation") if held_out else None
        train(recipe, run=run, loaders=loaders, validation=validation, downscale=autoencoder.downscale, device=chosen,
              release=parts.release, hooks=hooks, weights=weights, options=options, world=world)  # fmt: skip
    except Interrupted as stopped:
        if not world.rank:
            print(f"micro-diffusion: {stopped}", file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None
    except Stuck as error:
        print(f"micro-diffusion: {error}; the same command resumes", file=sys.stderr, flush=True)
        os._exit(STUCK)
    finally:
        for reason, count in source.left_out.most_common() if source else ():
            print(f"  left out: {count:,} ({reason})")


def make_hooks(parts: "Parts", run: Path, captions: Sequence[str], *, price: float | None, wandb: str | None,
               evaluate: str | None, device: "torch.device") -> "list[Hook]":  # fmt: skip
    """What watches a run, on rank 0."""
    from micro_diffusion.training.hooks import Costs, Evaluation, Progress, Samples, TensorBoard, WandB

    recipe, costs = parts.recipe, Costs(run / "log.jsonl", price=find_price(price, device))
    boards: "list[Hook]" = [TensorBoard(run / "tensorboard"), *([WandB(wandb, run, recipe=recipe)] if wandb else [])]
    samples = Samples(partial(parts.draw, captions), run / "samples", every=recipe.sample_every, boards=boards)
    hooks = [costs, Progress(recipe.images), *boards, samples]
    if evaluate:
        score = during_training(evaluate, parts.model, run / "evaluation", device=device)
        hooks.insert(0, Evaluation(score, every=recipe.evaluate_every))
    return hooks


def open_loaders(recipe: "Recipe", having: "Mapping[int, Sequence[Store]]", split: str) -> "dict[int, Loader]":
    """A loader for each resolution that stores hold."""
    from micro_diffusion.data.loader import Loader

    open_one = partial(Loader, text_encoder=recipe.text_encoder, seed=recipe.seed, text_length=recipe.text_length)
    return {size: open_one(stores, resolution=size, split=split) for size, stores in having.items() if stores}


def by_resolution(recipe: "Recipe", stores: "Sequence[Store]", *, quiet: bool = False) -> "dict[int, list[Store]]":
    """The stores that feed each resolution of the recipe; one that holds none of them is kept, for `require`."""
    sizes = sorted({stage.resolution for stage in recipe.stages})
    having = {size: [s for s in stores if size in s.info.resolutions] or list(stores) for size in sizes}
    having[sizes[0]] += [s for s in stores if not any(s in some for some in having.values())]
    for size, some in () if quiet else having.items():
        for store in {*map(str, (s.path for s in stores))} - {str(s.path) for s in some}:
            print(f"The stages at {size} px go without {store}, which has no such latents.", file=sys.stderr)
    return having


def find_price(price: float | None, device: "torch.device") -> float | None:
    """Dollars for an hour of a GPU, as given or as typical; says which."""
    from micro_diffusion.runtime.hardware import gpu_of

    if price is None and (gpu := gpu_of(device)):
        price = gpu.price
        print(f"Dollars are counted at {price:.2f} an hour for a GPU, unless --price says more.", file=sys.stderr)
    if price is not None and price < 0:
        raise UserError("--price must not be negative; 0 counts no dollars.")
    return price or None


def first_captions(store: "Store", *, held_out: bool) -> list[str]:
    """Captions of a few rows, spread over the first part that has any of that kind."""
    for part in range(len(store.parts)):
        rows = zip(*(store.rows(part)[name].to_pylist() for name in ("captions", "split")), strict=True)
        if texts := [captions[0] for captions, split in rows if (split != "train") == held_out]:
            return [texts[i * len(texts) // SAMPLE_PROMPTS] for i in range(min(SAMPLE_PROMPTS, len(texts)))]
    raise UserError(f"The store {store.path} has no rows to train on.")


class Parts(NamedTuple):
    """A recipe and the encoders that it names."""

    recipe: "Recipe"
    autoencoder: "Autoencoder"
    text_encoder: "TextEncoder"

    def check_widths(self) -> None:
        """Raise UserError if the model does not take what the encoders give."""
        start = self.recipe.start_from
        for name, gives in (("in_channels", self.autoencoder.channels), ("caption_channels", self.text_encoder.width)):
            takes = getattr(self.recipe.model, name)
            if takes != gives and start:
                raise UserError(f"{start} was trained with {name} {takes}, but the encoder gives {gives}.")
            if takes != gives:
                raise UserError(f"The model's {name} is not that of the store: train with --set model.{name}={gives}.")

    def model(self, dit: "DiT") -> "LatentDiffusion":
        """The weights of the moment with the parts that they are trained with."""
        from micro_diffusion.models.model import LatentDiffusion

        recipe, autoencoder, text_encoder = self
        return LatentDiffusion(dit, recipe.make_objective(recipe.stages[0]), load_vae=lambda: autoencoder,
                               load_text_encoder=lambda: text_encoder, text_length=recipe.text_length,
                               precision=recipe.precision)  # fmt: skip

    def draw(self, captions: Sequence[str], dit: "DiT") -> "Image.Image":
        """The captions as the weights of the moment draw them, always from the same noise."""
        from micro_diffusion.runtime.report import grid, pictures

        images = self.model(dit).generate(captions, seed=self.recipe.seed, **SAMPLING)
        return grid(pictures(images), captions, columns=4)

    def release(self, folder: Path, state: "State") -> None:
        """Write the weights of the moment as a model folder."""
        from micro_diffusion.models.checkpoints import ModelCard, Part, write_folder

        recipe, autoencoder, text_encoder = self
        stage, shown = recipe.stages[state.stage], state.shown
        parts = Part(recipe.autoencoder, autoencoder.sha256), Part(recipe.text_encoder, text_encoder.sha256)
        card = ModelCard(shown.config, recipe.make_objective(stage), *parts, stage.resolution, state.images,
                         recipe.name, recipe.text_length)  # fmt: skip
        write_folder(folder, shown.state_dict(), card=card)
