"""Model folders: round trip, and every way in which one can be broken."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import CHANNELS, TEXT_WIDTH, dit_config

from micro_diffusion.diffusion.objectives import EDM, Flow
from micro_diffusion.models import checkpoints
from micro_diffusion.models.checkpoints import CONFIG, WEIGHTS, ModelCard, Part, load_checkpoint, write_folder
from micro_diffusion.models.dit import DiT
from micro_diffusion.runtime.files import UserError


@pytest.fixture
def dit() -> DiT:
    return DiT(dit_config(input_size=(8, 12)))


@pytest.fixture
def card(dit: DiT) -> ModelCard:
    return ModelCard(
        dit.config, EDM(sigma_data=0.5), Part("embedded", "a" * 64), Part("embedded", "b" * 64),
        resolution=64, images_seen=12_345, recipe="quickstart", text_length=24,
    )  # fmt: skip


@pytest.fixture
def folder(dit: DiT, card: ModelCard, tmp_path: Path) -> Path:
    write_folder(tmp_path / "model", dit.state_dict(), card=card)
    return tmp_path / "model"


def test_round_trip_is_exact(dit: DiT, card: ModelCard, folder: Path) -> None:
    loaded, found = load_checkpoint(str(folder))
    assert found == card and sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert (folder / WEIGHTS).stat().st_mode == (folder / CONFIG).stat().st_mode  # others may read it as well
    assert loaded.config == dit.config and loaded.state_dict().keys() == dit.state_dict().keys()
    for name, tensor in dit.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x, text = torch.randn(2, CHANNELS, 8, 12), torch.randn(2, 3, TEXT_WIDTH)
    mask = torch.ones(2, 3, dtype=torch.bool)
    label = torch.zeros(2)
    assert torch.equal(loaded(x, label, text, text_mask=mask).sample, dit(x, label, text, text_mask=mask).sample)
    loaded(x, label, text, text_mask=mask).sample.sum().backward()  # it can be trained on


def test_config_is_readable_and_keeps_the_objective(card: ModelCard) -> None:
    flow = replace(card, objective=Flow(shift=3.0), text_length=None)
    assert ModelCard.from_json(flow.to_json()) == flow
    values = json.loads(flow.to_json())
    assert values["version"] == 1 and values["objective"] == {"name": "flow", "mean": 0.0, "std": 1.0, "shift": 3.0}
    assert values["autoencoder"] == {"name": "embedded", "sha256": "a" * 64}


def test_saving_again_replaces(dit: DiT, card: ModelCard, folder: Path) -> None:
    write_folder(folder, dit.state_dict(), card=replace(card, images_seen=99_999))
    assert load_checkpoint(str(folder))[1].images_seen == 99_999
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_half_precision_weights_load_to_float32(folder: Path) -> None:
    weights = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    assert {tensor.dtype for tensor in load_checkpoint(str(folder))[0].state_dict().values()} == {torch.float32}


def change(path: tuple[str, ...], value: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = place = json.loads((folder / CONFIG).read_text())
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (folder / CONFIG).write_text(json.dumps(values))

    return apply


def remove_key(folder: Path) -> None:
    values = json.loads((folder / CONFIG).read_text())
    del values["resolution"]
    (folder / CONFIG).write_text(json.dumps(values))


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["pos_embed"]
    save_file(weights, folder / WEIGHTS)


def reshape_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"pos_embed": torch.zeros(1, 2, 3)}, folder / WEIGHTS)


def add_tensor(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS) | {"surplus": torch.zeros(1)}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "not a model folder: it has no config.json"),
        (lambda folder: (folder / WEIGHTS).unlink(), "not a model folder: it has no model.safetensors"),
        (lambda folder: (folder / CONFIG).write_text("{"), "not valid JSON"),
        (lambda folder: (folder / CONFIG).write_text("{}"), "does not describe a model"),
        (change(("version",), 99), "version 99"),
        (change(("resolutoin",), 64), "config.json has no setting 'resolutoin'; did you mean 'resolution'"),
        (change(("dit", "dept"), 2), "config.json.dit has no setting 'dept'; did you mean 'depth'"),
        (change(("dit", "depth"), 3), "dit: qkv_multipliers has 2 numbers for 3 blocks"),
        (change(("dit", "head_dim"), 7), "dit: widths must be multiples of head_dim 7"),
        (change(("objective", "name"), "edn"), "no objective in config.json named 'edn'"),
        (change(("autoencoder",), "embedded"), "autoencoder is 'embedded', but must be Part"),
        (remove_key, "lacks the setting 'resolution'"),
        (truncate, "damaged"),
        (drop_tensor, "pos_embed is missing"),
        (reshape_tensor, "pos_embed has the shape"),
        (add_tensor, "nothing has a tensor surplus"),
    ],
)
def test_broken_folders_get_one_sentence(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


def test_the_shipped_checkpoint_has_a_name(folder: Path, card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SHIPPED", folder)
    assert load_checkpoint("embedded")[1] == card
    monkeypatch.setattr(checkpoints, "SHIPPED", folder / "none")
    with pytest.raises(UserError, match="no checkpoint in it; name one with --model"):
        load_checkpoint("embedded")
