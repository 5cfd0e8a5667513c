"""What a run is: a `Recipe`, which is a model, a list of `Stage`s and the settings they share."""

import dataclasses
import itertools
import json
from dataclasses import dataclass
from typing import Any, Literal

from micro_diffusion.diffusion.objectives import EDM, Flow
from micro_diffusion.models.dit import DiTConfig
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.parse import parse, read_json

INTERVALS = ("log_every", "checkpoint_every", "sample_every", "validate_every", "evaluate_every", "snapshot_every")


@dataclass(frozen=True)
class Stage:
    """One stretch of training: resolution, mask ratio, noise, learning rate, length. Lengths count images seen."""

    name: str
    resolution: int
    """Pixels of the shorter edge; the loader of this resolution feeds the stage."""
    images: int
    """Length of the stage, a whole number of batches."""
    batch_size: int
    """Images of one optimizer step, over all devices."""
    learning_rate: float
    micro_batch: int = 0
    """Images of one forward pass; 0 is the whole batch. Changes memory and speed, never the result."""
    mask_ratio: float = 0.0
    mask_schedule: tuple[tuple[int, float], ...] = ()
    """Changes of mask_ratio, as (images into the stage, ratio from there on): in steps, each one a compilation."""
    warmup_images: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr_ratio: float = 1.0
    """Where the cosine ends, as a part of learning_rate."""
    clip_norm: float = 0.25
    p_mean: float = -0.6
    """Mean of the noise level's normal: of ln(sigma) for EDM, of logit(t) for flow matching."""
    p_std: float = 1.2
    start: Literal["scratch", "weights", "all_but_schedule"] = "weights"
    """What is taken over from the stage before; see `training.stages`."""
    ema_halflife_images: int = 0
    """Half-life of the weight average; 0 switches it off."""
    ema_sigma_rel: tuple[float, ...] = ()
    """Widths of power-function averages (arXiv 2312.02696), relative to the stage, instead of a half-life: the first is
    shown, and snapshots of two give any other width later (`micro-diffusion ema`)."""
    ema_start_images: int = 0
    """Images of this stage after which the average starts, from the weights of that moment."""
    pos_interp_scale: float = 1.0

    @property
    def mask_spans(self) -> tuple[tuple[int, int, float], ...]:
        """(first image of the stage, image after the last one, mask ratio between them)."""
        starts, ratios = zip((0, self.mask_ratio), *self.mask_schedule, strict=True)
        return tuple(zip(starts, (*starts[1:], self.images), ratios, strict=True))

    def mask_ratio_at(self, images: int) -> float:
        """The ratio of the step that begins `images` into the stage."""
        return next(ratio for start, _, ratio in reversed(self.mask_spans) if start <= images)

    def validate(self) -> None:
        """Raise UserError for a setting that cannot work or that does nothing."""

        def need(condition: bool, message: str) -> None:
            require(condition, f"stage {self.name!r}: {message}")

        for name in ("resolution", "images", "batch_size", "learning_rate", "clip_norm", "p_std", "pos_interp_scale"):
            need(getattr(self, name) > 0, f"{name} must be positive")
        for name in ("micro_batch", "warmup_images", "final_lr_ratio", "ema_halflife_images", "ema_start_images"):
            need(getattr(self, name) >= 0, f"{name} must not be negative")
        whole = max(1, round(self.images / self.batch_size)) * self.batch_size
        need(self.images == whole, f"images must be whole batches of {self.batch_size}: {whole} is nearest")
        need(self.micro_batch < self.batch_size, "a micro_batch as large as the batch does nothing: use 0")
        need(self.batch_size % (self.micro_batch or 1) == 0, "micro_batch must divide batch_size")
        for start, stop, ratio in self.mask_spans:
            need(0 <= ratio < 1, "mask_ratio must be at least 0 and below 1")
            need(start < stop, "mask_schedule must rise, from 0 to the stage's end")
            need(start % self.batch_size == 0, f"mask_schedule changes between batches: {start} is within one")
        for (*_, before), (start, _, ratio) in itertools.pairwise(self.mask_spans):
            need(ratio != before, f"mask_schedule does nothing at {start}: the ratio is {ratio} already")
        need(self.warmup_images < self.images, "the warm-up is as long as the stage: shorten warmup_images")
        cosine, ratio = self.schedule == "cosine", self.final_lr_ratio
        need(cosine or ratio == 1, "final_lr_ratio does nothing with a constant schedule: use cosine")
        need(not cosine or ratio < 1, "a cosine to final_lr_ratio 1 does nothing: use constant, or lower it")
        halflife, widths = self.ema_halflife_images, set(self.ema_sigma_rel)
        need(not (halflife and widths), "ema_halflife_images and ema_sigma_rel are two kinds of average: choose one")
        need(all(0 < width < 0.28 for width in widths), "ema_sigma_rel must lie between 0 and 0.28 (a mean of all)")
        need(len(widths) == len(self.ema_sigma_rel), "ema_sigma_rel names a width twice")
        if self.ema_start_images:
            need(bool(halflife or widths), "ema_start_images does nothing without ema_halflife_images or ema_sigma_rel")
            need(self.ema_start_images < self.images, "the EMA would start after the stage: lower ema_start_images")


