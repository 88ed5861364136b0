"""Export published checkpoints, or a folder of checkpoints, and write a parity table.

    python export/export_zoo.py weights/ --output zoo
    python export/export_zoo.py motions mmaction2-k400-vit-b-16-8f --weights downloads --output zoo
    python export/export_zoo.py weights/ --precision fp32 fp16 --output zoo --resume
    python export/export_zoo.py --list

Each checkpoint becomes the bundle NAME-PRECISION in the output folder, by the recipe of its family
(recipes/*.yaml), and a row of parity.md and parity.json beside the bundles. A checkpoint that fails
has its sentence in the table, and the others go on. The exit code is 0 if all agree with PyTorch,
3 if one does not or failed, 2 for arguments that cannot be used.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import load_file

from actionclip_deploy import ActionClipError, Bundle
from actionclip_deploy.export import export_checkpoint
from actionclip_deploy.files import read_text, write_json, write_text

RECIPES = Path(__file__).resolve().parent / "recipes"
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
SOME_FAILED = 3
# What a checkpoint may fail by. Anything else is a fault of this program, and ends it.
FAILURES = (ActionClipError, OSError, ValueError)

# Comparisons with PyTorch; the others of a report compare a runtime with itself.
FRAME_GRAPHS = ("visual", "video")
GRAPHS = (*FRAME_GRAPHS, "temporal", "textual", "textual, full length")
_TITLES = {
    "features": "a difference of features of",
    "cosine": "1 - cosine of",
    "scores": "a difference of scores of",
}

Share = Annotated[float, Field(gt=0, lt=1)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Tolerances(_Record):
    """How far a bundle may be from PyTorch: feature and score differences, and 1 - cosine."""

    features: Share = Field(description="of the largest feature")
    cosine: Share = Field(description="1 - the smallest cosine of any graph's outputs")
    scores: Share


class Published(_Record):
    """A file that its authors published; without a file it comes with the package."""

    file: str | None = None
    address: str | None = None
    sha256: str | None = Field(None, pattern="^[0-9a-f]{8,64}$", description="or its beginning")


class Options(_Record):
    """Arguments of the export that cannot be read off a file of the family."""

    family: str | None = None
    num_frames: Annotated[int, Field(ge=1)] | None = None
    visual_prompt: str | None = None


class Recipe(_Record):
    """How the checkpoints of one family are exported, and how exact that has to be."""

    family: str = Field(description="as the manifest names it")
    files: list[str] = Field(description="patterns of the usual names")
    published: dict[str, Published] = {}
    base: dict[str, str] = Field({}, description="published name or open_clip: tag by pattern")
    options: Options = Options()
    tolerances: dict[Literal["fp32", "fp16"], Tolerances] = Field(min_length=2)
    licence: str


@dataclass(frozen=True)
class Job:
    """One checkpoint to export.

    Attributes:
        name: Of its bundle, without the precision.
        checkpoint: A file, `open_clip:MODEL/TAG`, or `motions`.
        recipe: Name of its recipe; None leaves the family to be found from the keys.
        published: What is known of the file, for one that was given by its published name.
    """

    name: str
    checkpoint: str | Path
    recipe: str | None
    published: Published | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table; what a failed checkpoint does not tell is None."""

    checkpoint: str
    precision: str
    recipe: str | None = None
    bundle: str | None = None
    source_sha256: str | None = None
    family: str | None = None
    backbone: str | None = None
    visual_prompt: str | None = None
    num_frames: int | None = None
    feature_difference: float | None = None
    cosine_distance: float | None = None
    score_difference: float | None = None
    same_top1: bool | None = None
    seconds: float | None = None
    bundle_bytes: int | None = None
    tolerances: dict[str, float] | None = None
    passed: bool = False
    error: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Export everything that was named."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        recipes = read_recipes(options.recipes)
        if options.list:
            print(list_published(recipes))
            return 0
        if options.output is None:
            raise ValueError("--output is missing; name the folder for the bundles and the table.")
        if options.recipe is not None and options.recipe not in recipes:
            raise ValueError(
                f"There is no recipe {options.recipe!r}; take one of {', '.join(recipes)}."
            )
        jobs = plan(options.checkpoints, recipes, weights=options.weights, recipe=options.recipe)
        _check_writable(options.output)
    except ValueError as exc:
        parser.error(str(exc))
    earlier = _read_seconds(options.output)
    rows: list[Row] = []
    for job in jobs:
        for precision in dict.fromkeys(options.precision):
            print(f"{job.name}, {precision}: ", end="", flush=True)
            rows.append(export_one(job, precision, recipes, options, earlier))
            # After each, so that a run that is stopped leaves a table of what it did.
            write_tables(options.output, rows, recipes)
            print("agrees" if rows[-1].passed else f"FAILED. {rows[-1].error}", flush=True)
    print(f"Wrote {options.output / 'parity.md'} and {options.output / 'parity.json'}.")
    return 0 if all(row.passed for row in rows) else SOME_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="published name (--list), checkpoint file, folder of them, or open_clip:MODEL/TAG",
    )
    parser.add_argument("--output", type=Path, help="folder of the bundles and the table")
    parser.add_argument(
        "--weights", type=Path, default=Path(), help="folder of published files; default: here"
    )
    parser.add_argument("--precision", nargs="+", choices=("fp32", "fp16"), default=["fp32"])
    parser.add_argument("--recipe", help="take this one for everything, whatever the file names")
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="folder of recipes")
    parser.add_argument(
        "--golden-video",
        type=Path,
        action="append",
        default=[],
        help="a real video to compare with, repeatable; otherwise frames are rendered",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="keep bundles that are there")
    existing.add_argument("--overwrite", action="store_true", help="replace them")
    parser.add_argument("--list", action="store_true", help="list the published checkpoints")
    return parser


