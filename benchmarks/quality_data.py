"""What benchmarks/quality.py trains on: drawings and scenes, prepared once by several processes, held on the device."""

import json
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from micro_diffusion.cli.prepare import SourceOptions
from micro_diffusion.data.prepare import prepare
from micro_diffusion.data.records import Caption, Record, hash_share
from micro_diffusion.data.sources.emoji import emoji_records
from micro_diffusion.data.sources.emoji_scenes import CONCEPTS, Scene, scene_picture, scenes
from micro_diffusion.data.store import Store
from micro_diffusion.evaluation.emoji import SEEN
from micro_diffusion.models.autoencoders import load_autoencoder
from micro_diffusion.models.masking import null_caption
from micro_diffusion.models.text_encoders import EMBEDDED, load_text_encoder
from micro_diffusion.runtime.device import pick_device
from micro_diffusion.runtime.files import UserError, write_atomic
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.feed import Examples

RESOLUTION, SETTINGS = 128, "data.json"
SLICE = 0.03  # share of the training drawings, of concepts that no scene has, that is kept to choose checkpoints by
HELD_OUT_SCENES = 256


@dataclass(frozen=True)
class Data:
    """What is prepared; another answer to any of it is other data."""

    augment: int  # varied copies of each drawing
    scenes: int
    limit: int | None  # about so many drawings, evenly over all, and so many scenes: a rehearsal
    processes: int  # each makes a store of its own
    text_encoder: str = EMBEDDED


