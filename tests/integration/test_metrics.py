"""Our numbers are torch-fidelity's own, on the same folders with the same weights."""

from pathlib import Path

import pytest
import torch_fidelity
from evaluation_folders import write_pictures
from real_formats import write_inception

from micro_diffusion.evaluation.features import INCEPTION, Settings, measure
from micro_diffusion.evaluation.frechet import Moments
from micro_diffusion.evaluation.metrics import METRICS


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
