import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micro_diffusion.data.loader import Loader, Order, interleave, permutation, require
from micro_diffusion.runtime.files import UserError


@pytest.fixture(scope="module")
def stores(world, tmp_path_factory):
    """30 rows in 3 parts of which 27 train; and 12 rows in 3 parts, of which 11 train."""
    folder = tmp_path_factory.mktemp("stores")
    return [
        world.store(folder / "a", rows=30),
        world.store(folder / "b", rows=12, first=100, rows_per_part=5),
    ]


def make(stores, **options):
    return Loader(stores, **{"resolution": 16, "text_encoder": "letters", "seed": 7, "shuffle_window": 2, **options})


def letters(batch):
    """The captions, read back from their encoding."""
    return [
        "".join(map(chr, states[mask, 0].int().tolist()))
        for states, mask in zip(batch.text, batch.text_mask, strict=True)
    ]


@given(st.integers(0, 2**63 - 1), st.integers(0, 300))
def test_permutation(seed, length):
    assert sorted(permutation(seed, length)) == list(range(length))


def test_permutation_never_changes():
    assert permutation(2024, 8).tolist() == [7, 6, 4, 1, 5, 0, 3, 2]


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(0, 10**10), st.integers(1, 300))
def test_interleave_respects_weights_and_counts_each_store(weights, start, count):
    which, nth = interleave(weights, np.arange(start, start + count))
    for store in range(len(weights)):
        mine = nth[which == store]
        assert (np.diff(mine) == 1).all()
        share = weights[store] / sum(weights)
        if len(mine):
            assert abs(mine[0] - start * share) <= len(weights) + start * len(weights) * 2.0**-19
    assert interleave(weights, np.arange(start, start + 1))[1][0] == nth[0]


def test_interleave_alternates():
    assert interleave([1, 1], np.arange(6))[0].tolist() == [1, 0, 1, 0, 1, 0]
    assert Counter(interleave([2, 1, 1], np.arange(400))[0].tolist()) == {0: 200, 1: 100, 2: 100}


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any), st.integers(1, 4), st.integers(0, 9))
def test_each_pass_visits_each_row_once(counts, window, seed):
    order = Order(counts, seed=seed, window=window)
    every = {(part, row) for part, count in enumerate(counts) for row in range(count)}
    for number in range(3):
        visited = [order[number * len(every) + position] for position in range(len(every))]
        assert len(visited) == len(set(visited))
        assert set(visited) == every


def test_passes_differ_and_windows_hold_few_parts():
    order = Order([50] * 8, seed=1, window=2)
    first = [order[position] for position in range(400)]
    assert first != [order[position] for position in range(400, 800)]
    assert first == [Order([50] * 8, seed=1, window=2)[position] for position in range(400)]
    assert [len({part for part, _ in first[start : start + 100]}) for start in range(0, 400, 100)] == [2] * 4
    assert len({part for part, _ in first[:20]}) == 2


