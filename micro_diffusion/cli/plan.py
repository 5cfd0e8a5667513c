"""`micro-diffusion plan` and `bench`: what a recipe costs, before it is paid for, and how fast this machine is."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from micro_diffusion.cli.quickstart import scaled
from micro_diffusion.cli.train import find_recipe
from micro_diffusion.runtime.files import UserError, write_atomic
from micro_diffusion.runtime.parse import choose, read_json

if TYPE_CHECKING:
    from rich.table import Table

    from micro_diffusion.planning.cost import Machine, Work
    from micro_diffusion.training.config import Recipe

BENCH = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "micro-diffusion", "bench.json")
TYPICAL_TOKENS = 16  # of a caption, where a recipe takes them as long as they are
ADVICE = "--parallel fsdp, larger GPUs, or train --activation-checkpointing."
GUESS = "Speed: the part of its peak that an H200 gave XL; for all else, a guess."


@dataclass(frozen=True)
class Plan:
    """Count images, FLOPs, hours, dollars and memory of a recipe, stage by stage (docs/training.md)."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """A recipe's name, a recipe.json, or file.py:function, as for train."""
    gpu: str | None = None
    """h100, a100-80gb, rtx-4090, ...; default: this machine."""
    count: int = 1
    """GPUs."""
    price: float | None = None
    """Dollars for an hour of one GPU; default: typical of the GPU."""
    budget: float | None = None
    """Dollars: the stages are shortened in proportion until it pays for them."""
    out: Annotated[Path | None, arg(metavar="FILE.json")] = None
    """Write the recipe as planned, for train."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How train spreads the model; fsdp divides weights and moments among the GPUs."""

    def __call__(self) -> None:
        from rich.console import Console

        if self.count < 1 or (self.price or 0) < 0:
            raise UserError("A plan needs a --count of at least 1, and a --price that is not negative.")
        recipe = find_recipe(self.recipe)
        for stage in recipe.stages:
            if stage.batch_size % self.count:
                raise UserError(f"{stage.name!r}: batches of {stage.batch_size} do not divide among {self.count} GPUs.")
        machine, name = self.machine()
        price = machine.gpu.price if self.price is None and machine.gpu else self.price
        if self.budget is not None:
            hours = sum(map(machine.seconds, works_of(recipe))) / 3600
            recipe = affordable(recipe, self.budget, dollars=hours * self.count * (price or 0))
        shown = table(works_of(recipe), machine, price=price)
        shown.title = f"{recipe.name} on {self.count} x {name}"
        if self.out:
            write_atomic(self.out, recipe.to_json())
        Console(width=None if os.isatty(1) else 120).print(shown)

    def machine(self) -> "tuple[Machine, str]":
        """The GPUs of that name, or those here, with what was measured on such a one; and the name."""
        from micro_diffusion.planning.cost import Machine
        from micro_diffusion.runtime.device import pick_device
        from micro_diffusion.runtime.hardware import GPUS, device_name, gpu_of

        gpu = choose(GPUS, self.gpu, "GPU") if self.gpu else gpu_of(pick_device())
        name = self.gpu or device_name(pick_device())
        bench = read_json(BENCH.read_text(), str(BENCH)) if BENCH.is_file() else {}
        speeds = bench["speeds"] if bench.get("device") in (gpu.names if gpu else (name,)) else {}
        return Machine(gpu, self.count, self.count if self.parallel == "fsdp" else 1, speeds), name


