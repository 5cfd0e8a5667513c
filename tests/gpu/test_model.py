"""The transformer on CUDA: the CPU's numbers, bfloat16, compiled, and the guarded step. Needs only torch."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.one_hot import use_one_hot_experts
from micro_diffusion.diffusion.objectives import EDM, Prediction
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.runtime.device import autocast
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.optim import guarded_step, make_optimizer

DEVICE = torch.device("cuda")
CHANNELS, WIDTH = 4, 24
CONFIG = replace(
    PRESETS["MicroDiT_Nano_4"](input_size=(16, 24), caption_channels=WIDTH, text_mask="padding"), patch_size=2, dim=128
)


class Result(NamedTuple):
    sample: Tensor
    loss: Tensor
    gradient: Tensor


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions round to TF32 where cuDNN does them, and matrix products once `pick_device` was called."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def dit() -> DiT:
    """With small random weights where a new model has zeros, so that every part counts."""
    torch.manual_seed(0)
    dit = DiT(CONFIG)
    for weight in dit.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    return dit


def run(dit: DiT, network: Callable[..., Prediction], *, mask_ratio: float, precision: str = "float32") -> Result:
    """Forward, masked loss and backward on fixed draws, where the model is; all gradients in a row."""
    device = dit.pos_embed.device
    normal = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(4, CHANNELS, 16, 24, generator=normal).to(device) for _ in range(2))
    text, level = torch.randn(4, 7, WIDTH, generator=normal).to(device), torch.tensor([0.1, 0.5, 1.0, 5.0]).to(device)
    text_mask = (torch.arange(7) < torch.tensor([[3], [7], [1], [5]])).to(device)
    mask_noise = torch.rand(4, dit.num_patches, generator=normal).to(device) if mask_ratio else None
    samples = []

    def conditioned(x: Tensor, label: Tensor) -> Prediction:
        with autocast(device, precision):
            prediction = network(x, label, text, text_mask=text_mask, mask_ratio=mask_ratio, mask_noise=mask_noise)
        samples.append(prediction.sample.detach().float().cpu())
        return prediction

    dit.zero_grad()
    loss = EDM().loss(conditioned, latents, level, noise, patch_size=2).mean
    loss.backward()
    gradients = [weight.grad.flatten() for weight in dit.parameters() if weight.grad is not None]
    assert len(gradients) == len(list(dit.parameters()))
    return Result(samples[0], loss.detach().cpu(), torch.cat(gradients).float().cpu())


def assert_close(found: Result, wanted: Result, *, tolerance: float) -> None:
    for name, ours, theirs in zip(Result._fields, found, wanted, strict=True):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
def test_float32_is_the_cpus(dit: DiT, mask_ratio: float) -> None:
    wanted = run(dit, dit, mask_ratio=mask_ratio)
    dit.to(DEVICE)
    assert_close(run(dit, dit, mask_ratio=mask_ratio), wanted, tolerance=1e-4)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
def test_bf16_is_near(dit: DiT, mask_ratio: float) -> None:
    dit.to(DEVICE)
    wanted = run(dit, dit, mask_ratio=mask_ratio)
    found = run(dit, dit, mask_ratio=mask_ratio, precision="bf16")
    assert not torch.equal(found.sample, wanted.sample)
    assert_close(found, wanted, tolerance=0.05)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
@pytest.mark.parametrize("one_hot", [False, True])
def test_compiled_in_one_graph(dit: DiT, mask_ratio: float, one_hot: bool) -> None:
    dit.to(DEVICE)
    wanted = run(dit, dit, mask_ratio=mask_ratio)
    if one_hot:
        use_one_hot_experts(dit)
    compiled = torch.compile(dit, fullgraph=True, dynamic=False)
    assert_close(run(dit, compiled, mask_ratio=mask_ratio), wanted, tolerance=1e-4)
    torch.compiler.reset()


def test_a_bad_gradient_is_no_step(dit: DiT) -> None:
    dit.to(DEVICE)
    optimizer = make_optimizer(dit, Recipe(name="gpu", model=CONFIG, stages=()))

    def everything() -> list[Tensor]:
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in (*dit.parameters(), *states)]

    def step(poison: float) -> tuple[bool, bool]:
        """Whether the step was taken, and whether anything changed."""
        loss = run(dit, dit, mask_ratio=0.5).loss.to(DEVICE)
        gradient = dit.blocks[1].mlp.gate.weight.grad  # type: ignore[union-attr]
        gradient[0, 0] += poison  # type: ignore[index]
        before = everything()
        taken = guarded_step(optimizer, loss, lr=1e-3, clip_norm=0.5).taken
        assert taken.device.type == DEVICE.type
        same = all(torch.equal(ours, theirs) for ours, theirs in zip(everything(), before, strict=True))
        return bool(taken), not same

    assert step(0.0) == (True, True)
    for poison in (float("nan"), float("inf")):
        assert step(poison) == (False, False)
    assert step(0.0) == (True, True)
