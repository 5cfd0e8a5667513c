from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from micro_diffusion.runtime.distributed import World
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
    loaded = checkpoint.load(path, recipe, partial(first_state, recipe, downscale=8, device=CPU))
    expected, found = tensors(saved), tensors(loaded)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (loaded.stage, loaded.images, int(loaded.skipped)) == (2, 96, 2)


def test_names_on_the_disk_stay(recipe: Recipe, tmp_path: Path) -> None:
    state = random_state(recipe, 96)
    path = save(tmp_path, state, recipe)
    names = {name.replace("dit.", "weights.", 1) for name in tensors(state)}
    assert dcp.FileSystemReader(path).read_metadata().state_dict_metadata.keys() == {"skipped", *names}


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_share_what_all_of_them_have(recipe: Recipe, size: int) -> None:
    """Each copies and writes its own part, about as much as the others."""
    state = checkpoint._tensors(random_state(recipe, 96))
    parts = [checkpoint._copy_part(state, World(rank, size)) for rank in range(size)]
    assert sorted(name for part in parts for name in part) == sorted(state)
    assert all(torch.equal(tensor, state[name]) for part in parts for name, tensor in part.items())
    written = [sum(tensor.nbytes for tensor in part.values()) for part in parts]
    assert max(written) - min(written) <= max(tensor.nbytes for tensor in state.values())


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
        checkpoint.load(path, replace(recipe, seed=5, eps=1e-6), partial(first_state, recipe, downscale=8, device=CPU))


def test_keeps_the_first_past_each_multiple(recipe: Recipe, tmp_path: Path) -> None:
    saver = checkpoint.Saver(tmp_path, recipe, keep=1, keep_every=50)
    for images in range(16, 176, 24):
        saver.save(random_state(recipe, images))
    saver.wait()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [64, 112, 160]
    saver.close()


def test_what_is_copied_is_what_is_written(recipe: Recipe, tmp_path: Path) -> None:
    """Training goes on while the checkpoint is written; later steps must not reach it."""
    saver, state = checkpoint.Saver(tmp_path, recipe), random_state(recipe, 88)
    expected = state.dit.x_embedder.proj.weight.detach().clone()
    state.guard.windows.append([8, 16])
    saver.save(state)
    with torch.no_grad():
        state.dit.x_embedder.proj.weight.zero_()
    state.guard.windows.clear()
    saver.wait()
    saver.close()
    loaded = checkpoint.load(tmp_path / "000000000088", recipe, partial(first_state, recipe, downscale=8, device=CPU))
    assert torch.equal(loaded.dit.x_embedder.proj.weight, expected)
    assert loaded.guard.windows == [[8, 16]]


def load_newest(folder: Path, recipe: Recipe) -> State | None:
    return checkpoint.load_newest(folder, recipe, partial(first_state, recipe, downscale=8, device=CPU))


def test_a_damaged_checkpoint_is_set_aside(recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for images in (88, 96):
        save(tmp_path, random_state(recipe, images), recipe)
    (tmp_path / "000000000096" / "state.json").write_text('{"stage": 2, "ima')
    state = load_newest(tmp_path, recipe)
    assert state is not None and state.images == 88
    assert "000000000096 is damaged" in caplog.text and "8 images more are trained again" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000088", "damaged-000000000096"]
    data = next((tmp_path / "000000000088").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match="none of the checkpoints.*bytes of"):
        load_newest(tmp_path, recipe)
    assert (tmp_path / "000000000088").is_dir()
    assert load_newest(tmp_path / "nothing", recipe) is None
