"""What tests of data sources share: small archives in the real layouts, and a server that sends parts of files."""

import http.server
import io
import json
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet


def picture(number, ending="JPEG", size=(40, 32)):
    buffer = io.BytesIO()
    colour = (number * 53 % 256, number * 91 % 256, 255 - number * 37 % 256)
    Image.fromarray(np.full((*size[::-1], 3), colour, np.uint8)).save(buffer, ending)
    return buffer.getvalue()


def tar(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def packed(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def cc12m(root):
    """Two of 2,176 tars."""
    for shard in range(2):
        files = {}
        for number in range(5 * shard, 5 * shard + 5):
            files[f"{number:09}.jpg"] = picture(number)
            files[f"{number:09}.json"] = json.dumps({"url": "https://example.org", "key": f"{number:09}"}).encode()
            files[f"{number:09}.txt"] = f"picture {number} of the web".encode()
        tar(root / f"cc12m-train-{shard:04}.tar", files)


def sa1b(root, address):
    """Two tars with masks, the list of their links, and the captions of all pictures but one."""
    lines, texts = ["file_name\tcdn_link"], {}
    for shard in range(2):
        name, files = f"sa_{shard:06}.tar", {}
        for number in range(1 + 5 * shard, 6 + 5 * shard):
            files[f"./sa_{number}.jpg"] = picture(number, size=(900, 600))
            files[f"./sa_{number}.json"] = b'{"annotations": []}'
            texts[f"sa_{number}.txt"] = f"The image shows the photograph {number}.".encode()
        tar(root / name, files)
        lines.append(f"{name}\t{address}/{name}?signature=expires")
    del texts["sa_7.txt"]
    tar(root / "SA1B_caption.tar.gz", texts, "w:gz")
    (root / "links.txt").write_text("\n".join(lines) + "\n")


def journeydb(root):
    rows = []
    for shard in range(2):
        files = {}
        for number in range(5 * shard, 5 * shard + 5):
            files[f"{shard:03}/{number:04}-abc.jpg"] = picture(number)
            rows.append(
                {"img_path": f"./{shard:03}/{number:04}-abc.jpg", "prompt": f"dream {number} --v 4", "Task1": {}}
            )
        tar(root / f"data/train/imgs/{shard:03}.tgz", files, "w:gz")
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    tar(root / "data/train/train_anno_realease_repath.jsonl.tgz", {"train_anno.jsonl": lines}, "w:gz")


def diffusiondb(root):
    rows = []
    for part in range(1, 3):
        files = {}
        for number in range(5):
            name = f"{part}-{number}.webp"
            files[name] = picture(number + 5 * part, "WEBP")
            nsfw = 0.9 if number == 3 else 0.1
            rows.append(
                {"image_name": name, "prompt": f"a castle {part}.{number}", "part_id": part, "image_nsfw": nsfw,
                 "prompt_nsfw": 0.0, "width": 40, "height": 32}
            )  # fmt: skip
        files[f"part-{part:06}.json"] = json.dumps({name: {"p": "x"} for name in files}).encode()
        packed(root / f"diffusiondb-large-part-1/part-{part:06}.zip", files)
    parquet.write_table(pa.Table.from_pylist(rows), root / "metadata-large.parquet")


def textcaps(root):
    """As `datasets` lays rows out in Parquet."""
    from datasets import Dataset, Features, Image, List, Value

    kinds = Features(
        {"image": Image(), "image_id": Value("string"), "image_width": Value("int32"), "image_height": Value("int32"),
         "reference_strs": List(Value("string"))}
    )  # fmt: skip
    (root / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        rows = [
            {"image": {"bytes": picture(number), "path": f"{number}.jpg"}, "image_id": f"{split}{number}",
             "image_width": 40, "image_height": 32, "reference_strs": [f"a sign {number}", f"it says {number}"]}
            for number in range(5)
        ]  # fmt: skip
        Dataset.from_list(rows, features=kinds).to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")


def coco(root):
    names = [f"COCO_val2014_{number:012}.jpg" for number in range(10)]
    packed(root / "zips/val2014.zip", {"val2014/": b""} | {f"val2014/{n}": picture(i) for i, n in enumerate(names)})
    notes = [{"image_id": i, "id": 10 * i + k, "caption": f"thing {i}.{k}"} for k in range(5) for i in range(10)]
    content = json.dumps({"images": [], "annotations": notes}).encode()
    files = {"annotations/captions_train2014.json": b"{}", "annotations/captions_val2014.json": content}
    packed(root / "annotations/annotations_trainval2014.zip", files)


class Handler(http.server.BaseHTTPRequestHandler):
    """Files of a folder, ranges of them too; `/datasets/OWNER/NAME/resolve/REVISION/` is the hub's way to say it."""

    def __init__(self, *args, state):
        self.state = state
        super().__init__(*args)

    def do_GET(self):
        state, name = self.state, self.path.partition("?")[0].lstrip("/")
        if name.startswith("datasets/"):
            name = name.split("/", 5)[5]
        path = state.root / name
        if not path.is_file():
            return self.send_error(404)
        content, tag = path.read_bytes(), f'"{path.stat().st_mtime_ns}"'
        start = 0
        if (wanted := self.headers.get("Range")) and self.headers.get("If-Range") == tag:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        if start >= len(content) > 0:
            return self.send_error(416)
        state.asked.append((name, start, self.headers.get("Authorization")))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", tag)
        self.end_headers()
        piece = content[start:]
        if state.breaks and len(piece) > 1:  # the connection ends in the middle
            state.breaks -= 1
            piece = piece[: len(piece) // 2]
        self.wfile.write(piece)

    def log_message(self, *_):
        pass


class Server:
    """`breaks` is how many of the next replies end half-way, `asked` what was asked for."""

    def __init__(self, root: Path):
        self.root, self.breaks, self.asked = root, 0, []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Handler(*args, state=self))
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
