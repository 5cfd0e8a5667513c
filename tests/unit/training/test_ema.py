from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from micro_diffusion.cli.main import main
from micro_diffusion.diffusion.objectives import EDM
from micro_diffusion.models.checkpoints import ModelCard, Part, read_checkpoint, write_folder
from micro_diffusion.models.dit import DiT
from micro_diffusion.runtime.files import UserError
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.ema import Ema, combination, exponent, follow, reconstruct
from micro_diffusion.training.stages import first_state


def constant(dit: DiT, value: float) -> DiT:
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.fill_(value)
    return dit


def values(dit: DiT) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in dit.parameters()])


def test_half_of_the_difference_remains_after_the_half_life(one_stage: Callable[..., Recipe]) -> None:
    recipe = one_stage(ema_halflife_images=16)
    dit = constant(DiT(recipe.stage_model(recipe.stages[0], downscale=8)), 0.0)
    ema = Ema(dit)
    constant(dit, 1.0)
    for step in range(1, 5):
        assert follow(ema, dit, recipe.stages[0], images=8 * step) is ema
        torch.testing.assert_close(values(ema.dit), torch.full_like(values(dit), 1 - 0.5 ** (step / 2)))
    assert not any(parameter.requires_grad for parameter in ema.dit.parameters())
    assert torch.equal(ema.dit.pos_embed, dit.pos_embed)


@pytest.mark.parametrize("kind", [{"ema_halflife_images": 8}, {"ema_sigma_rel": (0.2,)}])
def test_the_average_starts_past_its_start(one_stage: Callable[..., Recipe], kind: dict[str, object]) -> None:
    recipe = one_stage(ema_start_images=16, **kind)
    dit, stage = DiT(recipe.stage_model(recipe.stages[0], downscale=8)), recipe.stages[0]
    ema = None
    second = 3.5 if stage.ema_halflife_images else 4 - 0.5 ** (exponent(0.2) + 1)
    for images, expected in ((8, None), (16, None), (24, 3.0), (32, second)):
        ema = follow(ema, constant(dit, images / 8), stage, images=images)
        assert (ema is None) == (expected is None)
        if ema is not None and expected is not None:
            torch.testing.assert_close(values(ema.dit), torch.full_like(values(dit), expected))


def test_no_average_without_half_life(one_stage: Callable[..., Recipe]) -> None:
    recipe = one_stage()
    dit = DiT(recipe.stage_model(recipe.stages[0], downscale=8))
    assert follow(None, dit, recipe.stages[0], images=40) is None


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_width_of_a_profile(width: float) -> None:
    """Standard deviation of p(t) ~ t^gamma on [0, 1], by numerical integration."""
    t = (np.arange(1_000_000) + 0.5) / 1_000_000
    profile = t ** exponent(width)
    mean = (profile * t).sum() / profile.sum()
    assert np.sqrt((profile * (t - mean) ** 2).sum() / profile.sum()) == pytest.approx(width, rel=1e-3)


def test_the_power_function_average_weighs_by_its_profile(one_stage: Callable[..., Recipe]) -> None:
    """Against the sum over all steps, each weighted by the integral of t^gamma over it."""
    stage = one_stage(images=400, ema_sigma_rel=(0.05, 0.2)).stages[0]
    torch.manual_seed(0)
    dit, track = DiT(one_stage().stage_model(stage, downscale=8)), torch.randn(50)
    ema = None
    for step, value in enumerate(track.tolist(), 1):
        ema = follow(ema, constant(dit, value), stage, images=8 * step)
    assert ema is not None
    for copy, width in zip(ema.dits, stage.ema_sigma_rel, strict=True):
        edges = (np.arange(51) / 50) ** (exponent(width) + 1)
        assert values(copy)[0].item() == pytest.approx(np.diff(edges) @ track.double().numpy(), abs=1e-5)


def test_factors_for_a_snapshot_itself_are_one_and_zeros() -> None:
    factors, missed = combination([1, 2, 2], [0.1, 0.05, 0.1], time=2, width=0.1)
    assert factors == pytest.approx([0, 0, 1], abs=1e-9) and missed == pytest.approx(0, abs=1e-6)


def test_one_snapshot_is_the_projection_of_the_profile() -> None:
    """With one snapshot least squares is <p, q> / <p, p>, here by numerical integration."""
    t = (np.arange(200_000) + 0.5) / 200_000
    p, q = ((gamma + 1) * t**gamma for gamma in (exponent(0.1), exponent(0.2)))
    factors, missed = combination([5.0], [0.1], time=5.0, width=0.2)
    assert factors == pytest.approx([p @ q / (p @ p)], rel=1e-4)
    assert missed == pytest.approx(np.linalg.norm(factors[0] * p - q) / np.linalg.norm(q), rel=1e-3)


@pytest.mark.slow
def test_any_width_from_snapshots(
    one_stage: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the average of that width followed directly, of weights that wander."""
    recipe = replace(one_stage(images=8 * 400, ema_sigma_rel=(0.05, 0.1)), snapshot_every=160)
    (stage,), wanted = recipe.stages, replace(recipe.stages[0], ema_sigma_rel=(0.075, 0.15))
    state = first_state(recipe, downscale=8, device=torch.device("cpu"))
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    part, direct = Part("embedded", None), None
    generator, noise = torch.Generator().manual_seed(0), torch.zeros(())
    for images in range(8, stage.images + 8, 8):
        noise = 0.9 * noise + torch.randn((), generator=generator)
        constant(state.dit, float(noise) + images / 800)
        state.images = images
        state.ema = follow(state.ema, state.dit, stage, images=images)
        direct = follow(direct, state.dit, wanted, images=images)
        for index, width in enumerate(stage.ema_sigma_rel if images % 160 == 0 and state.ema else ()):
            card = ModelCard(state.dit.config, EDM(), part, part, 64, images, "test")
            shown = state.gathered(index).dit
            write_folder(tmp_path / "averages" / f"{images:012d}-{width}", shown.state_dict(), card=card)
    assert direct is not None and state.ema is not None
    assert len(list((tmp_path / "averages").iterdir())) == 2 * 20
    for copy, width in zip((*direct.dits, state.ema.dits[1]), (0.075, 0.15, 0.1), strict=True):
        assert reconstruct(tmp_path, tmp_path / "out", sigma_rel=width) < 0.01
        weights, card = read_checkpoint(str(tmp_path / "out"))
        assert card.images_seen == stage.images and torch.equal(weights["pos_embed"], state.dit.pos_embed)
        found, expected = weights["final_layer.linear.bias"][0].item(), values(copy)[0].item()
        assert found == pytest.approx(expected, abs=0.01)
        assert abs(expected - values(state.ema.dit)[0].item()) > 0.05  # another average than the one that was kept
    assert main(["ema", str(tmp_path), "--sigma-rel", "0.15", "--out", str(tmp_path / "by-command")]) == 0
    assert "met to 99." in capsys.readouterr().out
    expected, found = (read_checkpoint(str(tmp_path / name))[0] for name in ("out", "by-command"))
    assert expected.keys() == found.keys() and not torch.equal(
        expected["final_layer.linear.bias"], found["final_layer.linear.bias"]
    )
    with pytest.raises(UserError, match="from 0 to 0.28"):
        reconstruct(tmp_path, tmp_path / "out", sigma_rel=0.5)
    with pytest.raises(UserError, match="keeps no averages"):
        reconstruct(tmp_path / "out", tmp_path / "out", sigma_rel=0.1)