def drawings(data: Data, shard: int) -> Iterator[Record]:
    """Every n-th record. Of some training drawings the copies are left out, and the drawing is of the split `slice`.

    Drawings have three captions and copies one; every other copy gets a second one, which is cut.
    """
    original, number, copy, aside, asked = "", -1, 0, False, ""
    every = sum(1 for _ in emoji_records()) // data.limit if data.limit else 1
    for index, record in enumerate(emoji_records(augment=data.augment)):
        if not record.key.startswith(f"{original}/"):
            original, number, copy, asked = record.key, number + 1, 0, str(record.captions[0].text)
            aside = record.split == "train" and in_slice(original, asked)
        else:
            copy += 1
        if index % data.processes == shard and number % every == 0 and not (aside and record.key != original):
            captions = (*record.captions, record.captions[0])[:3] if copy == 0 else record.captions
            if copy % 2:
                captions = (*captions, cut(asked, style_alone=(copy // 2 + number) % 2 == 1))
            yield replace(record, captions=captions, split="slice" if aside else record.split)


def cut(caption: str, *, style_alone: bool) -> Caption:
    """`a red apple, in noto style` as `a red apple` or `in noto style`."""
    subject, _, style = caption.rpartition(", in ")
    return Caption(f"in {style}" if style_alone else subject)


def in_slice(key: str, caption: str) -> bool:
    """Whether a training drawing, STYLE/CONCEPT, is kept to choose by: none that a scene or the benchmark asks for."""
    asked = key.partition("/")[2] in CONCEPTS or hash_share(f"seen/{caption}", SEEN)
    return not asked and hash_share(f"slice/{key}", SLICE)


def composed(data: Data, shard: int) -> Iterator[Record]:
    """Every n-th scene for training, and of the split `scene` some with held-out compositions, of other noise."""

    def records(seed: int, count: int, *, held_out: bool, split: str) -> Iterator[Record]:
        def wanted(scene: Scene) -> bool:
            return bool(scene.held_out) == held_out

        indices = range(shard, count, data.processes)
        for index, scene in zip(indices, scenes(seed, wanted=wanted, indices=indices), strict=True):
            yield Record(f"{split}/{index}", partial(scene_picture, scene), scene.captions, "emoji-scenes", split)

    count = min(data.scenes, data.limit or data.scenes)
    yield from records(0, count, held_out=False, split="train")
    yield from records(1, min(HELD_OUT_SCENES, count // 8), held_out=True, split="scene")


SOURCES = {"drawings": drawings, "scenes": composed}


def prepare_shard(folder: Path, data: Data, shard: int, device: str) -> None:
    """The stores of one process."""
    torch.set_num_threads(1)
    if device == "cuda":
        device = f"cuda:{shard % torch.cuda.device_count()}"
    where = pick_device(device)
    autoencoder, text_encoder = load_autoencoder(device=where), load_text_encoder(data.text_encoder, device=where)
    for name, source in SOURCES.items():
        prepare(
            source(data, shard), folder / f"{name}-{shard}", resolutions=[RESOLUTION],
            encode_images=autoencoder.encode, encode_text=text_encoder.encode,
            info=SourceOptions().info(name, autoencoder, text_encoder), batch_size=256, workers=2, device=where,
        )  # fmt: skip


def prepare_data(folder: Path, data: Data, device: str) -> None:
    """Make all stores, unless they are there; UserError for a folder with other data."""
    settings = json.dumps(asdict(data), indent=2) + "\n"
    if (folder / SETTINGS).exists():
        if (folder / SETTINGS).read_text() != settings:
            raise UserError(f"{folder} was prepared with other settings; choose another folder, or remove it.")
        return
    with ProcessPoolExecutor(data.processes, multiprocessing.get_context("spawn")) as pool:  # a killed one is noticed
        work = [pool.submit(prepare_shard, folder, data, shard, device) for shard in range(data.processes)]
        for shard in work:
            shard.result()
    write_atomic(folder / SETTINGS, settings)


@dataclass
class Held:
    """Rows on the device: latents, and the states of all their captions without padding, one after the other."""

    latents: Tensor  # (n, c, h, w) float16
    first: Tensor  # (n) number of a row's first caption
    count: Tensor  # (n) of its captions
    start: Tensor  # (m) where a caption's states begin
    length: Tensor  # (m)
    states: Tensor  # (tokens, d) float16
    alone: Tensor  # (n) whether a row's last caption tells a style alone

    def __len__(self) -> int:
        return len(self.latents)

    def keep(self, cut: bool | str) -> "Held":
        """With all cut captions, those that tell the style alone ("style"), or none; a row of two has one."""
        lost = (self.count == 2) & ~self.alone if cut == "style" else (self.count == 2) & (not cut)
        return replace(self, count=self.count - lost.long())

    def take(self, rows: Tensor, choice: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, text and mask of rows, each with the caption that `choice` in [0, 1) chooses; float32."""
        caption = self.first[rows] + (choice * self.count[rows]).long()
        place = torch.arange(length, device=rows.device)
        mask = place < self.length[caption][:, None]
        text = self.states[(self.start[caption][:, None] + place).clamp(max=len(self.states) - 1)]
        return self.latents[rows].float(), text.float() * mask[..., None], mask


def hold(folder: Path, name: str, split: str, device: torch.device) -> Held:
    """The rows of one split in all stores of a name; UserError when there are none."""
    columns: dict[str, list[np.ndarray]] = {key: [] for key in ("latents", "count", "length", "states", "alone")}
    shape: tuple[int, ...] = ()
    for path in sorted(folder.glob(f"{name}-[0-9]*")):
        store = Store.open(path)
        (encoder,) = store.info.text_encoders
        for part in range(len(store.parts)):
            rows = store.rows(part)
            wanted = pa.array(np.flatnonzero(pc.equal(rows["split"], split).to_numpy()))
            if not len(wanted):
                continue
            captions = rows["captions"].take(wanted).to_pylist()
            columns["alone"].append(np.array([each[-1].startswith("in ") for each in captions]))
            latents, text = store.latents(RESOLUTION, part).take(wanted), store.text(encoder, part).take(wanted)
            shape = store.info.autoencoder.channels, latents["height"][0].as_py(), latents["width"][0].as_py()
            columns["latents"].append(values(latents["latents"]))
            columns["count"].append(pc.list_value_length(text["lengths"]).to_numpy())
            columns["length"].append(values(text["lengths"]))
            columns["states"].append(values(text["states"]).reshape(-1, store.info.text_encoders[encoder].width))
    if not shape:
        raise UserError(f"{folder} has no {name} of the split {split!r}; prepare more of them.")
    latents, count, length, states, alone = (torch.from_numpy(np.concatenate(each)) for each in columns.values())
    count, length = count.long(), length.long()
    first, start = count.cumsum(0) - count, length.cumsum(0) - length
    held = latents.reshape(-1, *shape), first, count, start, length, states, alone
    return Held(*(each.to(device) for each in held))


def values(column: pa.ChunkedArray) -> np.ndarray:
    """All numbers of a column of lists."""
    return pc.list_flatten(column).to_numpy()


def examples(
    held: Sequence[Held], counts: Iterable[int], recipe: Recipe, stage: Stage, *, patches: int, draws: torch.Generator
) -> Examples:
    """A batch of so many rows of each, at random; everything is drawn on the device, so that it never waits."""
    device = draws.device
    parts = []
    for some, count in zip(held, counts, strict=True):
        rows = torch.randint(len(some), (count,), device=device, generator=draws)
        choice = torch.rand(count, device=device, generator=draws)
        parts.append(some.take(rows, choice, recipe.text_length or 0))
    latents, states, mask = (torch.cat(each) for each in zip(*parts, strict=True))
    size = len(latents)
    dropped = torch.rand(size, device=device, generator=draws) < recipe.caption_dropout
    text, mask = null_caption(states, mask, dropped)
    return Examples(
        latents=latents, text=text, text_scale=torch.ones_like(mask, dtype=torch.float16), text_mask=mask,
        caption_dropped=dropped, sigma_normal=torch.randn(size, device=device, generator=draws),
        noise=torch.randn(latents.shape, device=device, generator=draws),
        mask_noise=torch.rand(size, patches if stage.mask_ratio else 0, device=device, generator=draws),
    )  # fmt: skip
