"""Metrics by name: what each measures, and when its number is not comparable."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch.nn.functional import normalize

from micro_diffusion.evaluation.features import INCEPTION, Reference, Settings, measure
from micro_diffusion.evaluation.frechet import Moments, frechet_distance, rbf_distance
from micro_diffusion.evaluation.pictures import PictureFolder, Scores
from micro_diffusion.models.pretrained import optional_package
from micro_diffusion.runtime.files import UserError


@dataclass(frozen=True)
class Metric:
    """What `compare` says of drawn and true pictures' features; without it, the mean of the network's own scores."""

    network: str
    compare: Callable[[Moments, Moments], Mapping[str, float]] | None = None
    least: int = 0  # pictures that published numbers are of
    keep: bool = True  # whether features are needed, not their mean and covariance alone

    def __call__(self, pictures: PictureFolder, reference: Reference | None, settings: Settings) -> Scores:
        if self.compare is None:
            if pictures.prompts is None:
                raise UserError(f"{pictures.path} has no captions: put NAME.txt beside every NAME.png.")
            drawn = measure(pictures, self.network, settings, keep=True)
            each = {self.network: drawn.features[:, 0].tolist()}
            return Scores(_protocol(drawn), {self.network: float(drawn.mean)}, each)
        if reference is None:
            raise UserError("This metric compares with true pictures: give a folder of them, or their statistics.")
        true, drawn = (measure(each, self.network, settings, keep=self.keep) for each in (reference, pictures))
        few, width, warnings = min(true.count, drawn.count), len(true.mean), []
        if few < 5:
            raise UserError(f"{few} pictures are too few to measure a distance: 5 are the least.")
        if few < width and not self.keep:
            warnings.append(f"{few:,} pictures are fewer than the {width:,} features: the covariance is singular.")
        if few < self.least:
            warnings.append(f"{few:,} pictures: published numbers are of {self.least:,} or more.")
        if drawn.made["size"] != true.made["size"] and not settings.resize:
            warnings.append(f"{drawn.made['size']} pixels against {true.made['size']}: scale both to one size.")
        if drawn.made["format"] != ".png":
            warnings.append(f"Pictures in {drawn.made['format']} may be compressed, which features show: draw PNGs.")
        return Scores(_protocol(drawn, true), self.compare(drawn, true), warnings=warnings)


def _protocol(*of: Moments) -> str:
    sets = " against ".join(f"{m.count:,} pictures ({m.made['size']} px, {m.made['format']})" for m in of)
    made = of[0].made
    return f"{sets}, {made['resizing']}; {made['network']} (weights {made['weights'][:12]})"


def frechet(title: str, drawn: Moments, true: Moments) -> Mapping[str, float]:
    """The Frechet distance, under the name that it has with these features."""
    return {title: frechet_distance(drawn, true)}


def fidelity(kind: Literal["kid", "prc"], drawn: Moments, true: Moments) -> Mapping[str, float]:
    """torch-fidelity's kernel distance, or precision and recall."""
    compute = getattr(optional_package(f"torch_fidelity.metric_{kind}"), f"{kind}_features_to_metric")
    options = {"kid_subset_size": min(1000, drawn.count, true.count), "save_cpu_ram": True, "prc_batch_size": 1000}
    numbers = compute(drawn.features, true.features, verbose=False, **options)
    return {name.replace("kernel_inception_distance", "KID").replace("_", " "): x for name, x in numbers.items()}


def cmmd(drawn: Moments, true: Moments) -> Mapping[str, float]:
    """Jayasumana et al. 2024: 1,000 times the RBF distance of CLIP's embeddings of length one."""
    return {"CMMD": 1000 * rbf_distance(normalize(drawn.features), normalize(true.features))}


METRICS = {  # kid before fid: it leaves what fid needs
    "kid": Metric(INCEPTION, partial(fidelity, "kid"), least=1000),
    "precision-recall": Metric(INCEPTION, partial(fidelity, "prc"), least=10_000),
    "fid": Metric(INCEPTION, partial(frechet, "FID"), least=30_000, keep=False),
    "clip-fid": Metric("clip-vit-b-32", partial(frechet, "CLIP-FID"), least=30_000, keep=False),
    "fd-dinov2": Metric("dinov2-vit-l-14", partial(frechet, "FD-DINOv2"), least=10_000, keep=False),
    "cmmd": Metric("clip-vit-l-14-336", cmmd, least=1000),
    **{name: Metric(name) for name in ("clip-score", "pickscore", "hpsv2")},
}
