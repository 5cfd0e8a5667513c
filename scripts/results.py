"""Put the tables of docs/results.md together from the files in benchmarks/results; the text between is hand-written.

    python scripts/results.py                                   rewrite the tables
    python scripts/results.py --check                           tell whether they are out of step
    python scripts/results.py --add step.json step-h100.json    take in a new measurement under that name, and rewrite;
                                                                several files are parts of one

A table stands between `<!-- table: step-h100.json -->` and `<!-- end -->`. The newest measurement has that name; those
before it stay beside it as step-h100.COMMIT.json, and their rows follow, each with its commit.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
MARKED = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)

Row = dict[str, str]
"""A table's row: text by column. Tables have the columns of all their rows, but for those that are empty."""


class Measurement(NamedTuple):
    """A file of results; `data` is what it holds, of a log the list of its rows."""

    path: Path
    data: Any

    def told(self, key: str) -> str:
        """Device, torch, commit or date, where the file tells it."""
        data = self.data if isinstance(self.data, dict) else self.data[0]
        machine = data.get("machine", {})
        return str(machine.get(key) or data.get(key) or "")


def number(value: float) -> str:
    """Three digits, or all whole ones."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def measured(value: float | None, unit: str = "") -> str:
    """A number with its unit; nothing where there is none."""
    return "" if value is None else f"{number(value)}{unit}"


def stage(row: Mapping[str, Any]) -> str:
    return f"{8 * row['latent_size']} px, mask {row['mask_ratio']:g}"


def settings(row: Mapping[str, Any]) -> str:
    """What a row of `step` was given besides, to follow its path."""
    told = [*row.get("inductor", {}).items(), *([("one CUDA graph", True)] if row.get("graph") else [])]
    return "".join(f", {name}" if value is True else f", {name}={value}" for name, value in told)


def step(data: Any) -> list[list[Row]]:
    """Speed and memory of each case; then, where it was profiled, milliseconds of a step by kind of kernel."""
    rows, speeds, kinds = data["rows"], list[Row](), list[Row]()
    paths = [row.get("path") or ("one-hot" if row["one_hot"] else "by index") for row in rows]
    bases = {(row["preset"], stage(row)): row for row, path in zip(rows, paths, strict=True) if path == "one-hot"}
    for row, path in zip(rows, paths, strict=True):
        base, profile, used = bases.get((row["preset"], stage(row))), row.get("profile"), row.get("utilisation")
        case = {"model": row["preset"], "stage": stage(row), "path": path + settings(row)}
        waited = row.get("synchronised_step_seconds")
        first = row.get("first_three_steps_each") or [row["first_three_steps_seconds"]]
        speeds.append(case | {
            "images/s": number(row["images_per_second"]),
            "images/s, waiting each step": number(row["batch_size"] / waited) if waited else "",
            "of one-hot": f"{row['images_per_second'] / base['images_per_second']:.2f}" if base else "",
            "TFLOP/s": number(row["tflops_per_second"]),
            "of the peak": f"{used:.1%}" if used else "",
            "peak memory": measured(row["peak_memory_gb"], " GB"),
            "launches": f"{profile['launches']:,}" if profile else "",
            "first three steps": ", ".join(measured(seconds, " s") for seconds in first),
        })  # fmt: skip
        if profile:
            wall = 1e3 * statistics.median(row["step_seconds"])
            times = {kind: number(ms) for kind, ms in profile["kinds_ms"].items()}
            kinds.append(case | times | {"kernels": number(profile["kernel_ms"]), "wall": number(wall)})
    return [speeds, kinds]


def sampler(data: Any) -> list[list[Row]]:
    """Pictures a second: a row for each mode, a column for each size and batch."""
    table: dict[str, dict[str, str]] = {}
    for row in data["rows"]:
        cells = table.setdefault(row["mode"], {"pictures/s": row["mode"].replace("-", " ")})
        cells[f"{row['pixels']} px, batch {row['batch']}"] = number(row["pictures_per_second"])
    return [list(table.values())]


def numerics(data: Any) -> list[list[Row]]:
    """Errors against float32 with their ratios to the plain path's; then the last losses of training."""
    errors = [
        {"model": row["preset"], "mask ratio": f"{row['mask_ratio']:g}", "path": path}
        | {f"{kind} (of plain's)": f"{value:.2g} ({row['ratios'][path][kind]:.2f})" for kind, value in values.items()}
        for row in data.get("errors", [])
        for path, values in row["errors"].items()
    ]
    tables: list[list[Row]] = [errors]
    if training := data.get("training"):
        losses = {f"last loss, {path}": f"{loss:.4f}" for path, loss in training["last_loss"].items()}
        case = {"model": training["preset"], "steps": str(training["steps"])}
        tables.append([case | losses | {"apart": f"{training['difference']:+.2%}"}])
    return tables


