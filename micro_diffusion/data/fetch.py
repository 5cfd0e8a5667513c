"""Files from the web, the hub or object storage: fetched once, resumed after a kill, whole or not there."""

import itertools
import math
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from glob import glob, has_magic
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from micro_diffusion.runtime.ahead import ahead
from micro_diffusion.runtime.files import TEMPORARY_PREFIX, UserError, sync, write_atomic

DOWNLOADS = Path("downloads")
HUB = "hf://datasets/"
TRIES, TIMEOUT, PIECE = 6, 60, 2**20


def expand(address: str, fraction: float = 1.0) -> list[str]:
    """The first share, at least one, of the files behind `a-{000..199}.tar` or, here on the disk, `a-*.tar`."""
    if not 0 < fraction <= 1:
        raise UserError(f"fraction is a share of the data, above 0 and at most 1, not {fraction}.")
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", address)
    bounds = zip(pieces[1::3], pieces[2::3], strict=True)
    ranges = [[f"{n:0{len(a)}}" for n in range(int(a), int(b) + 1)] for a, b in bounds]
    names = ["".join(itertools.chain(*zip(pieces[::3], (*n, ""), strict=True))) for n in itertools.product(*ranges)]
    if has_magic(address) and "://" not in address:
        names = [path for name in names for path in sorted(glob(name))]
    if not names:
        raise UserError(f"There is no file {address}.")
    return names[: math.ceil(round(len(names) * fraction, 6))]


def fetch(address: str, downloads: Path = DOWNLOADS, stop: threading.Event | None = None) -> Path:
    """The local file of an address: `http(s)://`, `hf://datasets/OWNER/NAME/FILE`, what fsspec knows, or a path.

    Begun again after a kill or a broken connection, it goes on where it stopped; several processes share one download.
    Raises `UserError` when the file is not there or does not arrive.
    """
    if "://" not in address:
        if Path(address).is_file():
            return Path(address)
        raise UserError(f"There is no file {address}.")
    scheme, host, path, _, _ = urlsplit(address)
    parts = [part for part in PurePosixPath(unquote(path)).parts if part not in ("/", "..")]
    target = Path(downloads, host.replace(":", "-") or scheme, *parts)
    if target.is_file():
        return target
    with lock(target):
        for attempt in range(TRIES):
            time.sleep(2 ** (attempt - 2) if attempt else 0)
            try:
                if not target.exists():
                    _resume(address, target, stop)
                return target
            except (OSError, HTTPException) as error:
                problem = error
                code = getattr(error, "code", 500)  # of the web
                if isinstance(error, FileNotFoundError) or (code < 500 and code not in (408, 416, 429)):
                    break
    hint = "accept the terms on its page, then 'hf auth login'; or " if address.startswith(HUB) else ""
    raise UserError(f"{address} cannot be had ({problem}); {hint}run this again: it goes on where it stopped.")


def lock(file: Path) -> FileLock:
    """What keeps other processes from making the same file meanwhile; its folder is made."""
    return FileLock(file.with_name(f"{TEMPORARY_PREFIX}{file.name}.lock"))


def _resume(address: str, target: Path, stop: threading.Event | None) -> None:
    part, tag = (target.with_name(f"{TEMPORARY_PREFIX}{target.name}.{kind}") for kind in ("part", "tag"))
    known = tag.read_text() if tag.exists() and part.exists() else ""
    try:
        stream, start, total, now = _open(address, part.stat().st_size if known else 0, known)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # all of it was there, or more: begin again
            part.unlink(missing_ok=True)
        raise
    with stream, part.open("r+b" if start else "wb") as file:
        file.seek(start)
        write_atomic(tag, now)
        while piece := stream.read(PIECE):
            file.write(piece)
            if stop and stop.is_set():
                raise UserError(f"The download of {address} was stopped.")
        if file.tell() != total >= 0:
            raise ConnectionError(f"{file.tell():,} of {total:,} bytes came")
    sync(part)
    part.replace(target)
    tag.unlink()


def _open(address: str, start: int, tag: str) -> tuple[Any, int, int, str]:
    """A stream of what follows `start` bytes, or of all if the content's tag is not `tag`; its start, size and tag."""
    secret: dict[str, str] = {}
    if address.startswith(HUB):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        owner, name, file = address.removeprefix(HUB).split("/", 2)
        address, secret = hf_hub_url(f"{owner}/{name}", file, repo_type="dataset"), build_hf_headers()
    if not address.startswith(("http://", "https://")):
        import fsspec

        system, path = fsspec.core.url_to_fs(address)
        now, stream = str(system.checksum(path)), system.open(path, "rb")
        return stream, stream.seek(start if now == tag else 0), system.size(path), now
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-", "If-Range": tag} if start else {})
    for key, value in secret.items():
        request.add_unredirected_header(key, value)  # the token is for the hub alone
    reply = urllib.request.urlopen(request, timeout=TIMEOUT)
    start = start if reply.status == 206 else 0
    total = start + int(reply.headers.get("Content-Length", -1 - start))
    return reply, start, total, reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""


def fetch_all(addresses: Iterable[str], downloads: Path = DOWNLOADS) -> Iterator[Path]:
    """The local files in order, the next one fetched meanwhile."""
    return one_ahead(partial(fetch, address, downloads) for address in addresses)


def one_ahead(calls: Iterable[Callable[[threading.Event], Path]]) -> Iterator[Path]:
    """Results in order, the next one made meanwhile; calls are given an event that tells them to stop."""
    stop = threading.Event()
    return ahead((partial(call, stop) for call in calls), depth=1, name="fetch", stop=stop)
