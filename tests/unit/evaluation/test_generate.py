"""Drawing for metrics with a tiny model: whatever was there, whoever draws, the same files; never of two models."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from tiny_parts import dit_config, write_autoencoder, write_text_encoder

from micro_diffusion.diffusion.objectives import EDM
from micro_diffusion.evaluation.generate import GENERATION, Drawing, draw_prompts
from micro_diffusion.evaluation.pictures import PictureFolder, Prompt
from micro_diffusion.models.autoencoders import load_autoencoder
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.model import LatentDiffusion
from micro_diffusion.models.text_encoders import load_text_encoder
from micro_diffusion.runtime.distributed import ALONE, World
from micro_diffusion.runtime.files import UserError

PROMPTS = [Prompt(text, seed, {"n": seed}) for seed, text in enumerate(["a cat", "a red apple, in style"] * 3 + ["a"])]
FAST = Drawing(steps=1, guidance=1.5)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    return str(write_autoencoder(folder / "autoencoder")), str(write_text_encoder(folder / "text"))


def make(parts: tuple[str, str], *, seed: int = 0) -> LatentDiffusion:
    torch.manual_seed(seed)
    dit = DiT(dit_config())
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return LatentDiffusion(
        dit, EDM(), load_vae=lambda: load_autoencoder(parts[0]), load_text_encoder=lambda: load_text_encoder(parts[1])
    )


@pytest.fixture
def model(parts: tuple[str, str]) -> LatentDiffusion:
    return make(parts)


def draw(
    model: LatentDiffusion, out: Path, *, prompts: list[Prompt] = PROMPTS, drawing: Drawing = FAST,
    world: World = ALONE, name: str = "m", batch_size: int = 3,
) -> dict[str, bytes]:  # fmt: skip
    draw_prompts(model, prompts, out, name=name, drawing=drawing, batch_size=batch_size, world=world)
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def test_a_folder_says_what_it_holds(model: LatentDiffusion, tmp_path: Path) -> None:
    assert len(set(draw(model, tmp_path / "o").values())) == len(PROMPTS)
    folder = PictureFolder(tmp_path / "o")
    assert folder.prompts == PROMPTS and folder.one_size() == (32, 32)
    made = json.loads((tmp_path / "o" / GENERATION).read_text())
    assert made["model"] == "m" and made["size"] == "32 x 32" and made["autoencoder"] == model.vae.sha256
    assert {**FAST.__dict__}.items() <= made.items() and len(made["weights"]) == 64


def test_a_picture_depends_on_its_own_seed_only(model: LatentDiffusion, tmp_path: Path) -> None:
    whole = draw(model, tmp_path / "whole")
    alone = draw(model, tmp_path / "alone", prompts=PROMPTS[4:5], batch_size=1)
    some = [list(PictureFolder(tmp_path / name))[index] for name, index in (("whole", 4), ("alone", 0))]
    a, b = (torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int() for picture in some)
    assert (a - b).abs().max() <= 1  # rounding
    other = draw(model, tmp_path / "other", prompts=[PROMPTS[4]._replace(seed=9)], batch_size=1)
    assert other.values() != alone.values() and len(whole) == 7


def test_no_more_are_drawn_at_once_than_there_are(model: LatentDiffusion, tmp_path: Path, monkeypatch: Any) -> None:
    asked, generate = list[int](), model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: asked.append(k["batch_size"]) or generate(*a, **k))
    draw(model, tmp_path / "some", prompts=PROMPTS[:4], batch_size=3)
    draw(model, tmp_path / "all", prompts=PROMPTS[:2], batch_size=16)
    assert asked == [3, 3, 2]  # the last of three too: a compiled model pads it


def test_what_is_there_stays_and_what_is_missing_is_drawn_the_same(model: LatentDiffusion, tmp_path: Path) -> None:
    before = draw(model, tmp_path / "o")
    (tmp_path / "o" / "000001.png").unlink(), (tmp_path / "o" / "000006.png").unlink()
    (tmp_path / "o" / "000002.png").write_bytes(b"as it was")
    (tmp_path / "o" / ".tmp-000001.png").write_bytes(b"half")
    assert draw(model, tmp_path / "o", name="elsewhere/m") == before | {"000002.png": b"as it was"}
    assert not (tmp_path / "o" / ".tmp-000001.png").exists()


def test_a_finished_folder_is_not_drawn_again(model: LatentDiffusion, tmp_path: Path, monkeypatch: Any) -> None:
    before = draw(model, tmp_path / "o")
    monkeypatch.setattr(model, "generate", None)
    assert draw(model, tmp_path / "o") == before


class Pair(World):
    """One of two threads as ranks."""

    barrier = Barrier(2)

    def agree(self, value: int = 0) -> int:
        self.barrier.wait(30)
        return value


def test_ranks_share_the_work(model: LatentDiffusion, parts: tuple[str, str], tmp_path: Path) -> None:
    alone, drawn = draw(model, tmp_path / "alone"), list[tuple[int, int]]()

    def noted(rank: int, generate: Any, texts: Any, **settings: Any) -> torch.Tensor:
        drawn.append((rank, len(texts)))
        result: torch.Tensor = generate(texts, **settings)
        return result

    threads = []
    for rank in range(2):
        mine = make(parts)
        _ = mine.vae, mine.text_encoder  # libraries do not load two at once
        mine.generate = partial(noted, rank, mine.generate)  # type: ignore[method-assign]
        threads.append(Thread(target=partial(draw, mine, tmp_path / "both", world=Pair(rank, 2))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(drawn) == [(0, 1), (0, 3), (1, 3)]
    assert {path.name: path.read_bytes() for path in (tmp_path / "both").glob("*.png")} == alone


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"drawing": replace(FAST, guidance=3.0)}, "guidance 1.5, not 3.0"),
        ({"drawing": replace(FAST, guidance_interval=(0.3, 5.0))}, "guidance_interval None, not .0.3, 5.0."),
        ({"drawing": replace(FAST, steps=2, sampler="euler")}, "steps 1, not 2; sampler heun, not euler"),
        ({"prompts": PROMPTS[:3]}, "other prompts or seeds"),
        ({"prompts": [PROMPTS[0]._replace(seed=5), *PROMPTS[1:]]}, "other prompts or seeds"),
    ],
)
def test_pictures_of_something_else_are_not_mixed_in(
    model: LatentDiffusion, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    before = draw(model, tmp_path / "o")
    kept = (tmp_path / "o" / GENERATION).read_text()
    with pytest.raises(UserError, match=f"{words}.*name another folder"):
        draw(model, tmp_path / "o", **change)
    assert (tmp_path / "o" / GENERATION).read_text() == kept and len(list((tmp_path / "o").glob("*.png"))) == len(
        before
    )


def test_another_model_and_a_folder_of_other_pictures(parts: tuple[str, str], tmp_path: Path) -> None:
    draw(make(parts), tmp_path / "o", prompts=PROMPTS[:1])
    with pytest.raises(UserError, match="weights [0-9a-f]{12}, not [0-9a-f]{12}"):
        draw(make(parts, seed=1), tmp_path / "o", prompts=PROMPTS[:1])
    (tmp_path / "o" / GENERATION).unlink()
    with pytest.raises(UserError, match="no generation.json"):
        draw(make(parts), tmp_path / "o", prompts=PROMPTS[:1])


def test_too_many_at_once(model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **settings: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "generate", full)
    with pytest.raises(UserError, match="3 pictures at once .* lower --batch-size"):
        draw(model, tmp_path / "o")
