from dataclasses import replace
from pathlib import Path

import pytest
import torch

from micro_diffusion.runtime.files import UserError
from micro_diffusion.training import checkpoint
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.ema import Ema
from micro_diffusion.training.stages import State, first_state

CPU = torch.device("cpu")


def random_state(recipe: Recipe, images: int, *, ema: bool = True) -> State:
    state = first_state(recipe, stage=2, downscale=8, device=CPU)
    state.ema, state.images, state.skipped = Ema(state.dit) if ema else None, images, torch.tensor(2.0)
    torch.manual_seed(images)
    for tensor in tensors(state).values():
        tensor.copy_(torch.randn_like(tensor))
    return state


def save(folder: Path, state: State, recipe: Recipe, **keep: int) -> Path:
    saver = checkpoint.Saver(folder, recipe, **keep)
    saver.save(state)
    saver.wait()
    saver.close()
    return folder / f"{state.images:012d}"


def tensors(state: State) -> dict[str, torch.Tensor]:
    found = {f"dit.{name}": value for name, value in state.dit.state_dict().items()}
    for name, parameter in state.dit.named_parameters():
        found |= {f"optimizer.{name}.{key}": value for key, value in state.optimizer.state[parameter].items()}
    if state.ema:
        found |= {f"ema.{name}": value for name, value in state.ema.dit.state_dict().items()}
    return found


@pytest.mark.parametrize("ema", [False, True])
def test_loads_what_was_saved_to_the_bit(recipe: Recipe, tmp_path: Path, ema: bool) -> None:
    saved = random_state(recipe, 96, ema=ema)
    path = save(tmp_path, saved, recipe)
    loaded = checkpoint.load(path, recipe, downscale=8, device=CPU)
    expected, found = tensors(saved), tensors(loaded)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (loaded.stage, loaded.images, int(loaded.skipped)) == (2, 96, 2)


def test_keeps_the_newest_two(recipe: Recipe, tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for images in (88, 96, 104):
        save(tmp_path, random_state(recipe, images), recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000096", "000000000104"]
    assert checkpoint.latest(tmp_path) == tmp_path / "000000000104"


def test_half_a_checkpoint_is_none(recipe: Recipe, tmp_path: Path) -> None:
    good = save(tmp_path, random_state(recipe, 88), recipe)
    (tmp_path / ".tmp-000000000096").mkdir()
    (tmp_path / "000000000104").mkdir()
    assert checkpoint.latest(tmp_path) == good


def test_another_recipe_is_refused_by_name(recipe: Recipe, tmp_path: Path) -> None:
    path = save(tmp_path, random_state(recipe, 88), recipe)
    with pytest.raises(UserError, match=r"eps: 1e-06 here, 1e-08 there; seed: 5 here, 3 there"):
        checkpoint.load(path, replace(recipe, seed=5, eps=1e-6), downscale=8, device=CPU)
