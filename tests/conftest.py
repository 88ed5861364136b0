"""Fixtures shared by all tests, and the one place where skips are decided."""

from __future__ import annotations

import functools
import gc
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_once import common_folder, made_once

from actionclip_deploy.tokenizer import Tokenizer, find_clip_merges

# A test that imports OpenVINO itself tells nobody of it (see runtimes/ov.py).
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

TESTS = Path(__file__).resolve().parent
DATA = TESTS / "data"
GOLDEN = DATA / "golden"
SHARED = TESTS.parents[1] / "shared"


# Files with a test that takes long: of several processes none is left with one at the end.
_FIRST = {
    TESTS / "programs" / "test_server_banks.py",
    TESTS / "unit" / "benchmarks" / "test_candidates.py",
    TESTS / "unit" / "cli" / "test_benchmark.py",
    TESTS / "unit" / "cli" / "test_endings.py",
    TESTS / "unit" / "video" / "test_differential.py",
    TESTS / "unit" / "video" / "test_live_servers.py",
    TESTS / "unit" / "video" / "test_shared_videos.py",
}
# What a terminal, a pipeline, an outer `make`, a hook of git or a user's settings hand on, and what
# would change the lines, widths and colours that tests read. A test sets what it needs itself.
_NOT_HANDED_ON = re.compile(
    r"CI|GITHUB_ACTIONS|COLUMNS|LINES|TERM|COLORTERM|NO_COLOR|FORCE_COLOR|CLICOLOR(_FORCE)?|PY_COLORS"
    r"|TTY_\w+|LANG|LANGUAGE|LC_\w+|PYTHON(WARNINGS|IOENCODING|UTF8)|MFLAGS|MAKE\w+|GIT_\w+"
    r"|(ACTIONCLIP|OTEL|TYPER|_TYPER)_\w+"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


gc.disable()  # until all tests are collected: what they import and are stays


@pytest.hookimpl(trylast=True)  # pytest's own output has looked at them by then
def pytest_configure() -> None:
    for name in list(filter(_NOT_HANDED_ON.fullmatch, os.environ)):
        del os.environ[name]
    os.environ["LANG"] = "C.UTF-8"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path not in _FIRST)
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="full-size; run pytest --slow"))


def pytest_collection_finish(session: pytest.Session) -> None:
    # Torch and the tests are some 400,000 objects that stay; the garbage collector need not look
    # at them again, nor so often at the many that an export makes: that took a seventh of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(autouse=True)
def _usual_priority() -> Iterator[None]:
    """No test makes this process one of real time (see rendering.py), or it would not end alone."""
    yield
    if sys.platform == "linux":
        assert os.sched_getscheduler(0) == os.SCHED_OTHER, "this process takes the cores from all"


@pytest.fixture(scope="session", autouse=True)
def _no_graph_cache() -> Iterator[None]:
    """Optimised graphs are not kept from one run of the tests to the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTIONCLIP_CACHE", "off")
        yield


@pytest.fixture(scope="module")
def cache_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache that a user has, kept for the run: what `auto` chose is not measured anew.

    For tests that start the same bundle again and again, and whose subject is something else.
    """
    folder = common_folder(tmp_path_factory) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTIONCLIP_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def _certificates_are_read_once() -> Iterator[None]:
    """Certificates are read from disk once in a process, and not for each connection."""
    from httpx._transports import default as transports

    create = transports.create_ssl_context

    @functools.cache
    def kept(_of: tuple[str | None, ...], **options: Any) -> Any:
        return create(**options)

    def create_ssl_context(**options: Any) -> Any:
        return kept(tuple(map(os.environ.get, ("SSL_CERT_FILE", "SSL_CERT_DIR"))), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transports, "create_ssl_context", create_ssl_context)
        yield