def read_recipes(folder: Path) -> dict[str, Recipe]:
    """Read every recipe of a folder, by its file's stem.

    Raises:
        ValueError: If there is none, or one is not valid: which file and which key.
    """
    recipes = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            content = yaml.safe_load(read_text(path, "recipe", ValueError))
            recipes[path.stem] = Recipe.model_validate(content)
        except ValidationError as exc:
            first = exc.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ValueError(
                f"{path} is not a valid recipe: {key}: {first['msg']}, given "
                f"{first['input']!r}; correct it."
            ) from exc
        except yaml.YAMLError as exc:
            detail = " ".join(str(exc).split())
            raise ValueError(f"{path} cannot be read as YAML ({detail}); correct it.") from exc
    if not recipes:
        raise ValueError(f"{folder} holds no recipes (*.yaml); give another --recipes.")
    known = published_names(recipes)
    for name, recipe in recipes.items():
        for base in recipe.base.values():
            if base not in known and not base.startswith("open_clip:"):
                raise ValueError(
                    f"{folder / name}.yaml is not a valid recipe: base: {base!r} is neither "
                    f"published ({', '.join(known)}) nor open_clip:MODEL/TAG; correct it."
                )
    return recipes


def published_names(recipes: dict[str, Recipe]) -> dict[str, tuple[str, Published]]:
    """Every published checkpoint with its recipe's name."""
    return {
        name: (recipe_name, published)
        for recipe_name, recipe in recipes.items()
        for name, published in recipe.published.items()
    }


def list_published(recipes: dict[str, Recipe]) -> str:
    """One line for each published checkpoint."""
    lines = []
    for name, (recipe, published) in published_names(recipes).items():
        source = "comes with the package"
        if published.file is not None:
            source = f"{published.file} from {published.address}"
        lines.append(f"{name} ({recipe}): {source}")
    return "\n".join(lines)