def twins(data: Any) -> list[list[Row]]:
    """Milliseconds of forward + backward by path."""
    return [[
        {"kernel": row["kernel"], "images x patches": f"{row['images']} x {row['tokens']}"}
        | {f"{path}, ms": f"{one:.3f} + {both - one:.3f}" for path, (one, both) in row["ms"].items()}
        for row in data["rows"]
    ]]  # fmt: skip


def loader(data: Any) -> list[list[Row]]:
    return [[
        {"tokens": str(row["tokens"]), "text": row["text"], "pixels": str(row["resolution"]),
         "samples/s": f"{row['samples_per_second']:,}", "stored": f"{row['stored_kB_per_sample']:g} kB"}
        for row in data["results"]
    ]]  # fmt: skip


def quickstart(data: Any) -> list[list[Row]]:
    seconds = data["seconds"]
    parts = ", ".join(f"{value:.0f} s {name}" for name, value in seconds.items())
    rows = (
        ("captions whose picture is nearest to its own true picture", "95%",
         f"{data['nearest_is_own']:.0%} of {data['pictures']}"),
        ("median PSNR", "27 dB", f"{data['median_psnr_db']:.1f} dB"),
        ("peak memory", "6 GB", f"{data['peak_memory_gb']:.1f} GB"),
        ("time", "10 min", f"{sum(seconds.values()) / 60:.1f} min ({parts}), and loading"),
    )  # fmt: skip
    return [[{" ": name, "target": target, "measured": found} for name, target, found in rows]]


def emoji(data: Any) -> list[list[Row]]:
    """Median speed of each stage, and the loss on held-out rows at its end."""
    stages: dict[str, list[Any]] = {}
    for row in data:
        stages.setdefault(row["stage"], []).append(row)
    return [[
        {"stage": name, "images/s": number(statistics.median_high(row["images_per_second"] for row in rows)),
         "loss on held-out rows, no mask, at its end":
             f"{[row['validation'] for row in rows if 'validation' in row][-1]:.3f}"}
        for name, rows in stages.items()
    ]]  # fmt: skip


def autoencoder(data: Any) -> list[list[Row]]:
    rows: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("held-out concepts at 128 px, mean PSNR", "33.5 dB", lambda part: f"{part['held_out_concepts_db']:.1f} dB"),
        ("openmoji, a style that it never saw (400 pictures, not shipped)", "26 dB",
         lambda part: f"{part['unseen_style_db']:.1f} dB"),
        ("training split", "", lambda part: f"{part['train_db']:.1f} dB"),
        ("size of the folder", "6 MB", lambda part: f"{part['bytes'] / 1e6:.1f} MB"),
        ("pictures seen", "", lambda part: f"{part['images']:,}"),
        ("seconds", "", lambda part: f"{part['seconds']:.0f}"),
    )  # fmt: skip
    return [[
        {" ": name, "target": target} | {part: cell(values) for part, values in data.items()}
        for name, target, cell in rows
    ]]  # fmt: skip