@pytest.fixture(scope="session", autouse=True)
def _trace_memory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Graphs are traced once in a run (traced_graphs.py); None where nothing needs torch."""
    exported = {"tiny_checkpoints", "motions_bundle"}
    with_torch = any(exported & {*item.fixturenames} for item in request.session.items)
    if not with_torch and "torch" not in sys.modules:
        yield None
        return
    import torch
    from torch._export import utils as export_utils
    from traced_graphs import ONNXRegistry, TraceMemory, onnx_registry

    memory = TraceMemory(common_folder(tmp_path_factory) / "traced")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", memory.export)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(onnx_registry))
        # It asks for each operator of torch by name, so that all are listed: once is enough.
        materialize = functools.cache(export_utils._materialize_cpp_cia_ops)
        patch.setattr(export_utils, "_materialize_cpp_cia_ops", materialize)
        yield memory


@pytest.fixture
def traced_anew(_trace_memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch traces each graph of the test, whatever it traced before."""
    monkeypatch.setattr(_trace_memory, "is_used", False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference material beside the checkout: videos, labels and the whole golden set."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference material in ../shared")
    return SHARED


@pytest.fixture
def node_placement() -> None:
    """ONNX Runtime tells which execution provider each node runs on, since version 1.24."""
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24):
        pytest.skip(f"onnxruntime {onnxruntime.__version__} does not tell where nodes run")


@pytest.fixture(scope="session")
def needs_tensorrt_rtx() -> None:
    """NVIDIA's compiler, which `dev` brings where there is one."""
    if not (sys.platform == "win32" or (sys.platform, platform.machine()) == ("linux", "x86_64")):
        pytest.skip("TensorRT for RTX is for Linux on x86-64 and for Windows")


