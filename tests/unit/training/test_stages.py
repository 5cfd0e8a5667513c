from dataclasses import replace

import torch

from micro_diffusion.training.config import Recipe
from micro_diffusion.training.ema import Ema
from micro_diffusion.training.stages import State, first_state, next_state

CPU = torch.device("cpu")


def used_state(recipe: Recipe, stage: int) -> State:
    """A state of which every part has left its first value."""
    state = first_state(recipe, stage=stage, downscale=8, device=CPU)
    state.ema = Ema(state.dit)
    with torch.no_grad():
        for parameter in state.dit.parameters():
            parameter += 1
            state.optimizer.state[parameter]["exp_avg"] += 2
    state.images, state.skipped = 40 * (stage + 1), torch.tensor(5.0)
    return state


def weights(state: State) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in state.dit.named_parameters()}


def test_the_same_seed_is_the_same_model(recipe: Recipe) -> None:
    first, again, other = (
        weights(first_state(replace(recipe, seed=seed), downscale=8, device=CPU)) for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_building_a_model_leaves_the_global_generator_alone(recipe: Recipe) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first_state(recipe, downscale=8, device=CPU)
    assert torch.equal(torch.rand(3), expected)


def test_all_but_schedule_keeps_optimizer_and_average(recipe: Recipe) -> None:
    before = used_state(recipe, 2)
    after = next_state(recipe, before, downscale=8)
    assert after.dit is before.dit
    assert after.optimizer is before.optimizer
    assert after.ema is before.ema
    assert (after.stage, after.images, int(after.skipped)) == (3, 120, 5)


def test_all_but_schedule_drops_an_average_that_the_stage_does_not_continue(recipe: Recipe) -> None:
    assert next_state(recipe, used_state(recipe, 0), downscale=8).ema is None  # stage 2 has none
    restarts = replace(recipe, stages=(*recipe.stages[:3], replace(recipe.stages[3], ema_start_images=8)))
    assert next_state(restarts, used_state(restarts, 2), downscale=8).ema is None


def test_weights_keeps_weights_alone_and_regenerates_positions(recipe: Recipe) -> None:
    before = used_state(recipe, 1)
    expected = weights(before)
    after = next_state(recipe, before, downscale=8)
    assert all(torch.equal(value, expected[name]) for name, value in weights(after).items())
    assert all(not after.optimizer.state[parameter]["exp_avg"].any() for parameter in after.dit.parameters())
    assert after.ema is None
    fresh = first_state(recipe, stage=2, downscale=8, device=CPU)
    assert torch.equal(after.dit.pos_embed, fresh.dit.pos_embed)
    assert after.dit.config == fresh.dit.config
    assert after.dit.num_patches == 4 * before.dit.num_patches


def test_the_average_is_what_is_shown(recipe: Recipe) -> None:
    state = used_state(recipe, 0)
    assert state.ema is not None
    assert state.shown is state.ema.dit
    state.ema = None
    assert state.shown is state.dit
