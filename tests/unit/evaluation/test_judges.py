"""The small networks: what they take and give, and how they are kept."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from micro_diffusion.data.sources.emoji import emoji_table
from micro_diffusion.data.sources.emoji_scenes import COLOURS, CONCEPTS
from micro_diffusion.evaluation.judges import Detector, Judge, load_network, to_tensor
from micro_diffusion.runtime.files import UserError


def save(folder, name, network):
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    save_file(weights, folder / f"{name}.safetensors", {"names": json.dumps(network.names)})


def test_a_judge_takes_pictures_of_any_size():
    judge = Judge(["fox", "dog", "cat"], ["flat", "round"]).eval()
    with torch.no_grad():
        said = judge(torch.rand(2, 3, 128, 96))
    assert [tuple(part.shape) for part in said] == [(2, 3), (2, 2), (2, 128)]


def test_the_detector_has_a_cell_for_eight_pixels():
    detector = Detector(["fox", "dog"], ["own", "red", "blue"]).eval()
    with torch.no_grad():
        cells = detector(torch.rand(1, 3, 256, 256))
    assert [tuple(part.shape[1:]) for part in cells] == [(16, 16), (16, 16, 4), (16, 16, 2), (16, 16, 3)]
    assert (cells.box >= 0).all()


def test_saved_and_loaded_it_says_the_same(tmp_path):
    judge = Judge(["fox", "dog", "cat"], ["flat", "round"]).half().float().eval()
    save(tmp_path, "judge", judge)
    loaded = load_network("judge", tmp_path)
    assert loaded.names == judge.names and not loaded.training
    picture = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded(picture).concept, judge(picture).concept)
    assert not loaded(picture).concept.requires_grad


def test_all_three_fit_into_four_megabytes(tmp_path):
    rows = list(emoji_table())
    concepts, styles = (list(dict.fromkeys(row[name] for row in rows)) for name in ("concept", "style"))
    for name in ("judge", "second"):
        save(tmp_path, name, Judge(concepts, styles))
    save(tmp_path, "detector", Detector(CONCEPTS, ["own", *COLOURS]))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 4e6


def test_a_network_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="detector is not in this package"):
        load_network("detector", tmp_path)


def test_pictures_as_numbers():
    picture = Image.fromarray(np.full((4, 6, 3), (0, 51, 255), np.uint8))
    tensor = to_tensor([picture, picture.convert("L").convert("RGB")])
    assert tensor.shape == (2, 3, 4, 6)
    assert tensor[0, :, 0, 0].tolist() == pytest.approx([0, 0.2, 1])