def plan(
    given: Sequence[str], recipes: dict[str, Recipe], *, weights: Path, recipe: str | None
) -> list[Job]:
    """Turn names, files and folders into jobs, before anything is exported.

    Raises:
        ValueError: If one is nothing of these, a folder is empty, or two would have one bundle.
    """
    known, jobs = published_names(recipes), []
    for word in given:
        path = Path(word)
        if word in known and not path.is_file():  # a file of that name wins, as in the package
            own, published = known[word]
            source: str | Path = word if published.file is None else weights / published.file
            jobs.append(Job(word, source, recipe or own, published))
        elif word.startswith("open_clip:"):
            name = word.removeprefix("open_clip:").replace("/", "-")
            jobs.append(Job(name, word, recipe or _recipe_of(word, recipes)))
        elif path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
            if not files:
                raise ValueError(
                    f"The folder {word} holds no checkpoint ({', '.join(SUFFIXES)}); give another."
                )
            jobs += [Job(p.stem, p, recipe or _recipe_of(p.name, recipes)) for p in files]
        elif path.is_file():
            jobs.append(Job(path.stem, path, recipe or _recipe_of(path.name, recipes)))
        else:
            raise ValueError(
                f"{word!r} is no file, no folder and no published checkpoint; the published ones "
                f"are {', '.join(known)}."
            )
    if not jobs:
        raise ValueError("No checkpoint is given; give names, files or folders.")
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"More than one checkpoint would become the bundle {', '.join(twice)}; rename the "
            "files, or export them into different folders."
        )
    return jobs


def _recipe_of(file: str, recipes: dict[str, Recipe]) -> str | None:
    """The recipe whose pattern fits the name, the longest one if several do; None if none does."""
    fitting = [
        (len(pattern), name)
        for name, recipe in recipes.items()
        for pattern in recipe.files
        if fnmatch.fnmatchcase(file, pattern)
    ]
    return max(fitting)[1] if fitting else None


def export_one(
    job: Job,
    precision: str,
    recipes: dict[str, Recipe],
    options: argparse.Namespace,
    earlier: dict[str, float],
) -> Row:
    """Export one checkpoint in one precision, or keep its bundle, and measure it."""
    name = f"{job.name}-{precision}"
    failed = Row(job.name, precision, job.recipe)
    start = time.perf_counter()
    try:
        if job.published is not None:
            _check_published(job)
        recipe = recipes[job.recipe] if job.recipe is not None else None
        given = _arguments(job, recipe, recipes, options.weights)
        target = options.output / name
        seconds: float | None = None
        if options.resume and (target / "manifest.json").is_file():
            bundle, seconds = _kept_bundle(target, job, given, precision), earlier.get(name)
        else:
            bundle = export_checkpoint(
                job.checkpoint,
                target,
                precision=precision,
                overwrite=options.overwrite,
                golden_videos=options.golden_video,
                **given,
            ).bundle
            seconds = round(time.perf_counter() - start, 1)
        return measure(bundle, job, precision, recipes, seconds)
    except FAILURES as exc:
        return Row(**{**asdict(failed), "error": " ".join(str(exc).split())})


def _check_published(job: Job) -> None:
    """Whether the file of a published name is there, and is that file."""
    path, published = job.checkpoint, job.published
    if published is None or not isinstance(path, Path):
        return
    if not path.is_file():
        raise ValueError(
            f"{path} is not there; get {job.name} from {published.address}, or name the folder "
            "that holds it with --weights."
        )
    if published.sha256 is not None and not _sha256(path).startswith(published.sha256):
        raise ValueError(
            f"{path} is not the published {job.name}: its sha256 does not begin with "
            f"{published.sha256}; get it again from {published.address}."
        )


def _arguments(
    job: Job, recipe: Recipe | None, recipes: dict[str, Recipe], weights: Path
) -> dict[str, Any]:
    """Arguments of the export that the recipe has for this checkpoint."""
    if recipe is None:
        return {}
    arguments = recipe.options.model_dump(exclude_none=True)
    if str(job.checkpoint).startswith("open_clip:"):
        arguments.pop("family", None)  # a tag tells its activation, and so its family
    name = Path(job.checkpoint).name
    for pattern, base in recipe.base.items():
        if fnmatch.fnmatchcase(name, pattern):
            arguments["base"] = _find_base(base, Path(job.checkpoint), recipes, weights)
            return arguments
    if recipe.base:
        raise ValueError(
            f"{name} needs the CLIP checkpoint that its training started from, and the recipe "
            f"{job.recipe} knows it only for {', '.join(recipe.base)}; rename the file, or export "
            "it with `actionclip export --base`."
        )
    return arguments


