"""The verb with a tiny model, a benchmark that measures brightness, and metrics that count."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import dit_config, write_autoencoder, write_text_encoder

from micro_diffusion.cli import evaluate
from micro_diffusion.cli.evaluate import Evaluate, captions, during_training, spread
from micro_diffusion.cli.main import main
from micro_diffusion.diffusion.objectives import EDM
from micro_diffusion.evaluation.pictures import PictureFolder, Prompt, Scores
from micro_diffusion.models.checkpoints import ModelCard, Part, write_folder
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.model import LatentDiffusion
from micro_diffusion.runtime.files import UserError


class Brightness:
    """A benchmark whose pictures should be as bright as possible."""

    def prompts(self) -> list[Prompt]:
        return [Prompt(f"a cat, {index}", index, {"bright": True}) for index in range(10)]

    def score(self, pictures: PictureFolder, device: torch.device) -> Scores:
        assert pictures.prompts is not None and all(prompt.truth == {"bright": True} for prompt in pictures.prompts)
        each = [float(np.asarray(picture).mean()) for picture in pictures]
        notes = [f"mean {value:.0f}" for value in each]
        numbers, white = {"brightness": sum(each) / len(each)}, [Image.new("RGB", (16, 16), "white")] * len(each)
        return Scores("Mean of all pixels.", numbers, {"brightness": each}, ["few"], notes, true=white)


class Lacking(Brightness):
    def score(self, pictures: PictureFolder, device: torch.device) -> Scores:
        raise UserError("There are no weights of the judge.")


class Settings(NamedTuple):
    device: torch.device
    batch_size: int
    weights: Mapping[str, str]
    resize: int | None


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(title: str) -> Callable[..., Scores]:
        def metric(pictures: PictureFolder, reference: Any, settings: Any) -> Scores:
            if title == "FID" and reference is None:
                raise UserError("give a --reference")
            contrast = float(np.std(np.asarray(pictures[0])))
            return Scores(f"{title} of {len(pictures)} pictures at {settings.resize} px.", {title: contrast})

        return metric

    table = {"fid": count("FID"), "clip-score": count("CLIP score")}
    for module in ("features", "frechet", "metrics"):
        stand_in = SimpleNamespace(METRICS=table, Metric=Any, Moments=None, Settings=Settings)
        monkeypatch.setitem(sys.modules, f"micro_diffusion.evaluation.{module}", stand_in)
    monkeypatch.setitem(evaluate.BENCHMARKS, "brightness", lambda weights, prompts: Brightness())
    monkeypatch.setitem(evaluate.BENCHMARKS, "lacking", lambda weights, prompts: Lacking())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    parts = write_autoencoder(folder / "autoencoder"), write_text_encoder(folder / "text")
    torch.manual_seed(0)
    dit = DiT(dit_config())
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    autoencoder, text = (Part(str(part), None) for part in parts)
    write_folder(
        folder / "model", dit.state_dict(), card=ModelCard(dit.config, EDM(), autoencoder, text, 32, 0, "tiny")
    )
    return folder / "model"


def run(*arguments: str | Path, code: int = 0) -> None:
    assert main(["evaluate", *map(str, arguments), "--device", "cpu"]) == code


def results(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "results.json").read_text())
    return loaded


def test_a_benchmark_with_its_report(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(model, "--benchmark", "brightness", "--steps", "1", "--out", tmp_path / "o")
    point = results(tmp_path / "o")["guidance 3"]
    scores, shown = point["scores"]["brightness"], capsys.readouterr()
    assert scores["protocol"] == "Mean of all pixels." and len(scores["each"]["brightness"]) == 10
    assert scores["numbers"]["brightness"] == pytest.approx(np.mean(scores["each"]["brightness"]))
    assert point["made"]["steps"] == 1 and point["made"]["model"] == str(model)
    assert "guidance 3, brightness (Mean of all pixels.):" in shown.out
    assert f"  {scores['numbers']['brightness']:<10.4g} brightness" in shown.out
    assert "not comparable: few" in shown.err
    assert "true" not in scores
    page = (tmp_path / "o" / "report.html").read_text()
    for words in ("Mean of all pixels.", "Not comparable: few", "Best by brightness", "Median by", "Worst by"):
        assert words in page
    drawn = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o" / "guidance-3").iterdir()}
    run(model, "--benchmark", "brightness", "--steps", "1", "--out", tmp_path / "o")
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o" / "guidance-3").glob("*.png")}
    assert again.items() <= drawn.items()
    run("--benchmark", "brightness", "--pictures", tmp_path / "o" / "guidance-3", "--out", tmp_path / "again")
    assert results(tmp_path / "again")["pictures"]["scores"] == point["scores"]


def test_a_sweep_draws_curves(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\na red apple\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "true.png")
    run(
        model, "--prompts", tmp_path / "p.txt", "--metrics", "clip-score", "fid", "--reference", tmp_path,
        "--guidance", "1", "4", "1.5", "--steps", "1", "--resize", "16", "--out", tmp_path / "o",
    )  # fmt: skip
    points = results(tmp_path / "o")
    assert list(points) == ["guidance 1", "guidance 4", "guidance 1.5"]
    assert list(points["guidance 4"]["scores"]) == ["fid", "clip-score"]  # in the table's order
    assert points["guidance 4"]["scores"]["fid"]["protocol"] == "FID of 2 pictures at 16 px."
    page = (tmp_path / "o" / "report.html").read_text()
    assert "FID over guidance" in page and "FID over CLIP score" in page and "Some of all" in page


def test_two_evaluations_side_by_side(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, guidance in (("a", "1"), ("b", "5")):
        run(
            model, "--benchmark", "brightness", "--limit", "4", "--steps", "1", "--guidance", guidance, "--out",
            tmp_path / name,
        )  # fmt: skip
    capsys.readouterr()
    run("--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    a, b = (next(iter(results(tmp_path / n).values()))["scores"]["brightness"]["numbers"]["brightness"] for n in "ab")
    assert f"brightness: {a:.4g}, {b:.4g} ({b - a:+.4g})" in capsys.readouterr().out
    page = (tmp_path / "c" / "compare.html").read_text()
    assert "The same prompts and noise" in page and f"{b - a:+.4g}" in page and "not measured in the same" not in page
    file = tmp_path / "b" / "results.json"
    file.write_text(file.read_text().replace("Mean of all pixels.", "Median of all pixels."))
    run("--compare", tmp_path / "a", file, "--out", tmp_path / "c")
    assert "brightness was not measured in the same way" in (tmp_path / "c" / "compare.html").read_text()
    file.write_text(file.read_text().replace('"brightness"', '"darkness"'))
    run("--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c", code=2)
    run("--compare", tmp_path / "a", tmp_path / "none", "--out", tmp_path / "c", code=2)
    assert "no results.json in" in capsys.readouterr().err


def test_the_paper_s_protocol_is_a_preset() -> None:
    asked = Evaluate(Path("m"), prompts=Path("coco.json"), reference=Path("true"), preset="paper").with_preset()
    assert (asked.metrics, asked.limit, asked.resize, asked.steps) == (("fid", "clip-score"), 30_000, 256, 30)
    assert (asked.guidance, asked.sampler) == ((5.0,), "heun")
    small = Evaluate(Path("m"), prompts=Path("c"), reference=Path("t"), preset="paper", limit=9, guidance=(1.5, 3.0))
    assert (small.with_preset().limit, small.with_preset().guidance) == (9, (1.5, 3.0))
    with pytest.raises(UserError, match="preset needs"):
        Evaluate(Path("m"), prompts=Path("c"), preset="paper").with_preset()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "nothing to measure"),
        ({"metrics": ("fid",)}, "Name a model"),
        ({"model": Path("m"), "metrics": ("fid",)}, "Name a model"),
        ({"benchmark": "brightness"}, "Name a model"),
        ({"benchmark": "brightness", "model": Path("m"), "prompts": Path("p")}, "has its own prompts"),
        ({"metrics": ("fid",), "pictures": Path("p"), "limit": 3}, "need no model"),
        ({"benchmark": "brightness", "model": Path("m"), "limit": 0}, "at least 1"),
        ({"benchmark": "brightness", "model": Path("m"), "steps": 0}, "at least 1"),
    ],
)
def test_settings_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Evaluate(**options)()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--benchmark", "brightnes"], "did you mean 'brightness'"),
        (["--metrics", "fidd", "--prompts", "P"], "did you mean 'fid'"),
        (["--benchmark", "brightness", "--limit", "99"], "There are 10 prompts, fewer than the 99"),
        (["--benchmark", "brightness", "--weights", "inception"], "NAME=PATH"),
        (["--metrics", "clip-score", "--prompts", "none.txt"], "no file of prompts none.txt"),
        (["--metrics", "clip-score", "--prompts", "EMPTY"], "has no captions"),
    ],
)
def test_bad_input_gets_one_sentence_before_anything_is_drawn(
    options: list[str], words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a cat"), (tmp_path / "e.jsonl").write_text('{"image": "a.png"}\n')
    places = {"P": str(tmp_path / "p.txt"), "EMPTY": str(tmp_path / "e.jsonl")}
    run(model, *(places.get(option, option) for option in options), "--out", tmp_path / "o", code=2)
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1 and not (tmp_path / "o").exists()


def test_a_damaged_picture_and_a_folder_of_another_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = [model, "--benchmark", "brightness", "--steps", "1", "--limit", "2", "--out", tmp_path / "o"]
    run(*ask)
    (tmp_path / "o" / "guidance-3" / "000001.png").write_bytes(b"half")
    run(*ask, code=2)
    assert "000001.png is no picture" in capsys.readouterr().err
    run(*[option if option != "1" else "2" for option in ask], code=2)
    assert "steps 1, not 2" in capsys.readouterr().err


def test_captions_come_from_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\n a dog \n")
    (tmp_path / "a.csv").write_text("image,caption\n1.png,a cat\n2.png,a dog\n")
    (tmp_path / "a.jsonl").write_text('{"captions": ["a cat", "a kitten"]}\n{"captions": ["a dog"]}\n')
    rows = [{"image_id": i, "caption": text} for i, text in ((1, "a cat"), (2, "a dog"), (1, "a kitten"))]
    (tmp_path / "a.json").write_text(json.dumps({"annotations": rows}))
    for kind in ("txt", "csv", "jsonl"):
        assert captions(tmp_path / f"a.{kind}") == ["a cat", "a dog"]
    assert sorted(captions(tmp_path / "a.json")) == ["a cat", "a dog"]
    with pytest.raises(UserError, match="no latent store"):
        captions(tmp_path)
    for text, words in (("{}", "has no captions"), ("[]", "must be a table"), ("{", "not valid JSON")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=words):
            captions(tmp_path / "a.json")


def test_a_limit_is_spread_over_all_prompts() -> None:
    prompts = [Prompt(str(index), index) for index in range(10)]
    assert [prompt.seed for prompt in spread(prompts, 4)] == [0, 2, 5, 7]
    assert spread(prompts, None) == spread(prompts, 10) == prompts


def test_another_seed_is_other_noise(model: Path) -> None:
    def seeds(seed: int) -> list[int]:
        prompts, _ = Evaluate(model, benchmark="brightness", seed=seed, device="cpu").with_preset().prepared()
        return [prompt.seed for prompt in prompts]

    assert seeds(0) == list(range(10)) and len({*seeds(0), *seeds(1), *seeds(2)}) == 30 and seeds(1) == seeds(1)


def test_scores_of_the_weights_of_the_moment(model: Path, tmp_path: Path) -> None:
    made = LatentDiffusion.from_checkpoint(str(model))
    asked: list[DiT] = []

    def make(dit: DiT) -> LatentDiffusion:
        asked.append(dit)
        return made

    score = during_training("brightness,3", make, tmp_path / "run" / "evaluation", device=torch.device("cpu"))
    assert not asked and not (tmp_path / "run" / "evaluation").exists()
    numbers: Mapping[str, float] = score(made.dit)
    pictures = list(PictureFolder(tmp_path / "run" / "evaluation"))
    assert asked == [made.dit] and len(pictures) == 3
    assert numbers == {"brightness": pytest.approx(np.mean([np.asarray(picture).mean() for picture in pictures]))}
    with torch.no_grad():
        next(made.dit.parameters()).mul_(2)  # the pictures there are of another model now
    assert score(made.dit).keys() == numbers.keys()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("brightness", "NAME,PROMPTS"),
        ("brightness,many", "NAME,PROMPTS"),
        ("brightness,0", "NAME,PROMPTS"),
        ("brightness,11", "fewer than the 11"),
        ("brihtness,1", "did you mean 'brightness'"),
        ("lacking,2", "no weights of the judge"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_training(asked: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        during_training(asked, LatentDiffusion, tmp_path, device=torch.device("cpu"))  # type: ignore[arg-type]
