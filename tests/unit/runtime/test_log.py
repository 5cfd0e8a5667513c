from pathlib import Path

from micro_diffusion.runtime.log import RunLog, read_log


def test_rows_come_back(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", images=0)
    log.write({"images": 8, "loss": 0.5})
    assert read_log(tmp_path / "log.jsonl") == [{"images": 8, "loss": 0.5}]
    log.close()


def test_resuming_drops_rows_that_will_come_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path, images=0)
    for images in (8, 16, 24):
        log.write({"images": images})
    log.close()
    with path.open("a") as file:
        file.write('{"images": 3')  # a kill cut it short
    log = RunLog(path, images=16)
    log.write({"images": 24, "again": True})
    log.close()
    assert read_log(path) == [{"images": 8}, {"images": 16}, {"images": 24, "again": True}]


def test_no_log_yet(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl") == []