def rehearsal(data: Any) -> list[list[Row]]:
    rows = (
        ("four pictures", "{}_s", " s"),
        ("first call, 2 steps", "{}_first_call_2_steps_s", " s"),
        ("peak GPU memory", "{}_peak_gb", " GB"),
        ("error of the latents against float32, relative to that of plain bf16 autocast", "bf16_{}_error_ratio", ""),
        ("the same for a single call of the network", "bf16_{}_call_error_ratio", ""),
    )
    modes = ("eager", "compiled")
    return [[
        {" ": name} | {mode: measured(data[key.format(mode)], unit) for mode in modes} for name, key, unit in rows
    ]]  # fmt: skip


def quality(data: Any) -> list[list[Row]]:
    """Losses of each run; then what the judges say of it, and of saved models, by way of sampling.

    Runs of equal cost stand together, the shortest first: the baseline by its rates, then what was compared with it.
    """
    losses, scores, first = list[Row](), list[Row](), dict[str, int]()

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        if not (asked := row.get("asked")):
            return math.inf, 0, row["model"], 0, 0
        order = first.setdefault(asked["recipe"], len(first))
        return asked["seconds"], asked["recipe"] != "baseline", order, asked["rate"] or 0, asked["seed"]

    for row in sorted(data, key=place):
        name = {"model": row.get("model", "")}
        if asked := row.get("asked"):
            rate = asked["rate"] or row["recipe"]["stages"][0]["learning_rate"]
            recipe = [asked["recipe"], *asked["settings"], *([CUTS[asked["cut"]]] if asked.get("cut") else [])]
            name = {"recipe": ", ".join(recipe), "rate": f"{rate:g}"}
            name |= {"scenes": f"{asked['scenes']:.0%}", "seed": str(asked["seed"])}
            name |= {"GPU-seconds": f"{row['seconds_used']:.0f}"}
            losses += [
                name
                | {"weights": weights, "images": f"{row['images']:,}"}
                | {f"loss, {kind}": f"{value:.4f}" for kind, value in found.items()}
                for weights, found in row["validation"].items()
            ]
        for score in row.get("scores", [row]):
            told = {key: score.get(key, "") for key in ("weights", "sampling")}
            scores.append(name | told | {key: f"{score[key]:.1%}" for key in SCORES})
    return [losses, scores]


def scores(data: Any) -> list[list[Row]]:
    """What the judges and the detector say of a model's pictures by guidance, and of the true ones."""
    last, true = data["rows"][-1], ", true pictures"
    names = [name for name in last if f"{name}{true}" in last]
    return [[
        {"share right": name.replace("_", " ")}
        | {f"guidance {row['guidance']:g}": f"{row[name]:.1%}" for row in data["rows"]}
        | {"true pictures": f"{last[name + true]:.1%}"}
        for name in names
    ]]  # fmt: skip


def tune(data: Any) -> list[list[Row]]:
    """Launch settings before and after, with the sum of times over a kernel's shapes."""
    return [[
        {"kernel": name, "before": f"{row['default_ms']:.3f} ms", "after": f"{row['best_ms']:.3f} ms",
         "settings": ", ".join(f"{key.lower()} {value}" for key, value in row["best"].items())}
        for name, row in data["kernels"].items()
    ]]  # fmt: skip


CUTS = {True: "captions cut", "style": "captions cut to the style"}
SCORES = ("concept top-1, held-out pairs", "concept top-5, held-out pairs", "style, held-out pairs",
          "concept top-1, held-out concepts", "both, seen pairs", "both, slice", "overall")  # fmt: skip


def parallel(data: Any) -> list[list[Row]]:
    """Images a second, memory and the cost of a checkpoint, by way of spreading the model."""
    return [[
        {"case": case, "GPUs": str(row.get("ranks", "")), "images/s": measured(row.get("images_per_second")),
         "of as many single ones": f"{row['efficiency_against_single']:.1%}" if row.get("ranks", 1) > 1 else "",
         "micro-batch": str(row.get("micro_batch", "")),
         "peak memory": measured(max(row.get("peak_gb", [0])) or None, " GB"),
         "guarded step (plain)": f"{row['guarded_step_ms']:.1f} ({row['plain_step_ms']:.1f}) ms"
         if "guarded_step_ms" in row else "",
         "checkpoint": measured(row.get("checkpoint_gb"), " GB"),
         "training loses": measured(row.get("training_lost_seconds"), " s"),
         "at one in 10 minutes": measured(row.get("percent_at_one_in_600_s"), " %"),
         "weights and moments after loading, largest relative difference":
             measured(row.get("largest_relative_difference"))}
        for case, row in data["cases"].items()
    ]]  # fmt: skip


