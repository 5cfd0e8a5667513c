from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.metric_fid import fid_statistics_to_metric

from micro_diffusion.evaluation.frechet import Moments, frechet_distance, rbf_distance
from micro_diffusion.runtime.files import UserError


def of(features: Tensor, *, batch: int = 7) -> Moments:
    moments = Moments()
    for part in features.split(batch):
        moments.update(part)
    return moments


def gaussian(mean: Tensor, covariance: Tensor) -> Moments:
    return Moments(count=2, mean=mean.double(), scatter=covariance.double())  # the scatter of two is the covariance


def random_covariance(size: int, generator: torch.Generator, *, rank: int | None = None) -> Tensor:
    root = torch.randn(size, rank or size, generator=generator, dtype=torch.float64)
    return root @ root.T / size


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), count=st.integers(2, 60), batch=st.integers(1, 60), offset=st.sampled_from([0, 1e3]))
def test_moments_are_numpys_whatever_the_batches(seed: int, count: int, batch: int, offset: float) -> None:
    features = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, 6) + offset
    moments = of(features, batch=batch)
    exact = features.double().numpy()
    assert moments.count == count
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.scatter / (count - 1), np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-9)


def test_far_from_zero_the_covariance_keeps_its_digits() -> None:
    features = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near, far = of(features, batch=99), of(features + 1e7, batch=99)
    torch.testing.assert_close(far.scatter, near.scatter, rtol=1e-7, atol=1e-4)


def test_memory_does_not_grow_with_the_features() -> None:
    moments = of(torch.ones(500, 4))
    assert moments.features.numel() == 0 and moments.scatter.shape == (4, 4)


@pytest.mark.parametrize("size", [1, 6, 40])
def test_distance_of_commuting_gaussians_is_that_of_their_deviations(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    a, b = (torch.rand(2, size, generator=generator, dtype=torch.float64) * 3).unbind()
    means = torch.randn(2, size, generator=generator, dtype=torch.float64)
    first = gaussian(means[0], basis @ torch.diag(a**2) @ basis.T)
    second = gaussian(means[1], basis @ torch.diag(b**2) @ basis.T)
    closed = ((means[0] - means[1]) ** 2).sum() + ((a - b) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(closed.item(), rel=1e-9)


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0, np.pi / 2])
def test_distance_of_two_lines_depends_on_the_angle_between_them(angle: float) -> None:
    """For covariances s^2 uu' and t^2 vv' the root's trace is s t |u.v|: singular both, and they do not commute."""
    u, v = torch.tensor([1.0, 0, 0]).double(), torch.tensor([np.cos(angle), np.sin(angle), 0]).double()
    first, second = (gaussian(torch.zeros(3), s**2 * torch.outer(w, w)) for s, w in ((2.0, u), (3.0, v)))
    assert frechet_distance(first, second) == pytest.approx(4 + 9 - 2 * 2 * 3 * abs(np.cos(angle)), abs=1e-6)


@pytest.mark.parametrize("rank", [None, 4])
def test_distance_is_torch_fidelitys(rank: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    pair = [
        gaussian(torch.randn(20, generator=generator), random_covariance(20, generator, rank=rank)) for _ in range(2)
    ]
    theirs = fid_statistics_to_metric(*({"mu": m.mean.numpy(), "sigma": m.scatter.numpy()} for m in pair), False)
    assert frechet_distance(*pair) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert frechet_distance(*pair) == pytest.approx(frechet_distance(*pair[::-1]), rel=1e-6)
    assert frechet_distance(pair[0], pair[0]) == pytest.approx(0, abs=1e-5)


def test_samples_of_one_gaussian_come_near_as_they_grow() -> None:
    draw = torch.Generator().manual_seed(0)
    few, many = (
        frechet_distance(*(of(torch.randn(count, 8, generator=draw), batch=500) for _ in range(2)))
        for count in (50, 5000)
    )
    assert many < few / 20  # the bias falls with the count


def test_saved_statistics_give_the_same_number(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    true, other = (of(torch.randn(30, 6, generator=draw)) for _ in range(2))
    true.made |= {"network": "somebody's", "weights": "0123"}
    true.save(tmp_path / "true.safetensors")
    again = Moments.load(tmp_path / "true.safetensors")
    assert (again.count, again.made) == (true.count, true.made)
    assert frechet_distance(again, other) == frechet_distance(true, other)


def test_other_files_are_no_statistics(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no statistics")
    save_file({"mean": torch.zeros(2)}, tmp_path / "bare")
    save_file({"mean": torch.zeros(2)}, tmp_path / "uncounted", metadata={"network": "somebody's"})
    save_file({"mean": torch.zeros(2)}, tmp_path / "lacking", metadata={"count": "3"})
    for name in ("text", "bare", "uncounted", "lacking", "absent"):
        with pytest.raises(UserError, match=f"{name} is no folder and no reference statistics"):
            Moments.load(tmp_path / name)


def test_rbf_distance_is_the_biased_estimate() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 3, generator=draw), torch.randn(5, 3, generator=draw) + 1

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([np.exp(-np.sum((i - j) ** 2) / (2 * 2.0**2)) for i in x for j in y]))

    x, y = a.double().numpy(), b.double().numpy()
    assert rbf_distance(a, b, sigma=2.0) == pytest.approx(mean(x, x) + mean(y, y) - 2 * mean(x, y), rel=1e-9)
    assert rbf_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_rbf_distance_does_not_depend_on_its_blocks() -> None:
    """Every feature three times over leaves each mean as it is."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(400, 3, generator=draw), torch.randn(300, 3, generator=draw) + 0.5
    assert rbf_distance(a.repeat(3, 1), b.repeat(3, 1)) == pytest.approx(rbf_distance(a, b), rel=1e-9)
