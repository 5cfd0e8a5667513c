import numpy as np
import pytest
import torch
from torch import Tensor

from micro_diffusion.diffusion.objectives import EDM, OBJECTIVES, Flow, Network, Prediction
from micro_diffusion.runtime.random import draw_normal

LEVELS = {"edm": [0.002, 0.3, 1.0, 80.0], "flow": [0.01, 0.3, 0.7, 0.98]}


def draw(purpose: str, *shape: int) -> Tensor:
    return draw_normal(0, purpose, torch.arange(shape[0]), shape[1:]).double()


def optimal_network(objective: EDM | Flow, std: float, *, offset: float = 0.0) -> Network:
    """The best network for Gaussian data of that standard deviation, or one that is off; written out anew."""

    def edm(x: Tensor, label: Tensor) -> Prediction:
        sigma, d = (4 * label).exp()[:, None, None, None], objective.sigma_data
        x = x * (sigma**2 + d**2).sqrt()
        clean = x * std**2 / (std**2 + sigma**2)
        c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2).sqrt()
        return Prediction((clean - c_skip * x) / c_out + offset)

    def flow(x: Tensor, label: Tensor) -> Prediction:
        t = (4 * label).sigmoid()[:, None, None, None]
        clean = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * x
        return Prediction((x - clean) / t + offset)

    return edm if isinstance(objective, EDM) else flow


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("std", [0.9, 0.5])
def test_least_loss_is_the_posterior_variance(name, std):
    objective = OBJECTIVES[name]()
    latents, noise = std * draw("data", 16, 4, 64, 64), draw("noise", 16, 4, 64, 64)
    level = torch.tensor(LEVELS[name], dtype=torch.float64).repeat(4)
    if name == "edm":
        weight = (level**2 + 0.9**2) / (level * 0.9) ** 2
        expected = weight * std**2 * level**2 / (std**2 + level**2)
    else:
        expected = std**2 / ((1 - level) ** 2 * std**2 + level**2)  # posterior variance over t^2
    least, *others = (
        objective.loss(optimal_network(objective, std, offset=offset), latents, level, noise, patch_size=2)
        for offset in (0.0, 0.2, -0.2)
    )
    torch.testing.assert_close(least.per_image, expected, rtol=0.05, atol=0)
    torch.testing.assert_close(least.mean, expected.mean(), rtol=0.02, atol=0)
    for other in others:
        torch.testing.assert_close(other.per_image, least.per_image + 0.2**2, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_denoise_undoes_the_preconditioning(name):
    objective, std = OBJECTIVES[name](), 0.5
    x, level = draw("x", 4, 2, 4, 6), torch.tensor(LEVELS[name], dtype=torch.float64)
    alpha, column = (1, level) if name == "edm" else (1 - level, level)
    factor = alpha * std**2 / (alpha**2 * std**2 + column**2)
    dropped = torch.tensor([[True, False]] * 4)
    sample, passed_on = objective.denoise(
        lambda x, label: Prediction(optimal_network(objective, std)(x, label).sample, dropped), x, level
    )
    torch.testing.assert_close(sample, factor[:, None, None, None] * x)
    assert passed_on is dropped


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_loss_is_the_mean_over_kept_patches(name):
    objective, b, c, h, w, patch = OBJECTIVES[name](), 4, 3, 4, 6, 2
    latents, noise, output = (draw(purpose, b, c, h, w) for purpose in ("latents", "noise", "output"))
    level = torch.tensor(LEVELS[name], dtype=torch.float64)
    dropped = draw("mask", b, h * w // patch**2).argsort(1) >= 2

    def network(x: Tensor, label: Tensor) -> Prediction:
        return Prediction(output, dropped)

    terms = objective.loss(network, latents, level, noise, patch_size=patch)
    clean = objective.denoise(network, objective.noised(latents, level, noise), level).sample
    expected = []
    for i, s in enumerate(level.tolist()):
        weight = (s**2 + 0.9**2) / (s * 0.9) ** 2 if name == "edm" else 1 / s**2
        error = weight * (clean - latents)[i].numpy() ** 2
        rows_of_patches = [np.split(row, w // patch, axis=2) for row in np.split(error, h // patch, axis=1)]
        means = np.array([part.mean() for row in rows_of_patches for part in row])
        expected.append(means[~dropped[i].numpy()].mean())
    torch.testing.assert_close(terms.per_image, torch.tensor(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(terms.mean, terms.per_image.mean())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_ignores_dropped_patches_and_neighbours(name):
    objective, level = OBJECTIVES[name](), torch.tensor(LEVELS[name])
    latents, noise, output = (draw(purpose, 4, 2, 4, 4).float() for purpose in ("latents", "noise", "output"))
    output.requires_grad_()
    dropped = torch.tensor([[True, False, True, True], [False, True, True, True]] * 2)

    def loss(rows: slice) -> Tensor:
        network = lambda x, label: Prediction(output[rows], dropped[rows])  # noqa: E731
        return objective.loss(network, latents[rows], level[rows], noise[rows], patch_size=2).per_image

    whole = loss(slice(None))
    assert torch.equal(whole, torch.cat([loss(slice(0, 1)), loss(slice(1, 4))]))
    whole.sum().backward()
    touched = output.grad.unflatten(3, (2, 2)).unflatten(2, (2, 2)).abs().sum((1, 3, 5)).flatten(1) > 0
    assert torch.equal(touched, ~dropped)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_denoiser_stay_float32_when_the_network_does_not(name):
    objective, level = OBJECTIVES[name](), torch.tensor(LEVELS[name])
    x = draw("x", 4, 2, 4, 4).float()
    seen = []

    def network(x: Tensor, label: Tensor) -> Prediction:
        seen.extend([x.dtype, label.dtype])
        return Prediction(x.bfloat16())

    assert objective.denoise(network, x, level).sample.dtype == torch.float32
    assert objective.loss(network, x, level, x, patch_size=2).mean.dtype == torch.float32
    assert set(seen) == {torch.float32}


def test_edm_loss_keeps_its_digits_at_small_sigma():
    latents, noise, output = (draw(purpose, 1, 4, 8, 8) for purpose in ("latents", "noise", "output"))
    exact, single = (
        EDM()
        .loss(
            lambda x, label: Prediction(output.to(x.dtype)),
            latents.to(dtype),
            torch.tensor([1e-4], dtype=dtype),
            noise.to(dtype),
            patch_size=2,
        )
        .mean.item()
        for dtype in (torch.float64, torch.float32)
    )
    assert single == pytest.approx(exact, rel=1e-6)


def test_noise_labels():
    sigma = torch.tensor([0.002, 1.0, 80.0])
    torch.testing.assert_close(EDM().noise_label(sigma), sigma.log() / 4)
    ratio = torch.tensor([0.02, 1.0, 80.0])
    torch.testing.assert_close(Flow().noise_label(ratio / (1 + ratio)), EDM().noise_label(ratio))
    ends = Flow().noise_label(torch.tensor([0.0, 1e-30, 1.0]))
    assert ends.isfinite().all() and ends[0] == ends[1] and ends[2].item() == pytest.approx(-ends[0].item(), rel=1e-5)


def test_training_levels():
    normal = torch.tensor([-1.0, 0.0, 2.0])
    torch.testing.assert_close(EDM(p_mean=0.0, p_std=0.6).noise_level(normal), (0.6 * normal).exp())
    torch.testing.assert_close(Flow(mean=0.5, std=2.0).noise_level(normal), (0.5 + 2 * normal).sigmoid())


@pytest.mark.parametrize("objective", [EDM(), Flow(), Flow(shift=3.0)])
def test_sampling_starts_from_pure_noise_and_ends_without(objective):
    noise, levels = draw("noise", 2, 1, 2, 2).float(), objective.levels(3)
    start = objective.start(noise)
    assert len(levels) == 4 and levels[-1] == 0 and start.dtype == noise.dtype
    torch.testing.assert_close(start, levels[0].float() * noise)
    torch.testing.assert_close(start, objective.noised(0 * noise, levels[:1].float().expand(2), noise))
    assert objective.alpha(levels)[-1] == 1
