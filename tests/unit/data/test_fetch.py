import os
import subprocess
import sys
import threading
import time

import pytest
from archives import Server

from micro_diffusion.data import fetch as module
from micro_diffusion.data.fetch import expand, fetch, fetch_all
from micro_diffusion.runtime.files import UserError

CONTENT = bytes(range(256)) * 40_000


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a.bin").write_bytes(CONTENT)
    with Server(tmp_path / "site") as server:
        yield server


def test_expand():
    assert expand("x-{008..011}.tar") == ["x-008.tar", "x-009.tar", "x-010.tar", "x-011.tar"]
    assert expand("{0..1}/{2..3}") == ["0/2", "0/3", "1/2", "1/3"]
    assert [len(expand("{0000..2175}", share)) for share in (0.01, 1.0)] == [22, 2176]
    assert (len(expand("{0..199}", 0.01)), len(expand("{1..14000}", 0.01))) == (2, 140)
    with pytest.raises(UserError, match="share of the data"):
        expand("a", 0.0)


def test_stars_find_files_on_the_disk(tmp_path):
    for name in ("b.tar", "a.tar"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/*.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    with pytest.raises(UserError, match="no file .*zip"):
        expand(f"{tmp_path}/*.zip")


def test_local_path_is_itself(tmp_path):
    (tmp_path / "a").touch()
    assert fetch(str(tmp_path / "a")) == tmp_path / "a"
    with pytest.raises(UserError, match="There is no file"):
        fetch(str(tmp_path / "b"))


def test_broken_connections_are_resumed(server, tmp_path):
    server.breaks = 3
    path = fetch(f"{server.address}/a.bin?signature=x", tmp_path / "down")
    assert path.name == "a.bin" and path.read_bytes() == CONTENT
    starts = [start for _, start, _ in server.asked]
    assert starts == [0, len(CONTENT) // 2, len(CONTENT) * 3 // 4, len(CONTENT) * 7 // 8]
    assert fetch(f"{server.address}/a.bin", tmp_path / "down") == path and len(server.asked) == 4
    assert [file.name for file in path.parent.iterdir() if not file.name.endswith(".lock")] == ["a.bin"]


def test_a_file_that_changed_is_begun_again(server, tmp_path, monkeypatch):
    server.breaks = 10
    monkeypatch.setattr(module, "TRIES", 1)
    with pytest.raises(UserError, match=r"cannot be had .* bytes came"):
        fetch(f"{server.address}/a.bin", tmp_path / "down")
    (server.root / "a.bin").write_bytes(CONTENT[::-1])
    server.breaks = 0
    assert fetch(f"{server.address}/a.bin", tmp_path / "down").read_bytes() == CONTENT[::-1]


def test_killed_between_the_last_byte_and_the_name(server, tmp_path):
    server.breaks = 1
    path = fetch(f"{server.address}/a.bin", tmp_path / "down")
    tag = f'"{(server.root / "a.bin").stat().st_mtime_ns}"'
    path.rename(path.with_name(".tmp-a.bin.part"))
    path.with_name(".tmp-a.bin.tag").write_text(tag)
    assert fetch(f"{server.address}/a.bin", tmp_path / "down").read_bytes() == CONTENT


def test_what_is_missing_or_forbidden_is_said(server, tmp_path):
    with pytest.raises(UserError, match=r"none.bin cannot be had .HTTP Error 404"):
        fetch(f"{server.address}/none.bin", tmp_path)
    with pytest.raises(UserError, match="memory:..none.x cannot be had"):
        fetch("memory://none/x", tmp_path)


def test_hub_addresses_carry_the_token(server, tmp_path, monkeypatch):
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert fetch("hf://datasets/owner/name/a.bin", tmp_path / "down").read_bytes() == CONTENT
    assert server.asked == [("a.bin", 0, "Bearer secret")]


def test_fsspec_addresses_resume(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.bin", CONTENT)
    part = tmp_path / "bucket" / "a.bin"
    part.parent.mkdir()
    part.with_name(".tmp-a.bin.part").write_bytes(CONTENT[:1000])
    part.with_name(".tmp-a.bin.tag").write_text(str(memory.checksum("/bucket/a.bin")))
    assert fetch("memory://bucket/a.bin", tmp_path).read_bytes() == CONTENT


def test_the_next_file_is_fetched_meanwhile(server, tmp_path):
    (server.root / "b.bin").write_bytes(b"b")
    files = fetch_all([f"{server.address}/a.bin", f"{server.address}/b.bin"], tmp_path / "down")
    assert next(files).read_bytes() == CONTENT
    for _ in range(200):
        if len(server.asked) == 2:
            break
        threading.Event().wait(0.01)
    assert len(server.asked) == 2
    files.close()


@pytest.mark.slow
def test_killed_downloads_end_with_the_same_file(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a.bin").write_bytes(CONTENT * 8)
    script = """
import sys
from pathlib import Path
from micro_diffusion.data.fetch import fetch
fetch(sys.argv[1], Path(sys.argv[2]))
"""
    with Server(tmp_path / "site") as server:
        command = [sys.executable, "-c", script, f"{server.address}/a.bin", str(tmp_path / "down")]
        for kill in range(6):
            process = subprocess.Popen(command, env=os.environ)
            while process.poll() is None and len(server.asked) <= kill:
                time.sleep(0.001)
            time.sleep(0.004 * kill)
            process.kill()
            process.wait()
        subprocess.run(command, check=True)
    assert next((tmp_path / "down").rglob("a.bin")).read_bytes() == CONTENT * 8