@dataclass(frozen=True)
class Recipe:
    """A whole run. `recipe.json` in the run folder is this, resolved."""

    name: str
    model: DiTConfig
    """Input size and position scale are set by each stage."""
    stages: tuple[Stage, ...]
    objective: Literal["edm", "flow"] = "edm"
    sigma_data: float = 0.9
    """Standard deviation of the latents (EDM only)."""
    flow_shift: float = 1.0
    """Shift of the sampling grid towards noise (flow matching only)."""
    caption_dropout: float = 0.1
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for the hidden matrices, scaled to AdamW's step size; AdamW for the rest."""
    muon_momentum: float = 0.95
    expert_learning_rate_scale: float = 1.0
    """Of the experts' weights, against the rate of everything else."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    seed: int = 18
    autoencoder: str = "embedded"
    text_encoder: str = "embedded"
    text_length: int | None = None
    """Text positions of every batch; None is the longest caption of each batch."""
    start_from: str | None = None
    """The checkpoint whose weights the first stage starts with; None is random weights."""
    start_from_sha256: str | None = None
    """Hash of those weights."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of the network's forward pass; weights, optimizer and loss stay float32."""
    compile: bool = False
    log_every: int = 1024
    """Images between two rows of the log; the loss is read from the device only then."""
    checkpoint_every: int = 0
    """Images between checkpoints; 0 leaves the one at the end of each stage, as below."""
    sample_every: int = 0
    validate_every: int = 0
    evaluate_every: int = 0
    """Images between the scores of `train --evaluate`."""
    snapshot_every: int = 0
    """Images between the averages that are kept for `micro-diffusion ema`; one is kept at the end of each stage too."""
    guard_skips: int = 5
    """Steps skipped for numbers that are not finite, of the last 100, that roll the run back; 0 never does."""
    guard_zscore: float = 10.0
    """Robust z-score that three losses in a row must exceed to roll the run back; 0 never does."""
    guard_rollbacks: int = 3
    """Rollbacks, each of which skips a stretch of data, after which trouble ends the run."""

    @property
    def images(self) -> int:
        """Images of all stages."""
        return sum(stage.images for stage in self.stages)

    @property
    def ends(self) -> tuple[int, ...]:
        """Images seen at the end of each stage."""
        return tuple(itertools.accumulate(stage.images for stage in self.stages))

    @property
    def intervals(self) -> tuple[int, ...]:
        """Images between the moments at which something other than a step happens."""
        return tuple(getattr(self, name) for name in INTERVALS)

    def stage_model(self, stage: Stage, *, downscale: int) -> DiTConfig:
        """The model at this stage's resolution, `downscale` pixels to a latent; UserError if it does not fit."""
        tile = downscale * self.model.patch_size
        size, rest = stage.resolution // downscale, stage.resolution % tile
        require(not rest, f"stage {stage.name!r}: resolution {stage.resolution} is not a multiple of {tile} pixels")
        return dataclasses.replace(self.model, input_size=size, pos_interp_scale=stage.pos_interp_scale)

    def make_objective(self, stage: Stage) -> EDM | Flow:
        """The stage's loss."""
        if self.objective == "edm":
            return EDM(sigma_data=self.sigma_data, p_mean=stage.p_mean, p_std=stage.p_std)
        return Flow(mean=stage.p_mean, std=stage.p_std, shift=self.flow_shift)

    def validate(self) -> None:
        """Raise UserError for a setting that cannot work or that does nothing."""
        require(len(self.stages) > 0, "a recipe needs at least one stage")
        for stage in self.stages:
            stage.validate()
        require(len({stage.name for stage in self.stages}) == len(self.stages), "two stages have the same name")
        first = self.stages[0]
        require(first.start == "scratch", f"stage {first.name!r} is the first: its start must be 'scratch'")
        for before, stage in itertools.pairwise(self.stages):
            require(stage.start != "scratch", f"stage {stage.name!r} from scratch would waste the stages before it")
            same = (before.resolution, before.pos_interp_scale) == (stage.resolution, stage.pos_interp_scale)
            changed = f"stage {stage.name!r} changes the resolution or pos_interp_scale: its start must be 'weights'"
            require(same or stage.start == "weights", changed)
        require(0 <= self.caption_dropout < 1, "caption_dropout must be at least 0 and below 1")
        require(self.model.pos_interp_scale == 1, "pos_interp_scale of the model does nothing: set the stage's")
        require((self.start_from is None) == (self.start_from_sha256 is None), "start_from goes with its sha256")
        edm, fixed = self.objective == "edm", self.text_length is not None
        require(edm or self.sigma_data == 0.9, "sigma_data does nothing with the flow objective")
        require(not edm or self.flow_shift == 1, "flow_shift does nothing with the edm objective")
        pooled = "text_mask 'none' pools over every text position: set text_length, so that all batches have as many"
        require(fixed or self.model.text_mask == "padding", pooled)
        require(fixed or not self.compile, "compile needs fixed shapes: set text_length")
        require(0 <= self.muon_momentum < 1, "muon_momentum must be at least 0 and below 1")
        require(self.optimizer == "muon" or self.muon_momentum == 0.95, "muon_momentum does nothing with adamw")
        model, scale = self.model, self.expert_learning_rate_scale
        blocks = max(model.depth - 1, model.patch_mixer_depth if model.use_patch_mixer else 0)
        require(scale > 0, "expert_learning_rate_scale must be positive: there is no freezing of experts")
        experts = any(model.is_expert(index) for index in range(blocks))
        require(experts or scale == 1, "expert_learning_rate_scale does nothing without experts")
        averages = any(stage.ema_sigma_rel for stage in self.stages)
        require(averages or not self.snapshot_every, "snapshot_every does nothing without ema_sigma_rel in a stage")
        for name in ("guard_skips", "guard_zscore", "guard_rollbacks"):
            require(getattr(self, name) >= 0, f"{name} must not be negative")
        require(self.log_every > 0, "log_every must be positive")
        for name, every in zip(INTERVALS, self.intervals, strict=True):
            require(0 <= every <= self.images, f"{name} must be between 0 and the run's {self.images} images")

    def to_json(self) -> str:
        """The recipe as text that `from_json` reads back equal."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Read and validate a recipe; UserError names an unknown key and the nearest known one."""
        recipe: Recipe = parse(cls, read_json(text, "recipe"), "recipe")
        recipe.validate()
        return recipe


def differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """One line for each setting that two recipes do not share: `stages.0.learning_rate: 0.001 here, 0.002 there`."""
    here, there = flat(ours), flat(theirs)
    pairs = {key: (here.get(key, "nothing"), there.get(key, "nothing")) for key in [*here, *there]}
    return [f"{key}: {one} here, {other} there" for key, (one, other) in pairs.items() if one != other]


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its dotted path."""

    def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict | list):
            return {prefix[:-1]: value}
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in items for key, leaf in leaves(part, f"{prefix}{name}.").items()}

    return leaves(json.loads(recipe.to_json()))


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
