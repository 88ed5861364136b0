"""The default model: what ships recognises new videos, and its exports as well as PyTorch does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actionclip_deploy import Bundle, LabelBank, Recognizer, open_runtime
from actionclip_deploy.evaluate.annotations import Sample, read_annotations
from actionclip_deploy.evaluate.evaluate import Evaluation, evaluate
from actionclip_deploy.export import export_checkpoint
from actionclip_deploy.export.pipeline import open_checkpoint
from actionclip_deploy.known_words import read_vocabulary
from actionclip_deploy.model.zoo import read_provenance
from actionclip_deploy.motions import all_labels, write_dataset
from actionclip_deploy.runtimes import Runtime

LABELS = tuple(str(label) for label in all_labels())
SPLITS = ("test", "heldout")
NUM_VIDEOS = 60
SEED = 77  # neither of training (0) nor of the demo
# Of 60 videos: four in a hundred fewer than the provenance says would be 2 or 3, and this is a
# sample of it; a model that is broken anywhere gets hardly any right.
LEAST = {"test": 0.85, "heldout": 0.7}
POINTS = 0.002
# Scores are softmaxes of 100 x cosine: rounding by 1e-6 in fp32 and 1e-4 in fp16 gives this.
TOLERANCES = {"fp32": 1e-3, "fp16": 5e-2}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Sample]]:
    folder = tmp_path_factory.mktemp("motions")
    return {
        split: read_annotations(write_dataset(folder, split, NUM_VIDEOS, SEED), LABELS)
        for split in SPLITS
    }


def _evaluate(
    bundle: Bundle, runtime: Runtime, samples: dict[str, list[Sample]]
) -> dict[str, Evaluation]:
    bank = LabelBank.build(bundle, runtime, LABELS, name="motions", templates=("{}",))
    return {name: evaluate(Recognizer(runtime, bank), found) for name, found in samples.items()}


@pytest.fixture(scope="module")
def reference(samples: dict[str, list[Sample]]) -> dict[str, Evaluation]:
    with open_checkpoint("motions") as (bundle, runtime):
        return _evaluate(bundle, runtime, samples)


@pytest.mark.parametrize("split", SPLITS)
def test_it_recognises_videos_that_it_has_never_seen(
    reference: dict[str, Evaluation], split: str
) -> None:
    assert reference[split].metrics.top1 >= LEAST[split]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_its_export_is_as_accurate_as_pytorch(
    reference: dict[str, Evaluation],
    samples: dict[str, list[Sample]],
    motions_bundle: Path,
    tmp_path: Path,
    precision: str,
) -> None:
    if precision == "fp32":
        bundle = Bundle.open(motions_bundle)
    else:
        bundle = export_checkpoint("motions", tmp_path / "bundle", precision=precision).bundle
    assert bundle.manifest.licence == "MIT"
    assert bundle.manifest.source.file == "motions"
    vocabulary = read_vocabulary(bundle)
    assert vocabulary is not None
    assert vocabulary.num_known == 72
    with open_runtime(bundle, "torch", checkpoint=Path("motions")) as runtime:
        assert runtime.describe().name == "torch"
    with open_runtime(bundle, "onnxruntime") as runtime:
        exported = _evaluate(bundle, runtime, samples)
    for split, found in exported.items():
        difference = np.abs(found.scores - reference[split].scores).max()
        assert difference < TOLERANCES[precision], split
        assert abs(found.metrics.top1 - reference[split].metrics.top1) <= 1 / NUM_VIDEOS + 1e-9


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("split", SPLITS)
def test_on_the_whole_test_set_its_exports_were_within_a_fifth_of_a_point(
    precision: str, split: str
) -> None:
    provenance = read_provenance("motions")
    exported, reached = provenance["exported"][precision][split], provenance["metrics"][split]
    assert exported["num_videos"] == reached["num_videos"] >= 1000
    assert abs(exported["top1"] - reached["top1"]) <= POINTS