def _find_base(base: str, checkpoint: Path, recipes: dict[str, Recipe], weights: Path) -> str:
    """The CLIP checkpoint that completes another: beside that, or in the folder of weights."""
    if base.startswith("open_clip:"):
        return base
    _, published = published_names(recipes)[base]
    places = [folder / str(published.file) for folder in (checkpoint.parent, weights)]
    path = next((place for place in places if place.is_file()), places[-1])
    _check_published(Job(base, path, None, published))
    return str(path)


def _kept_bundle(target: Path, job: Job, given: dict[str, Any], precision: str) -> Bundle:
    """Open a bundle of an earlier run, if it is what would be exported now.

    Raises:
        ValueError: If it is of another checkpoint or was made with other arguments.
        BundleError: If it cannot be opened.
    """
    bundle = Bundle.open(target)
    manifest = bundle.manifest
    found: dict[str, Any] = {"precision": manifest.precision(), "file": manifest.source.file}
    wanted: dict[str, Any] = {"precision": precision, "file": Path(job.checkpoint).name}
    if Path(job.checkpoint).is_file():
        found["sha256"], wanted["sha256"] = manifest.source.sha256, _sha256(Path(job.checkpoint))
    elif str(job.checkpoint).startswith("open_clip:"):
        wanted.pop("file")  # the manifest has the name that the file has in open_clip's cache
    if Path(given.get("base", "")).is_file():
        found["base"] = manifest.source.base_sha256
        wanted["base"] = _sha256(Path(given["base"]))
    for option in ("num_frames", "visual_prompt"):
        if option in given:
            found[option], wanted[option] = getattr(manifest.model, option), given[option]
    for key, value in wanted.items():
        if found[key] != value:
            raise ValueError(
                f"{target} exists and its {key} is {found[key]}, where this export has {value}; "
                "replace it with --overwrite, or remove it."
            )
    return bundle


def measure(
    bundle: Bundle, job: Job, precision: str, recipes: dict[str, Recipe], seconds: float | None
) -> Row:
    """Read the row of a bundle off its manifest and its report, and judge it by its recipe."""
    manifest = bundle.manifest
    recipe, family = job.recipe, manifest.source.family
    # A name is a guess; the keys decide.
    if recipe is None or recipes[recipe].family != family:
        recipe = _recipe_of_family(family, recipes)
    tolerances = recipes[recipe].tolerances[precision]  # type: ignore[index]  # one of --precision
    report = json.loads(bundle.file("reports/parity.json").read_text(encoding="utf-8"))
    with_torch = [c for c in report["comparisons"] if c["what"] in GRAPHS]
    scores = [c for c in report["comparisons"] if c["what"] == "scores"]
    features = max(c["max_abs_difference"] for c in with_torch if c["what"] in FRAME_GRAPHS)
    measured = {
        "features": features / _largest_feature(bundle),
        "cosine": max(0.0, *(1 - c["min_cosine"] for c in with_torch)),
        "scores": max(c["max_abs_difference"] for c in scores),
    }
    same_top1 = all(c["top1_agreement"] == 1 for c in scores)
    allowed = tolerances.model_dump()
    wrong = [
        f"{_TITLES[key]} {value:.2g} where {allowed[key]:.2g} is allowed"
        for key, value in measured.items()
        if value > allowed[key]
    ]
    wrong += [] if same_top1 else ["another first label"]
    files = manifest.files.values()
    size = sum(spec.size_bytes for spec in files) + (bundle.path / "manifest.json").stat().st_size
    return Row(
        checkpoint=job.name,
        precision=precision,
        recipe=recipe,
        bundle=bundle.path.name,
        source_sha256=manifest.source.sha256,
        family=family,
        backbone=manifest.model.backbone,
        visual_prompt=manifest.model.visual_prompt,
        num_frames=manifest.model.num_frames,
        feature_difference=measured["features"],
        cosine_distance=measured["cosine"],
        score_difference=measured["scores"],
        same_top1=same_top1,
        seconds=seconds,
        bundle_bytes=size,
        tolerances=allowed,
        passed=not wrong,
        error=f"Beyond the recipe {recipe}: {'; '.join(wrong)}." if wrong else None,
    )