@dataclass(frozen=True)
class Bench:
    """Measure how fast this machine trains a recipe, in about two minutes; plan uses it."""

    recipe: Annotated[Positional[str | None], arg(metavar="RECIPE")] = None
    """As for train; default: paper-37m on a GPU, else quickstart."""
    out: Annotated[Path, arg(metavar="FILE")] = BENCH
    """Where to write; plan looks at the default."""

    def __call__(self) -> None:
        import torch

        from micro_diffusion.planning.measure import measure
        from micro_diffusion.runtime.device import pick_device
        from micro_diffusion.runtime.hardware import device_name
        from micro_diffusion.training.optim import guarded_step, make_optimizer

        device = pick_device()
        recipe = find_recipe(self.recipe or ("paper-37m" if device.type == "cuda" else "quickstart"))

        def optimizer(dit: torch.nn.Module) -> Any:
            made, loss = make_optimizer(dit, recipe), torch.zeros((), device=device)
            return lambda: guarded_step(made, loss, lr=1e-4, clip_norm=1.0)

        kinds = {work.kind(ratio): (work, ratio) for work in works_of(recipe) for _, ratio in work.spans}
        found = {"device": device_name(device), "torch": torch.__version__, "recipe": recipe.name}
        old = read_json(self.out.read_text(), str(self.out)) if self.out.is_file() else {}
        ended_early = found.items() <= old.items() and old["speeds"].keys() < kinds.keys()
        speeds: dict[str, Any] = old["speeds"] if ended_early else {}
        for kind, (work, ratio) in (each for each in kinds.items() if each[0] not in speeds):
            speed = speeds[kind] = measure(work, ratio, device, optimizer)
            print(f"{work.name}, mask {ratio:g}: {speed[0] / 1e12:.3g} TFLOP/s", flush=True)
            write_atomic(self.out, json.dumps(found | {"speeds": speeds}, indent=2) + "\n")
        print(f"{self.out}: what 'micro-diffusion plan {recipe.name}' goes by on this machine")


def affordable(recipe: "Recipe", budget: float, *, dollars: float) -> "Recipe":
    """The recipe with its stages shortened in proportion, from costing `dollars` to within the budget."""
    if not dollars:
        raise UserError("A --budget needs the --price of an hour.")
    least = dollars * max(2 * stage.batch_size / stage.images for stage in recipe.stages)
    if budget < least:
        raise UserError(f"${budget:,.2f} is too little for two batches of every stage: give ${least:,.2f} or more.")
    shorter = scaled(recipe, min(1.0, budget / dollars))
    shorter.validate()
    return shorter


def works_of(recipe: "Recipe") -> "list[Work]":
    """The stages as the planner sees them."""
    from micro_diffusion.planning.cost import Work

    length, works = recipe.text_length or TYPICAL_TOKENS, []
    # pixels to a latent: a DC-AE's name tells them, as in dc-ae-f32c32; all others here have 8
    downscale = next((each for each in (32, 64, 128) if f"-f{each}c" in recipe.autoencoder), 8)
    for stage in recipe.stages:
        model, averages = recipe.stage_model(stage, downscale=downscale), len(stage.ema_sigma_rel)
        spans = tuple((stop - start, ratio) for start, stop, ratio in stage.mask_spans)
        works.append(Work(stage.name, model, spans, stage.batch_size, length, recipe.precision, recipe.compile,
                          averages or int(stage.ema_halflife_images > 0)))  # fmt: skip
    return works


def table(works: "list[Work]", machine: "Machine", *, price: float | None) -> "Table":
    """A row a stage, the total, and what the numbers rest on."""
    from rich.table import Table

    from micro_diffusion.planning.cost import fit, picture_bytes

    shown, sums, notes = Table("stage"), [0.0, 0.0, 0.0], []
    for name in ("images", "EFLOP", "images/s", "hours", "dollars", "GB a GPU", "micro-batch"):
        shown.add_column(name, justify="right")

    def add(name: str, row: Sequence[float], *memory: str) -> None:
        images, flops, hours = row
        dollars = "" if price is None else f"{hours * machine.gpus * price:,.2f}"
        speed, time = f"{images / hours / 3600:,.0f}", f"{hours:,.{2 if hours >= 1 else 4}f}"
        shown.add_row(name, f"{images:,.0f}", f"{flops:,.4g}", speed, time, dollars, *memory)

    for work in works:
        flops, (size, memory) = sum(images * work.flops(ratio) for images, ratio in work.spans), fit(work, machine)
        row = sum(images for images, _ in work.spans), flops / 1e18, machine.seconds(work) / 3600
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        add(work.name, row, f"{memory:.1f}", f"{size or 'does not fit'}")
        notes += [] if size else [f"{work.name} does not fit: {ADVICE}"]
    shown.add_section()
    add("total", sums)
    kinds, stored = {work.kind(ratio) for work in works for _, ratio in work.spans}, picture_bytes(works)
    notes += [GUESS if kinds - machine.measured.keys() else "Speed: measured by micro-diffusion bench."]
    notes += [f"A picture takes {stored:,} bytes in a store, a million {stored / 1e3:,.0f} GB."]
    notes += ["Not counted: preparing latents, samples, validation, checkpoints, compilation."]
    shown.caption, shown.caption_justify = "\n".join(notes), "left"
    return shown
