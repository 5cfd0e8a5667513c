"""A store on object storage or on a server: fetched part by part into a bounded cache."""

import fsspec
import pytest
import torch
from archives import Server

from micro_diffusion.data import store as module
from micro_diffusion.data.loader import Loader
from micro_diffusion.data.store import Store
from micro_diffusion.runtime.files import UserError


def batches(store):
    loader = Loader([store], resolution=16, text_encoder="letters", seed=0, shuffle_window=1)
    return [loader.batch(start, 10) for start in range(0, 60, 10)]


@pytest.fixture
def here(world, tmp_path):
    return world.store(tmp_path / "site" / "store", rows=60)


def check(store, here):
    assert len(store) == len(here) == 60
    for one, two in zip(batches(store), batches(here), strict=True):
        assert one.keys == two.keys and torch.equal(one.latents, two.latents) and torch.equal(one.text, two.text)


def test_on_a_server_with_broken_connections(here, tmp_path, monkeypatch):
    monkeypatch.setattr("micro_diffusion.data.fetch.time.sleep", lambda seconds: None)
    with Server(tmp_path / "site") as server:
        server.breaks = 3
        store = Store.open(f"{server.address}/store/", cache=tmp_path / "cache")
        assert not list((tmp_path / "cache").rglob("*.arrow"))
        check(store, here)
        asked = len(server.asked)
        check(Store.open(f"{server.address}/store", cache=tmp_path / "cache"), here)
        assert len(server.asked) == asked


def test_the_cache_is_bounded(here, tmp_path, monkeypatch):
    files = list(here.path.rglob("*.arrow"))
    limit = sum(file.stat().st_size for file in files) // 3
    monkeypatch.setattr(module, "CACHE_BYTES", limit)
    fsspec.filesystem("memory").put(str(here.path), "/bucket/store", recursive=True)
    cache = tmp_path / "cache"
    check(Store.open("memory://bucket/store", cache=cache), here)
    kept = list(cache.rglob("*.arrow"))
    assert 0 < sum(file.stat().st_size for file in kept) <= limit and len(kept) < len(files)


def test_no_store_there(tmp_path):
    with pytest.raises(UserError, match=r"memory://none/store.json cannot be had"):
        Store.open("memory://none", cache=tmp_path)