@settings(deadline=None, max_examples=25)
@given(start=st.integers(0, 100), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_split_into_batches_changes_nothing(stores, start, sizes):
    loader = make(stores)
    whole = loader.batch(start, sum(sizes))
    position, keys, captions, latents = start, [], [], []
    for size in sizes:
        batch = make(stores).batch(position, size)
        keys += batch.keys
        captions += letters(batch)
        latents.append(batch.latents)
        position += size
    assert tuple(keys) == whole.keys
    assert captions == letters(whole)
    assert torch.equal(torch.cat(latents), whole.latents)


def test_pass_holds_each_training_row_once(stores):
    loader = make(stores[:1])
    assert len(loader) == 27
    assert set(loader.batch(27, 27).keys) == {f"key-{number}" for number in range(30) if number % 10 != 3}


def test_stores_are_mixed_by_rows_or_by_weight(stores):
    assert len(make(stores)) == 38
    assert len(set(make(stores).batch(0, 38).keys)) == 38
    keys = make(stores, weights=[1, 3]).batch(0, 400).keys
    assert sum(int(key[4:]) >= 100 for key in keys) == 300


def test_caption_is_drawn_by_weight_at_each_visit(stores):
    drawn = Counter(caption[-1] for caption in letters(make(stores).batch(0, 3000)))
    assert drawn["1"] / 3000 == pytest.approx(2 / 3, abs=0.03)
    mine = [
        caption
        for batch in make(stores).batches(0, 760, 38)
        for key, caption in zip(batch.keys, letters(batch), strict=True)
        if key == "key-6"
    ]
    assert set(mine) == {"c6-0", "c6-1"}


def test_rows_and_captions_belong_together(stores):
    batch = make(stores).batch(5, 40)
    for key, caption, latent in zip(batch.keys, letters(batch), batch.latents, strict=True):
        number = int(key[4:])
        assert caption.startswith("c" * (number % 5) + str(number))
        assert latent[2] == pytest.approx(torch.full((4, 4), number * 37 % 256 / 127.5 - 1).numpy(), abs=1e-3)


def test_types_and_padding(stores, world):
    batch = make(stores).batch(0, 20)
    assert (batch.latents.dtype, batch.text.dtype, batch.text_mask.dtype) == (torch.float16, torch.float16, torch.bool)
    assert batch.latents.shape == (20, 3, 4, 4)
    longest = max(map(len, letters(batch)))
    assert batch.text.shape == (20, longest, world.width)
    assert (batch.text[~batch.text_mask] == 0).all()
    assert (batch.text[batch.text_mask] != 0).any(-1).all()
    for length in (3, 30):
        fixed = make(stores, text_length=length).batch(0, 20)
        assert fixed.text.shape == (20, length, world.width)
        assert letters(fixed) == [caption[:length] for caption in letters(batch)]


def test_validation_rows_come_in_table_order_with_their_first_caption(stores):
    loader = make(stores, split="validation")
    batch = loader.rows(range(len(loader)))
    assert batch.keys == ("key-3", "key-13", "key-23", "key-103")
    assert letters(batch) == ["ccc3-0", "ccc13-0", "ccc23-0", "ccc103-0"]
    assert loader.rows([3, 0]).keys == ("key-103", "key-3")
    with pytest.raises(IndexError):
        loader.rows([4])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_make_the_global_batch(stores, world_size):
    one = [batch.keys for batch in make(stores).batches(3, 3 + 20, 8)]
    assert [len(keys) for keys in one] == [8, 8, 4]
    ranks = [list(make(stores).batches(3, 23, 8, rank=rank, world=world_size)) for rank in range(world_size)]
    assert [sum((batch.keys for batch in parts), ()) for parts in zip(*ranks, strict=True)] == one
    with pytest.raises(ValueError, match="does not divide"):
        next(make(stores).batches(0, 9, 9, world=2))


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_closing_stops_the_thread(stores):
    batches = make(stores).batches(0, 10**9, 4)
    next(batches)
    assert len(loader_threads()) == 1
    batches.close()
    assert not loader_threads()


def test_batches_are_read_ahead(stores, monkeypatch):
    loader, started = make(stores), []
    read = loader.batch
    monkeypatch.setattr(loader, "batch", lambda start, count: started.append(start) or read(start, count))
    batches = loader.batches(0, 400, 4)
    next(batches)
    deadline = time.monotonic() + 5
    while len(started) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert started == [0, 4, 8]
    batches.close()


def test_errors_reach_the_reader(stores, monkeypatch):
    loader = make(stores)

    def broken(*place):
        raise OSError("disk is gone")

    monkeypatch.setattr(loader, "_open", broken)
    with pytest.raises(OSError, match="disk is gone"):
        list(loader.batches(0, 40, 4))
    assert not loader_threads()


def test_requirements_name_what_the_store_has(stores, tmp_path, world):
    with pytest.raises(UserError, match="lacks 512 px .*it has 16"):
        make(stores, resolution=512)
    with pytest.raises(UserError, match="'t5' .*it has 'letters'"):
        make(stores, text_encoder="t5")
    need = {"resolution": 16, "text_encoder": "letters"}
    require(stores, **need, autoencoder_sha256="aa", text_encoder_sha256="bb")
    with pytest.raises(UserError, match="autoencoder 'mean'"):
        require(stores, **need, autoencoder_sha256="cc")
    with pytest.raises(UserError, match="text encoder 'letters' of sha256 bb"):
        require(stores, **need, text_encoder_sha256="cc")
    world.prepare([world.record(0)], tmp_path)
    with pytest.raises(UserError, match="no validation rows"):
        make([type(stores[0]).open(tmp_path)], split="validation")
    with pytest.raises(ValueError, match="split"):
        make(stores, split="test")
    with pytest.raises(ValueError, match="weight"):
        make(stores, weights=[1])
