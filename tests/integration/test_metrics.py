"""Our numbers are torch-fidelity's own, on the same folders with the same weights."""

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from evaluation_folders import write_pictures
from PIL import Image
from real_formats import write_inception

from micro_diffusion.evaluation.features import INCEPTION, NETWORKS, Settings, measure
from micro_diffusion.evaluation.frechet import Moments, frechet_distance
from micro_diffusion.evaluation.metrics import METRICS
from micro_diffusion.evaluation.pictures import PictureFolder


@pytest.mark.slow
def test_fid_kid_precision_and_recall_are_torch_fidelitys(tmp_path: Path) -> None:
    weights = tmp_path / "inception.pth"
    write_inception(weights)
    drawn = write_pictures(tmp_path / "drawn", 24, seed=0)
    true = write_pictures(tmp_path / "true", 20, seed=1)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(drawn.path), input2=str(true.path), cuda=False, batch_size=24, fid=True, kid=True, prc=True,
        feature_extractor=INCEPTION, feature_extractor_weights_path=str(weights), kid_subset_size=20, kid_subsets=100,
        cache=False, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    settings = Settings(batch_size=24, weights={INCEPTION: str(weights)})
    ours = {name: METRICS[name](drawn, true, settings).numbers for name in ("kid", "precision-recall", "fid")}
    assert theirs["frechet_inception_distance"] > 0.1
    assert ours["fid"]["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["kid"]["KID mean"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert ours["kid"]["KID std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)
    assert ours["precision-recall"] == pytest.approx(
        {"precision": theirs["precision"], "recall": theirs["recall"], "f score": theirs["f_score"]}, rel=1e-3
    )
    measure(true, INCEPTION, settings).save(tmp_path / "statistics")
    again = METRICS["fid"](drawn, Moments.load(tmp_path / "statistics"), settings).numbers
    assert again == ours["fid"]


def peak_of(folders: Sequence[str]) -> None:
    """Prints the process's peak memory in kB after 2,048 features of each folder, and the distance of the last two."""
    project = torch.randn(192, 2048, generator=torch.Generator().manual_seed(0))

    def look(pictures: Sequence[Image.Image], captions: Sequence[str]) -> torch.Tensor:
        return (
            torch.stack([torch.from_numpy(np.array(each, np.float32) / 255).flatten() for each in pictures]) @ project
        )

    NETWORKS["toy"] = lambda name, settings: (look, "0", "not scaled")
    found = []
    for folder in folders:
        found.append(measure(PictureFolder(Path(folder)), "toy", Settings()))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(found[-1].count, frechet_distance(found[-1], found[-2]))


@pytest.mark.slow
def test_30_000_pictures_take_the_memory_of_a_thousand(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name, count in (("few", 1000), ("many", 30_000)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / name / f"{index:06d}.png")
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    command = [sys.executable, __file__, str(tmp_path / "few"), str(tmp_path / "many")]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    few, many, count, distance = map(float, printed)
    assert count == 30_000 and 0 < distance < float("inf")
    assert (many - few) / 1024 < 200  # MB; the features alone would take 246


if __name__ == "__main__":
    peak_of(sys.argv[1:])
