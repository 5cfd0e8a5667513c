"""Options of a store: kept posteriors, int8 states, filters, several processes."""

import hashlib
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from micro_diffusion.data.loader import Loader
from micro_diffusion.data.store import Store, quantise
from micro_diffusion.runtime.distributed import World
from micro_diffusion.runtime.files import UserError


def loader(store, **options):
    return Loader([store], resolution=16, text_encoder="letters", seed=3, **options)


def test_int8_error_is_below_half_a_step():
    states = torch.randn(50, 1024, generator=torch.Generator().manual_seed(0)).half().numpy() * np.float16(3)
    states[7] = 0
    small, scales = quantise(states)
    back = small.astype(np.float32) * scales[:, None].astype(np.float32)
    step = np.abs(states).max(1, keepdims=True).astype(np.float32) / 127
    assert np.abs(back - states.astype(np.float32)).max() <= (0.5 * 1.01 * step).max()
    assert not back[7].any()
    assert np.abs(small[:7]).max(1).tolist() == [127] * 7


def test_int8_store_reads_almost_the_same(world, tmp_path):
    exact = loader(world.store(tmp_path / "a"))
    small = loader(
        world.store(tmp_path / "b", info=replace(world.info(), dtypes={"latents": "float16", "text": "int8"}))
    )
    one, two = exact.batch(0, 20), small.batch(0, 20)
    assert one.keys == two.keys and torch.equal(one.text_mask, two.text_mask) and torch.equal(one.latents, two.latents)
    assert two.text.dtype == torch.int8  # the device multiplies
    states = two.text.float() * two.text_scale.float()[..., None]
    worst = (one.text - states).abs().amax(-1) / one.text.abs().amax(-1).clamp(min=1)
    assert 0 < worst.max() < 0.6 / 127


def test_stores_of_both_types_are_read_together(world, tmp_path):
    stores = [world.store(tmp_path / "a", rows=20)]
    info = replace(world.info(), dtypes={"latents": "float16", "text": "int8"})
    stores.append(world.store(tmp_path / "b", rows=20, first=100, info=info))
    batch = Loader(stores, resolution=16, text_encoder="letters", seed=3).batch(0, 30)
    states = batch.text.float() * batch.text_scale.float()[..., None]
    for key, row, mask in zip(batch.keys, states, batch.text_mask, strict=True):
        number = key.removeprefix("key-")
        said = "".join(map(chr, row[mask, 0].round().int().tolist()))
        assert said.startswith("c" * (int(number) % 5) + number)


def test_paper_shapes_take_at_most_62_percent(tmp_path, world):
    """77 tokens of 1,024 and latents at 256 and 512 px: the reference stores 198,656 bytes."""
    states, latents = np.random.default_rng(0).normal(size=(77, 1024)).astype(np.float16), 4 * 2 * (32**2 + 64**2)
    assert latents + states.nbytes == 198_656
    small, scales = quantise(states)
    assert (latents + small.nbytes + scales.nbytes) / 198_656 < 0.62


def test_kept_posterior_is_drawn_anew_at_each_visit(world, tmp_path):
    store = world.store(tmp_path, rows=100, rows_per_part=100, info=replace(world.info(), posterior=True))
    reader = loader(store)
    rows = len(reader)
    means = reader.rows(range(rows))
    assert torch.equal(means.latents[:, 0], means.latents[:, 0].mean((1, 2), keepdim=True).expand(-1, 4, 4))
    of = dict(zip(means.keys, means.latents, strict=True))
    visits = [reader.batch(start, rows) for start in (0, rows)]
    noise = [v.latents - torch.stack([of[key] for key in v.keys]) for v in visits]
    for drawn in noise:
        assert drawn[:, :2].std() == pytest.approx(0.1, rel=0.05) and not drawn[:, 2].any()
    assert torch.equal(reader.batch(5, 10).latents, visits[0].latents[5:15])
    first = dict(zip(visits[0].keys, noise[0], strict=True))
    assert not any(torch.equal(first[key], other) for key, other in zip(visits[1].keys, noise[1], strict=True))


def test_filters_leave_out_and_do_not_stop(world, tmp_path):
    info = replace(world.info(), max_aspect=1.1)  # the pictures are 8 x 9
    report = world.prepare([world.record(number) for number in range(20)], tmp_path, info=info, max_rejected=0.0)
    assert (report.rows, report.rejected, report.filtered) == (0, {}, {"longer than 1.1 to 1": 20})
    with pytest.raises(UserError, match="another max_aspect"):
        world.prepare([world.record(0)], tmp_path, info=replace(info, max_aspect=2.0))


def snapshot(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_write_the_store_of_one(world, tmp_path, world_size):
    records = [world.record(number) for number in range(45)]
    records[7], records[31] = replace(records[7], image=b"x"), replace(records[31], key="key-2")
    options = {"rows_per_part": 10, "max_rejected": 0.5}
    world.prepare(records, tmp_path / "one", **options)

    class Meeting(World):
        def agree(self, value=0):
            return barrier.wait()

    barrier, errors = threading.Barrier(world_size, timeout=20), []

    def work(rank):
        try:
            world.prepare(records, tmp_path / "many", world=Meeting(rank, world_size), **options)
        except BaseException as error:
            errors.append(error)
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert snapshot(tmp_path / "many") == snapshot(tmp_path / "one")
    assert len(Store.open(tmp_path / "many")) == 43