def scaling(data: Any) -> list[list[Row]]:
    """Each case of benchmarks/scaling.py; then the paper's whole run from these, and as it is planned."""

    def case(name: str, row: Mapping[str, Any]) -> Row:
        stage, ranks, mode = name.split()
        pixels, mask = stage.split(":")
        return {
            "stage": f"{pixels} px, mask {mask}", "GPUs": ranks[1:], "mode": mode,
            "images/s": measured(row.get("images_per_second")),
            "median step": f"{1000 * row['median_step_seconds']:.0f} ms" if "median_step_seconds" in row else "",
            "of as many single ones": f"{row[key]:.1%}" if (key := "efficiency_against_single") in row else "",
            "micro-batch": str(row.get("micro_batch", "")),
            "peak memory": measured(max(row.get("peak_gb", [0])) or None, " GB"),
            "a row of the log": f"{1000 * row['row_seconds']:.0f} ms" if "row_seconds" in row else "",
            "checkpoint": measured(row.get("checkpoint_gb"), " GB"),
            "training loses at each": ", ".join(measured(each, " s") for each in row.get("lost_seconds", ())),
            "at one in 10 minutes": measured(row.get("checkpoint_percent_at_one_in_600_s"), " %"),
            "first step": measured(row.get("first_step_seconds"), " s"),
            "beside others": str(row.get("beside", "")),
            "ended early": row.get("failed", ""),
        }  # fmt: skip

    def run(row: Mapping[str, Any]) -> Row:
        stages = " + ".join(number(hours) for hours in row["stage_hours"].values())
        planned, dollars = row.get("planner"), row["dollars"]
        return {
            "GPUs": str(row["gpus"]), "mode": row["mode"], "hours of the stages": stages, "hours": number(row["hours"]),
            "GPU-hours": number(row["gpu_hours"]), "dollars": number(dollars) if dollars else "",
            "an hour of a GPU": f"${row['price']:.2f}" if row["price"] else "",
            "planned hours": number(planned["hours"]) if planned else "",
            "planned dollars": number(planned["dollars"]) if planned and planned["dollars"] else "",
            "hours / planned": f"{row['hours'] / planned['hours']:.2f}" if planned else "",
        }  # fmt: skip

    return [[case(*each) for each in data["cases"].items()], [run(row) for row in data["whole_run"]]]


def encode(data: Any) -> list[list[Row]]:
    waits = {kind: f"{data[f'wait_share_{kind}']:.2%}" for kind in ("float16", "int8")}
    speed = {"256 and 512 px in one pass, images/s": number(data["encode_images_per_second"])}
    return [[speed | {f"waiting at 1,500 images/s, {kind}": told for kind, told in waits.items()}]]


def features(data: Any) -> list[list[Row]]:
    return [[
        {"pictures": str(data["pictures"]), "seconds for 1,000, decoding included":
             number(data["seconds_per_1000_pictures"]), "Frechet distance": f"{data['frechet_seconds']:.1f} s",
         "peak memory": f"{data['peak_MB'] / 1000:.1f} GB"}
    ]]  # fmt: skip