@pytest.fixture(scope="session")
def expected() -> dict[str, np.ndarray]:
    """Inputs and outputs of the original implementation (tests/data/README.md)."""
    with np.load(GOLDEN / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def preprocess_golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "preprocess.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def center_samples() -> dict[str, list[int]]:
    samples: dict[str, list[int]] = json.loads((GOLDEN / "sampler_center.json").read_text())
    return samples


@pytest.fixture(scope="session")
def golden_weights() -> dict[str, np.ndarray]:
    """`model/KEY` and `head_NAME/KEY` arrays of the tiny golden model."""
    with np.load(GOLDEN / "weights.npz") as arrays:
        weights = dict(arrays)
    # The file leaves out the rows of tokens that the golden texts do not have. A model with rows of
    # zeros would be one of a small vocabulary, so they are noise, as CLIP's are to begin with.
    table = weights["model/token_embedding.weight"].copy()
    left_out = ~table.any(axis=1)
    noise = np.random.default_rng(0).normal(scale=0.02, size=(int(left_out.sum()), table.shape[1]))
    table[left_out] = noise
    return {**weights, "model/token_embedding.weight": table}


@pytest.fixture(scope="session")
def kinetics_400() -> tuple[str, ...]:
    """The names of Kinetics-400 in the order of their ids."""
    text = (DATA / "labels" / "kinetics_400.json").read_text(encoding="utf-8")
    return tuple(json.loads(text))


@pytest.fixture(scope="session")
def clip_tokenizer() -> Tokenizer:
    """CLIP's tokenizer, from the list of byte pairs that open_clip ships."""
    return Tokenizer.from_clip_merges(find_clip_merges())


def _original_checkpoint(weights: dict[str, np.ndarray], head: str) -> dict[str, Any]:
    import torch

    def part(prefix: str) -> dict[str, Any]:
        return {
            key.removeprefix(prefix): torch.from_numpy(value.copy())
            for key, value in weights.items()
            if key.startswith(prefix)
        }

    return {
        "epoch": 3,
        "model_state_dict": part("model/"),
        "fusion_model_state_dict": part(f"head_{head}/"),
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    }


@pytest.fixture(scope="session")
def tiny_checkpoints(
    golden_weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Paths of checkpoints in the original's format: Transf, LSTM, Conv_1D and meanP heads."""
    heads = ("Transf", "LSTM", "Conv_1D", "meanP")

    def write(folder: Path) -> None:
        import torch

        folder.mkdir()
        for head in heads:
            path = folder / f"tiny_{head}_8f.pt"
            torch.save(_original_checkpoint(golden_weights, head), path)

    folder = made_once(common_folder(tmp_path_factory) / "checkpoints", write)
    return {head: folder / f"tiny_{head}_8f.pt" for head in heads}


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle exported from the tiny Transf checkpoint; copy it before you change it.

    It is that of the other processes of the run as well.
    """

    def write(folder: Path) -> None:
        from actionclip_deploy.export import export_checkpoint

        export_checkpoint(tiny_checkpoints["Transf"], folder)

    return made_once(common_folder(tmp_path_factory) / "bundles" / "tiny", write)


@pytest.fixture(scope="session")
def tiny_fp16_bundle(
    tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """As `tiny_bundle`, in fp16; copy it before you change it."""

    def write(folder: Path) -> None:
        from actionclip_deploy.export import export_checkpoint

        export_checkpoint(tiny_checkpoints["Transf"], folder, precision="fp16")

    return made_once(common_folder(tmp_path_factory) / "bundles" / "tiny-fp16", write)


@pytest.fixture(scope="session")
def motions_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's bundle in fp32; copy it before you change it."""

    def write(folder: Path) -> None:
        from actionclip_deploy.export import export_checkpoint

        export_checkpoint("motions", folder)

    return made_once(common_folder(tmp_path_factory) / "bundles" / "motions", write)


@pytest.fixture(scope="session")
def plain_graphs(
    tiny_bundle: Path, tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What `torch.onnx.export` makes of the tiny Transf checkpoint, as benchmarks have it made."""

    def write(folder: Path) -> None:
        from actionclip_deploy.benchmarks.candidates import RowSpec

        checkpoint = tiny_checkpoints["Transf"]
        row = RowSpec(
            "plain", "onnxruntime-plain", tiny_bundle, checkpoint, None, "cpu", 1, num_frames=8
        )
        row.prepare(folder)

    return made_once(common_folder(tmp_path_factory) / "plain", write)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The fake module under both of the real names; change its `state` to make it fail."""
    import fake_tensorrt

    from actionclip_deploy.runtimes.trt import build, runtime
    from actionclip_deploy.runtimes.trt.driver import Cuda

    state = fake_tensorrt._State()
    monkeypatch.setattr(fake_tensorrt, "state", state)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setenv("ACTIONCLIP_CACHE", str(tmp_path / "cache"))
    for module in (build, runtime):
        monkeypatch.setattr(module, "open_cuda", lambda: Cuda(state.cudart))
        monkeypatch.setattr(module, "require_gpu", lambda _: None)
    monkeypatch.setattr(build, "cuda_devices", lambda: (["Orin"], None))
    yield fake_tensorrt
    assert not state.cudart.memory, "memory was not freed"
    assert not state.cudart.streams, "streams were not destroyed"
    assert not state.cudart.graphs, "recordings were not destroyed"


@pytest.fixture(scope="session")
def rendered_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An H.264 file of 40 frames, 96 x 72, in which a square moves from left to right."""
    import av

    path = tmp_path_factory.mktemp("videos") / "square.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 72, "yuv420p"
        for step in range(40):
            picture = np.full((72, 96, 3), 40, np.uint8)
            picture[24:48, 2 * step : 2 * step + 16] = (220, 60, 30)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


def _built_by_check(variable: str) -> Path:
    value = os.environ.get(variable)
    if value is None:
        pytest.skip("needs what scripts/check builds; run scripts/check")
    path = Path(value)
    assert path.exists(), path
    return path


@pytest.fixture(scope="session")
def built_packages() -> Path:
    """The folder with the wheel and the sdist."""
    return _built_by_check("DIST")


@pytest.fixture(scope="session")
def edge_python() -> Path:
    """The interpreter of an environment with the wheel and ONNX Runtime, and without torch."""
    return _built_by_check("EDGE_PYTHON")


@pytest.fixture(scope="session")
def edge_lowest_python() -> Path:
    """The same with the lowest versions that pyproject.toml allows."""
    return _built_by_check("EDGE_LOWEST_PYTHON")
