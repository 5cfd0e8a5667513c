"""The paper's data sets: small archives in the real layouts, served as their sites serve them, become records."""

from pathlib import Path

import archives
import pytest
from archives import Server

from micro_diffusion.data import fetch as module
from micro_diffusion.data.captions import clean_captions, light
from micro_diffusion.data.loader import Loader
from micro_diffusion.data.records import decode_image
from micro_diffusion.data.sources import SOURCES
from micro_diffusion.data.store import Store
from micro_diffusion.runtime.files import UserError


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server that is the hub too."""
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    (tmp_path / "site").mkdir()
    with Server(tmp_path / "site") as server:
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", server.address + HUB_PATH)
        yield server


HUB_PATH = "/{repo_id}/resolve/{revision}/{filename}"


def found(records):
    """Keys, sizes and captions of the records that are wanted, and why the others are not."""
    wanted, others = [], []
    for record in records:
        if record.problem:
            others.append((record.key, record.problem.reason))
        else:
            wanted.append((record.key, decode_image(record).size, clean_captions(record.captions, light)[0]))
    return wanted, others


def test_cc12m(site, tmp_path):
    archives.cc12m(site.root)
    site.breaks = 2
    options = {"downloads": tmp_path / "down", "fraction": 2 / 2176}
    wanted, others = found(SOURCES["cc12m"](**options))
    assert len(wanted) == 10 and not others
    assert wanted[7] == ("cc12m-train-0001/000000007", (40, 32), ["picture 7 of the web"])
    assert found(SOURCES["cc12m"](str(site.root), **options)) == (wanted, others)  # a local copy
    assert len(list(SOURCES["cc12m"](**{**options, "fraction": 0.0001}))) == 5


def test_sa1b(site, tmp_path):
    """Pictures are kept at 512 px, the large tar is dropped, the picture without a caption is not wanted."""
    archives.sa1b(site.root, site.address)
    options = {"downloads": tmp_path / "down", "table": f"{site.address}/SA1B_caption.tar.gz"}
    wanted, others = found(SOURCES["sa1b"](str(site.root / "links.txt"), **options))
    assert len(wanted) == 9 and others == [("sa_000001/sa_7.jpg", "without LLaVA caption")]
    assert wanted[2] == ("sa_000000/sa_3.jpg", (768, 512), ["The image shows the photograph 3."])
    assert not list((tmp_path / "down").rglob("127*/sa_*.tar"))
    asked = len(site.asked)
    assert found(SOURCES["sa1b"](str(site.root / "links.txt"), **options)) == (wanted, others)
    assert len(site.asked) == asked
    with pytest.raises(UserError, match="no list of links"):
        SOURCES["sa1b"]("none.txt", downloads=tmp_path)


def test_a_damaged_tar_of_sa1b_is_counted_and_the_rest_kept(site, tmp_path):
    archives.sa1b(site.root, site.address)
    first = site.root / "sa_000000.tar"
    first.write_bytes(first.read_bytes()[: int(first.stat().st_size * 0.6)])
    options = {"downloads": tmp_path / "down", "table": f"{site.address}/SA1B_caption.tar.gz"}
    wanted, others = found(SOURCES["sa1b"](str(site.root / "links.txt"), **options))
    assert ("sa_000000.tar", "archive is damaged") in [(Path(key).name, why) for key, why in others]
    assert 4 < len(wanted) < 9 and wanted[-1][0] == "sa_000001/sa_10.jpg"


def test_journeydb(site, tmp_path):
    archives.journeydb(site.root)
    site.breaks = 1
    wanted, others = found(SOURCES["journeydb"](downloads=tmp_path / "down", fraction=0.01))
    assert len(wanted) == 10 and not others
    assert wanted[6] == ("001/001/0006-abc.jpg", (40, 32), ["dream 6 --v 4"])


def test_diffusiondb(site, tmp_path):
    archives.diffusiondb(site.root)
    wanted, others = found(SOURCES["diffusiondb"](downloads=tmp_path / "down", fraction=2 / 14000))
    assert len(wanted) == 8
    assert others == [("part-000001/1-3.webp", "nsfw score"), ("part-000002/2-3.webp", "nsfw score")]
    assert wanted[-1] == ("part-000002/2-4.webp", (40, 32), ["a castle 2.4"])


def test_textcaps(tmp_path):
    archives.textcaps(tmp_path / "site")
    wanted, others = found(SOURCES["textcaps"](str(tmp_path / "site")))
    assert len(wanted) == 10 and not others
    assert wanted[8] == ("validation/00000003", (40, 32), ["a sign 3", "it says 3"])


def test_coco(site, tmp_path):
    archives.coco(site.root)
    records = list(SOURCES["coco"](site.address, downloads=tmp_path / "down"))
    wanted, others = found(records)
    assert len(wanted) == 10 and not others
    assert wanted[2] == ("val2014/val2014/COCO_val2014_000000000002.jpg", (40, 32), [f"thing 2.{k}" for k in range(5)])
    assert {record.split for record in records} == {"validation"}
    assert 0 < len(list(SOURCES["coco"](site.address, downloads=tmp_path / "down", fraction=0.4))) < 10


@pytest.mark.parametrize("name", ["cc12m", "sa1b", "journeydb", "diffusiondb", "textcaps", "coco"])
def test_from_a_download_that_breaks_to_a_batch(site, world, tmp_path, name):
    """Every connection breaks once; the same store results without a break; a batch is read from it."""
    shares = {"cc12m": 2 / 2176, "journeydb": 0.01, "diffusiondb": 2 / 14000}
    addresses = {"sa1b": str(site.root / "links.txt"), "textcaps": str(site.root), "coco": site.address}
    archives_of = getattr(archives, name)
    archives_of(site.root, site.address) if name == "sa1b" else archives_of(site.root)
    stores = []
    for breaks in (0, 4):
        site.breaks = breaks
        options = {"fraction": shares.get(name, 1.0)}
        if name != "textcaps":
            options["downloads"] = tmp_path / f"down-{breaks}"
        if name == "sa1b":
            options["table"] = f"{site.address}/SA1B_caption.tar.gz"
        records = SOURCES[name](*([addresses[name]] if name in addresses else []), **options)
        world.prepare(records, tmp_path / f"store-{breaks}", rows_per_part=4, batch_size=3)
        stores.append(Store.open(tmp_path / f"store-{breaks}"))
    assert stores[0].parts == stores[1].parts and len(stores[0]) in (8, 9, 10)
    loader = Loader(
        [stores[1]], resolution=16, text_encoder="letters", seed=0, split="validation" if name == "coco" else "train"
    )
    batch = loader.batch(0, 7)
    assert batch.latents.shape == (7, 3, 4, 4) and len(set(batch.keys)) == 7
