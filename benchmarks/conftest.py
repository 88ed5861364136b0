"""What the benchmarks share: the default model's bundle, and videos that it knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from actionclip_deploy import Bundle, Runtime, open_runtime
from actionclip_deploy.export import export_checkpoint
from actionclip_deploy.motions import write_dataset

NUM_VIDEOS = 8


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The default model."""
    return export_checkpoint("motions", tmp_path_factory.mktemp("bundle") / "motions").bundle


@pytest.fixture(scope="session")
def runtime(bundle: Bundle) -> Iterator[Runtime]:
    """ONNX Runtime on the CPU, one thread, so that numbers do not depend on the cores."""
    with open_runtime(bundle, "onnxruntime", num_threads=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of rendered videos, with its label file and annotations."""
    folder = tmp_path_factory.mktemp("videos")
    write_dataset(folder, "test", NUM_VIDEOS, 1)
    return folder