def _recipe_of_family(family: str, recipes: dict[str, Recipe]) -> str:
    """The recipe of a family that was found from the keys; the one of its name, if several are."""
    found = [name for name, recipe in recipes.items() if recipe.family == family]
    if not found:
        raise ValueError(f"There is no recipe for the family {family}; write one into --recipes.")
    return family if family in found else found[0]


def _largest_feature(bundle: Bundle) -> float:
    """What feature differences are a share of; 1 for embeddings, whose norm is."""
    golden = load_file(bundle.file("golden/golden.safetensors"))
    features = golden.get("frame_features")  # absent where frames are mixed inside the backbone
    return 1.0 if features is None else float(np.abs(features).max())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _check_writable(folder: Path) -> None:
    """Make the folder and write into it now, not after the minutes of the first export."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as exc:
        raise ValueError(
            f"{folder} cannot be written ({exc.strerror}); give another --output."
        ) from exc


def _read_seconds(output: Path) -> dict[str, float]:
    """How long the bundles of an earlier run took, which only its table knows."""
    try:
        rows = json.loads((output / "parity.json").read_text(encoding="utf-8"))["rows"]
        return {row["bundle"]: row["seconds"] for row in rows if row["bundle"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def write_tables(output: Path, rows: Sequence[Row], recipes: dict[str, Recipe]) -> None:
    """Write parity.json and parity.md, each whole."""
    content = {"schema_version": 1, "rows": [asdict(row) for row in rows]}
    write_json(output / "parity.json", content)
    write_text(output / "parity.md", markdown(rows, recipes))


def markdown(rows: Sequence[Row], recipes: dict[str, Recipe]) -> str:
    """The table, and what is known of the licences."""
    lines = [
        "| checkpoint | family | backbone | visual prompt | T | precision | features | 1 - cosine "
        "| scores | same top-1 | seconds | MB | result |",
        f"|{'---|' * 4}---:|---|{'---:|' * 3}---|{'---:|' * 2}---|",
    ]
    for row in rows:
        cells: list[object] = [
            *(row.checkpoint, row.family, row.backbone, row.visual_prompt, row.num_frames),
            *(row.precision, *_differences(row)),
            {True: "yes", False: "no", None: None}[row.same_top1],
            row.seconds,
            None if row.bundle_bytes is None else f"{row.bundle_bytes / 1e6:.1f}",
            "agrees" if row.passed else row.error,
        ]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    lines += [
        "",
        "Largest differences between ONNX Runtime on the CPU and PyTorch on the golden inputs of "
        "each bundle, and in brackets what the recipe allows. Features: as a share of the largest.",
        "",
    ]
    used = sorted({row.recipe for row in rows if row.recipe is not None})
    lines += [f"- Licence, {name}: {' '.join(recipes[name].licence.split())}" for name in used]
    return "\n".join(lines).rstrip() + "\n"


def _differences(row: Row) -> list[str | None]:
    values = (row.feature_difference, row.cosine_distance, row.score_difference)
    if row.tolerances is None:
        return [None] * len(values)
    allowed = (row.tolerances[key] for key in ("features", "cosine", "scores"))
    return [f"{value:.1e} ({limit:.0e})" for value, limit in zip(values, allowed, strict=True)]


def _cell(value: object) -> str:
    return "" if value is None else str(value).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