def fp8(data: Any) -> list[list[Row]]:
    """Milliseconds forward and with backward by path, of each measured shape and of a step's layers together."""
    names = {"bf16": "bf16", "fp8": "fp8 alone", "fp8 fast": "fast accumulation", "fp8 grouped": "grouped",
             "fp8 cast": "with casts", "best": "where it pays"}  # fmt: skip

    def cells(ms: Mapping[str, Sequence[float]]) -> Row:
        told = {name: ms[path] for path, name in names.items() if path in ms}
        cells = {f"{name}, ms": " / ".join(map(number, values)) for name, values in told.items()}
        return cells | {f"bf16 / {name}": f"{ms['bf16'][1] / told[name][1]:.2f}"
                        for name in ("fast accumulation", "with casts", "where it pays") if name in told}  # fmt: skip

    rows = [
        {"product": (f"{row['experts']} x " if row["experts"] > 1 else "")
         + f"({row['rows']:,} x {row['fan_in']:,}) ({row['fan_in']:,} x {row['fan_out']:,})",
         "stands for": number(row["copies"])} | cells({path: ms for path, ms in row["ms"].items() if path != "best"})
        for row in data["rows"]
    ]  # fmt: skip
    whole = {"product": f"a step: {data['share_of_flops']:.1%} of its products", "stands for": str(data["layers"])}
    return [[*rows, whole | cells(data["step"])]]


def judges(data: Any) -> list[list[Row]]:
    """Shares right of both judges on all splits, and of the detector by task."""
    measures = {"concept_top1": "concept top-1", "concept_top5": "top-5", "style": "style"}
    shares = [
        {"network": name, "pictures seen": f"{data[name]['images']:,}", "drawings": split.replace("_", " ")}
        | {told: f"{data[name][split][key]:.1%}" for key, told in measures.items()}
        for name in ("judge", "second")
        for split in ("train", "held_out_pair", "held_out_concept")
    ]
    tasks = {
        key.replace("_", " "): f"{value:.1%}" for key, value in data["detector"].items() if isinstance(value, float)
    }
    return [shares, [{"network": "detector", "pictures seen": f"{data['detector']['images']:,}"} | tasks]]


def text_layers(data: Any) -> list[list[Row]]:
    """By layer of the text encoder: losses at the end and the lowest of held-out pairs; pictures at the end."""
    rows = []
    for row in data["layers"]:
        end, best = row["course"][-1], min(each["held out"] for each in row["course"])
        line = {"layer": str(row["layer"]), "words alike: style": f"{row['alike']['style']:.3f}",
                "concept": f"{row['alike']['concept']:.3f}", "loss, seen": f"{end['seen']:.4f}",
                "held out": f"{end['held out']:.4f}", "lowest": f"{best:.4f}"}  # fmt: skip
        rows.append(line | right_by({name: row["scores"][f"{name}, at the end"] for name in data["true"]}))
    return [[*rows, {"layer": "true pictures"} | right_by(data["true"])]]


def right_by(scores: Mapping[str, Mapping[str, float]]) -> Row:
    """Shares right of seen and of held-out pairs."""
    return {f"{measure}, {name}": f"{score[measure]:.1%}" for name, score in scores.items()
            for measure in ("concept top-1", "style", "both")}  # fmt: skip


def launch(data: Any) -> list[list[Row]]:
    """A narrow step by the form of the model."""
    return [[
        {"form": form, "median step": f"{row['median_ms']:.1f} ms",
         "quickest tenth, below": f"{row['quickest_tenth_ms']:.1f} ms",
         "clipping and AdamW": f"{row['optimizer_ms']:.1f} ms",
         "first step, kernels compiled before": measured(row["first_step_seconds"], " s")}
        for form, row in data["forms"].items()
    ]]  # fmt: skip


TABLES: dict[str, Callable[[Any], list[list[Row]]]] = {
    "step": step, "sampler": sampler, "numerics": numerics, "attention": twins, "moe": twins, "norms": twins,
    "text_keys": twins, "scores": scores, "tune": tune,
    "loader": loader, "quickstart": quickstart, "emoji": emoji, "autoencoder": autoencoder, "rehearsal": rehearsal,
    "quality": quality, "parallel": parallel, "encode": encode, "features": features, "judges": judges,
    "fp8": fp8, "scaling": scaling, "launch": launch, "text_layers": text_layers,
}  # fmt: skip
"""By the first word of a file's name: its tables, made of what it holds."""


