import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from micro_diffusion.data.loader import Loader
from micro_diffusion.models.dit import DiT
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.feed import feed
from micro_diffusion.training.guard import Guard, TrainingFailed, Trouble, data_position, judge, stretches, watch
from micro_diffusion.training.optim import Step

NAN = math.nan


def verdicts(losses: list[float], *, skips: int = 3, limit: float = 10.0) -> list[tuple[str, int] | None]:
    """What is said after each of the steps, of eight images each, of which the last hundred are seen."""
    steps = [[8 * index, None if math.isnan(loss) else loss] for index, loss in enumerate(losses)]
    return [judge(steps[max(0, end - 100) : end], skips=skips, limit=limit) for end in range(1, len(steps) + 1)]


def noisy(count: int, level: float = 1.0, *, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [level * generator.lognormvariate(0, 0.2) for _ in range(count)]


def test_three_high_losses_in_a_row_are_a_jump_from_the_first_of_them() -> None:
    found = verdicts(noisy(40) + noisy(3, 20.0))
    assert found[:-1] == [None] * 42
    assert found[-1] is not None and found[-1][1] == 8 * 40
    assert "the loss jumped from" in found[-1][0]


@pytest.mark.parametrize(
    "losses",
    [
        [1.0] * 60,
        [1.0] * 40 + [1.4] * 40,  # nothing moved before, so a deviation counts as 5%
        [*noisy(40), 50.0, *noisy(40), 50.0, 50.0, *noisy(40)],
        [math.exp(index / 100) for index in range(600)],
        noisy(40, 20.0) + noisy(40),
        [5.0] * 10 + [100.0] * 6,  # too early to tell
        [NAN, NAN, *noisy(40)],
        [*noisy(40), NAN, NAN, *noisy(100, seed=1), NAN, NAN],
    ],
    ids=["constant", "small", "one or two", "drift", "fall", "early", "skipped at the start", "skips far apart"],
)
def test_no_alarm(losses: list[float]) -> None:
    assert verdicts(losses) == [None] * len(losses)


@pytest.mark.parametrize("seed", range(5))
def test_no_alarm_from_noise_or_warm_up(seed: int) -> None:
    falling = [loss * (0.3 + math.exp(-index / 50)) for index, loss in enumerate(noisy(1000, seed=seed))]
    assert not any(verdicts(falling))


def test_repeated_skips_are_trouble_from_the_first() -> None:
    found = verdicts([NAN, *noisy(3), NAN, *noisy(5), NAN])
    assert found[-1] == ("3 of 11 steps were not finite", 0)
    assert not any(found[:-1])
    assert not any(verdicts([NAN] * 50, skips=0))
    assert not any(verdicts(noisy(40) + noisy(3, 50.0), limit=0))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), max_size=5))
def test_the_data_without_windows_is_what_is_left_of_the_numbers(troubles: list[tuple[int, int]]) -> None:
    """Against a list of positions from which each trouble takes away those between two counts of images."""
    size, guard, left = 4, Guard(), list(range(400))
    for first, count in troubles:
        start, stop = size * first, size * (first + count)
        guard = guard.after(Trouble("test", start, stop), limit=9)
        del left[start:stop]
    assert [data_position(images, guard.windows) for images in range(200)] == left[:200]
    for begin in (0, 12, 64):
        ranges = stretches(begin, 160, guard.windows, size=size)
        assert [position for first, last in ranges for position in range(first, last)] == left[begin:160]
        assert all((last - first) % size == 0 for first, last in ranges)
    assert stretches(160, 160, guard.windows, size=size) == []


def test_after_the_last_rollback_it_fails_with_a_report() -> None:
    guard = Guard()
    for number in range(2):
        guard = guard.after(Trouble(f"reason {number}", 8 * number, 8 * number + 8), limit=2)
    with pytest.raises(TrainingFailed, match="3 times.*images 0 to 8: reason 0; .* reason 1; .*80 to 88: reason 2"):
        guard.after(Trouble("reason 2", 80, 88), limit=2)
    assert TrainingFailed.exit_code == 3


def test_skipped_batches_are_named(recipe: Recipe, loaders: dict[int, Loader], tmp_path: Path) -> None:
    loader = loaders[64]
    loader.latents[7 * 9 % 20, 0, 0, 0] = NAN  # type: ignore[attr-defined]
    guard = Guard(windows=[[8, 16]])
    for before, loss in ((0, 1.0), (8, NAN), (16, 2.0)):
        step = Step(torch.tensor(1.0), torch.tensor(not math.isnan(loss)))
        guard.add(before, torch.tensor(loss), step)
    assert guard.read(replace(recipe, guard_skips=2), recipe.stages[0], loader, log=tmp_path / "log") is None
    assert guard.steps == [[0, 1.0], [8, None], [16, 2.0]] and not guard.pending
    (line,) = (tmp_path / "log").read_text().splitlines()
    keys = [str(position * 7 % 20) for position in range(16, 24)]
    assert f'"position": 16, "keys": {keys}'.replace("'", '"') in line
    assert "broken data: none" in line
    guard.windows = []
    guard.add(8, torch.tensor(1.0), Step(torch.tensor(NAN), torch.tensor(False)))
    trouble = guard.read(replace(recipe, guard_skips=2), recipe.stages[0], loader, log=tmp_path / "log")
    assert trouble == Trouble("2 of 4 steps were not finite", 8, 16)
    assert "broken data: ['3']" in (tmp_path / "log").read_text().splitlines()[1]


@pytest.mark.parametrize(("capacity", "untaken", "most"), [(2.0, 0.0, 2.0), (0.5, None, None)])
def test_what_is_watched(
    recipe: Recipe, loaders: dict[int, Loader], capacity: float, untaken: float | None, most: float | None
) -> None:
    """Two experts of capacity 2 take every token each; with less, load is bounded by how many tokens there are."""
    stage = replace(recipe.stages[0], mask_ratio=0.0)
    model = replace(recipe.model, num_experts=2, experts_every_n=1, expert_capacity=capacity)
    recipe = replace(recipe, model=model)
    dit = DiT(recipe.stage_model(stage, downscale=8))
    (batch,) = feed(loaders[64], recipe, stage, patches=4, data=[(0, 8)], device=torch.device("cpu"))
    largest = []
    hooks = [block.register_forward_hook(lambda m, i, o: largest.append(o.x.abs().max())) for block in dit.blocks]
    row = watch(dit, batch, recipe=recipe, stage=stage, mask_ratio=stage.mask_ratio)
    for hook in hooks:
        hook.remove()
    norm = torch.cat([parameter.double().flatten() for parameter in dit.parameters()]).norm().item()
    assert row["weight_norm"] == pytest.approx(norm)
    assert row["activation_max"] >= max(largest).item()
    if untaken is not None:
        assert (row["experts/untaken"], row["experts/most"]) == (untaken, most)
    else:  # of 4 tokens, two experts take one each
        assert 0.5 <= row["experts/untaken"] <= 0.75 and row["experts/most"] in (1, 2)
    assert not any(module._forward_hooks for module in dit.modules())
    assert all(parameter.grad is None for parameter in dit.parameters())
