import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from micro_diffusion.runtime.random import BLOCK, derive_seed, draw_normal, draw_uniform

DRAWS = [draw_normal, draw_uniform]
positions = st.lists(st.integers(0, 5 * BLOCK) | st.integers(0, 2**62), max_size=20)
shapes = st.sampled_from([(), (3,), (2, 1, 5), (0,)])


@pytest.mark.parametrize("draw", DRAWS)
@given(batch=positions, shape=shapes, cut=st.integers(0, 20), shuffle=st.randoms(use_true_random=False))
def test_draws_are_the_same_for_any_split_order_and_repetition(draw, batch, shape, cut, shuffle):
    together = draw(7, "noise", torch.tensor(batch, dtype=torch.int64), shape)
    assert together.shape == (len(batch), *shape) and together.dtype == torch.float32
    order = [*range(len(batch)), *range(min(len(batch), 3))]
    shuffle.shuffle(order)
    pieces = [
        draw(7, "noise", torch.tensor(batch, dtype=torch.int64)[part], shape) for part in (order[:cut], order[cut:])
    ]
    assert torch.equal(torch.cat(pieces), together[order])


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_are_independent_of_what_torch_and_numpy_drew(draw):
    first = draw(0, "noise", torch.arange(3))
    torch.manual_seed(5)
    np.random.seed(5)
    state = torch.get_rng_state()
    assert torch.equal(draw(0, "noise", torch.arange(3)), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_normal_draws_are_standard_normal():
    draws = draw_normal(0, "noise", torch.arange(1000), (200,)).flatten().double()
    assert draws.mean().item() == pytest.approx(0, abs=0.01)
    assert draws.var().item() == pytest.approx(1, abs=0.01)
    assert draws.pow(4).mean().item() == pytest.approx(3, abs=0.1)
    for bound, probability in ((-2, 0.02275), (-1, 0.15866), (0, 0.5), (1, 0.84134)):
        assert (draws < bound).double().mean().item() == pytest.approx(probability, abs=0.004)


def test_uniform_draws_fill_the_unit_interval_evenly():
    draws = draw_uniform(0, "mask", torch.arange(1000), (200,)).flatten()
    assert draws.min() >= 0 and draws.max() < 1
    shares = draws.histc(20, 0, 1) / len(draws)
    torch.testing.assert_close(shares, torch.full((20,), 0.05), rtol=0, atol=0.002)


@pytest.mark.parametrize("draw", DRAWS)
def test_seeds_purposes_and_positions_draw_apart(draw):
    """Their correlation is that of independent draws: below 4 / sqrt(count)."""
    here = torch.arange(4 * BLOCK)
    columns = [
        draw(0, "noise", here, (20,)),
        draw(1, "noise", here, (20,)),
        draw(0, "sigma", here, (20,)),
        draw(0, "noise", here + 4 * BLOCK, (20,)),
        draw(0, "noise", here.roll(BLOCK), (20,)),
        draw(0, "noise", here.roll(1), (20,)),
        draw(2**32, "noise", here, (20,)),
    ]
    assert len(torch.cat(columns[:4]).unique(dim=0)) == 4 * len(here)
    correlations = torch.stack([column.flatten() for column in columns]).corrcoef() - torch.eye(len(columns))
    assert correlations.abs().max() < 4 / (len(here) * 20) ** 0.5


def test_seeds_differ_whenever_their_parts_do():
    parts = [
        (),
        ("a",),
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (1,),
        ("1",),
        (1, 2),
        (12,),
        (-1,),
        ('a", "bc',),
        (2**32 + 1,),
    ]
    seeds = [derive_seed(seed, *part) for seed in (0, 1, 2**32) for part in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_odd_file_names_are_parts_too():
    assert derive_seed(3, "caf\udce9.png") != derive_seed(3, "café.png")


def test_numbers_stay_as_they_are():
    """What was trained once can be drawn again: a change here breaks the resuming of runs."""
    assert derive_seed(18, "noise", 0) == 956257773035681325
    normal, uniform = (draw(18, "noise", torch.tensor([0, 64])) for draw in DRAWS)
    torch.testing.assert_close(normal, torch.tensor([0.2003, 1.1640]), rtol=0, atol=1e-4)
    torch.testing.assert_close(uniform, torch.tensor([0.1663, 0.5825]), rtol=0, atol=1e-4)