def read(path: Path) -> Measurement:
    text = path.read_text()
    return Measurement(
        path, [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    )


def history(path: Path) -> list[Measurement]:
    """The measurement of that name, and those before it, newest first."""
    older = map(read, path.parent.glob(f"{path.stem}.*{path.suffix}"))
    return [read(path), *sorted(older, key=lambda one: (one.told("date"), one.path.name), reverse=True)]


def markdown(rows: Sequence[Row]) -> str:
    """A table; columns without a single cell are left out."""
    columns = [
        name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)
    ]
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def tables(path: Path) -> str:
    """What stands between a file's marks: where its numbers come from, and its tables."""
    found = history(path)
    kind = TABLES[path.name.split("-")[0]]
    made = [kind(one.data) for one in found]
    sources = []
    for one in found:
        torch, commit = one.told("torch"), one.told("commit")
        facts = [one.told("device"), torch and f"torch {torch}", commit and f"commit {commit}", one.told("date")]
        link = f"[{one.path.name}](../benchmarks/results/{one.path.name})"
        sources.append(": ".join(filter(None, [link, ", ".join(filter(None, facts))])))
    text = "; ".join(sources) + ".\n"
    for index in range(max(map(len, made))):
        rows = [
            row | ({"commit": one.told("commit") or one.path.name} if len(found) > 1 else {})
            for one, its in zip(found, made, strict=True)
            for row in (its[index] if index < len(its) else ())
        ]
        text += f"\n{markdown(rows)}" if rows else ""
    return text


def rendered(page: str, results: Path = RESULTS) -> str:
    """The page with its tables made anew; ValueError for a mark without an end."""
    if page.count("<!-- table:") != len(MARKED.findall(page)):
        raise ValueError("a table's mark has no <!-- end --> or is not alone on its line")
    return MARKED.sub(lambda mark: f"<!-- table: {mark[1]} -->\n\n{tables(results / mark[1])}\n<!-- end -->", page)


def joined(files: Sequence[Path]) -> str:
    """The text of one file, or of the parts of one measurement put together: lists are chained."""
    if len(files) == 1:
        return files[0].read_text()
    parts = [read(path) for path in files]
    if len({(part.told("device"), part.told("torch"), part.told("commit")) for part in parts}) > 1:
        raise SystemExit("parts of one measurement need the same device, torch and commit")
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.data.items():
            whole[key] = whole.get(key, []) + value if isinstance(value, list) else whole.get(key, value)
    return json.dumps(whole, indent=2) + "\n"


def add(files: Sequence[Path], name: str, results: Path = RESULTS) -> None:
    """Take in a measurement; the one that had the name gets its commit, or else its day, into it."""
    if name.split("-")[0] not in TABLES:
        raise SystemExit(f"{name!r} is none of {', '.join(TABLES)}, a hyphen and a machine: there is no table for it")
    path, text = results / name, joined(files)
    if path.exists():
        old = read(path)
        label = old.told("commit") or old.told("date") or "before"
        kept = path.with_name(f"{path.stem}.{label}{path.suffix}")
        if kept.exists():
            raise SystemExit(f"{kept} is there already: give it another name first")
        path.rename(kept)
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    parser.add_argument("--add", nargs="+", metavar="FILE", help="one or several parts, and the name last")
    asked = parser.parse_args()
    if asked.add:
        *files, name = asked.add
        add([Path(file) for file in files] or parser.error("--add takes a file and a name"), name)
    page = PAGE.read_text()
    new = rendered(page)
    if asked.check:
        raise SystemExit(0 if new == page else "docs/results.md is out of step: python scripts/results.py")
    PAGE.write_text(new)
    unused = {path.name for path in RESULTS.glob("*.json*")} - {one.path.name for name in MARKED.findall(new)
                                                               for one in history(RESULTS / name)}  # fmt: skip
    if unused:
        print(f"without a table on the page: {', '.join(sorted(unused))}")


if __name__ == "__main__":
    main()
