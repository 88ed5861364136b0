from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_graphs import WEIGHTS, write_tiny_bundle

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import IntegrityError
from actionclip_deploy.files import sha256_of_file
from actionclip_deploy.keyed_store import ENTRY_RECORD, StoredEntry, file_signature
from actionclip_deploy.runtimes import graph_cache, ort
from actionclip_deploy.runtimes.graph_cache import (
    DATA_NAME,
    GRAPH_NAME,
    GraphCache,
    GraphFiles,
    open_cache,
)
from actionclip_deploy.runtimes.ort import OrtRuntime

pytestmark = pytest.mark.usefixtures("_small_graphs")

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def _small_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let graphs of any size be cached."""
    monkeypatch.setattr(graph_cache, "_MIN_GRAPH_BYTES", 0)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def cache(tmp_path: Path) -> GraphCache:
    return GraphCache(tmp_path / "cache" / "graphs")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The optimised graphs that are written, in order."""
    paths: list[Path] = []
    open_session = ort.open_session

    def note(*given: Any, write_to: Path | None = None, **options: Any) -> Any:
        if write_to is not None:
            paths.append(write_to)
        return open_session(*given, write_to=write_to, **options)

    monkeypatch.setattr(ort, "open_session", note)
    return paths


def encode(bundle: Bundle, cache: GraphCache | None) -> np.ndarray:
    with OrtRuntime(bundle, num_threads=1, cache=cache) as runtime:
        return runtime.encode_frames(FRAMES)


def entries(cache: GraphCache) -> list[Path]:
    return sorted(cache.folder.iterdir())


def test_the_second_start_opens_what_the_first_one_wrote(
    bundle: Bundle, cache: GraphCache, written: list[Path]
) -> None:
    first, second = encode(bundle, cache), encode(bundle, cache)
    assert len(written) == 1
    (entry,) = entries(cache)
    assert {GRAPH_NAME, ENTRY_RECORD} <= {path.name for path in entry.iterdir()}
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("which", ["tiny_bundle", "tiny_fp16_bundle"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_cached_graph_gives_the_same_bits(
    which: str, num_threads: int, cache: GraphCache, request: pytest.FixtureRequest
) -> None:
    bundle = Bundle.open(request.getfixturevalue(which))
    size = bundle.manifest.model.input_size
    frames = np.random.default_rng(1).integers(0, 256, (2, 8, size, size, 3), dtype=np.uint8)
    tokens = np.random.default_rng(2).integers(1, 99, (3, 9), dtype=np.int32)

    def run(cache: GraphCache | None) -> list[np.ndarray]:
        with OrtRuntime(bundle, num_threads=num_threads, cache=cache) as runtime:
            return [runtime.encode_video(frames), runtime.encode_text(tokens)]

    plain = run(None)
    for _ in range(2):
        for given, expected in zip(run(cache), plain, strict=True):
            np.testing.assert_array_equal(given, expected)
    assert len(entries(cache)) == 3


def test_two_fine_tunes_never_share_an_entry(tmp_path: Path, cache: GraphCache) -> None:
    def doubled(name: str, model: Any) -> Any:
        if name == "visual":
            weights = next(t for t in model.graph.initializer if t.name == "weights")
            weights.raw_data = (2 * WEIGHTS).tobytes()
        return model

    one = write_tiny_bundle(tmp_path / "one")
    other = write_tiny_bundle(tmp_path / "other", change=doubled)
    np.testing.assert_allclose(2 * encode(one, cache), encode(other, cache), rtol=1e-6)
    np.testing.assert_allclose(2 * encode(one, cache), encode(other, cache), rtol=1e-6)
    assert len(entries(cache)) == 2


def double_weights(bundle: Bundle) -> None:
    path = bundle.path / "visual.onnx"
    path.write_bytes(path.read_bytes().replace(WEIGHTS.tobytes(), (2 * WEIGHTS).tobytes()))


@pytest.mark.parametrize("same_times", [False, True])
def test_a_graph_that_was_changed_in_its_place_is_refused(
    same_times: bool, bundle: Bundle, cache: GraphCache
) -> None:
    encode(bundle, cache)
    path = bundle.graph_path("visual")
    status = path.stat()
    double_weights(bundle)
    if same_times:  # as a copying program restores them; the inode's own time cannot be set
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(IntegrityError, match=r"visual\.onnx does not have the sha256 .*copy the b"):
        encode(bundle, cache)


@pytest.mark.parametrize("cached", [False, True])
def test_an_altered_graph_is_refused_and_not_cached(
    cached: bool, bundle: Bundle, cache: GraphCache
) -> None:
    double_weights(bundle)
    with pytest.raises(IntegrityError, match=r"visual\.onnx does not have the sha256"):
        encode(bundle, cache if cached else None)
    assert not cache.folder.exists()


def test_a_graph_that_nobody_verified_never_answers_for_the_real_one(
    bundle: Bundle, cache: GraphCache
) -> None:
    real = encode(bundle, cache)
    content = (bundle.path / "visual.onnx").read_bytes()
    double_weights(bundle)
    for _ in range(2):
        unverified = Bundle.open(bundle.path, verify=False)
        np.testing.assert_allclose(encode(unverified, cache), 2 * real, rtol=1e-6)
    assert len(entries(cache)) == 2
    (bundle.path / "visual.onnx").write_bytes(content)
    np.testing.assert_array_equal(encode(bundle, cache), real)


def test_a_copy_of_a_bundle_uses_the_entry_of_the_first(
    bundle: Bundle, cache: GraphCache, tmp_path: Path, written: list[Path]
) -> None:
    encode(bundle, cache)
    shutil.copytree(bundle.path, tmp_path / "copy")
    encode(Bundle.open(tmp_path / "copy"), cache)
    assert len(written) == 1
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("what", ["onnxruntime", "execution_provider", "cpu", "optimisation"])
def test_an_entry_is_bound_to_what_made_it(what: str, bundle: Bundle, cache: GraphCache) -> None:
    graph = GraphFiles.of(bundle, "visual")
    made_by = {"onnxruntime": "1", "execution_provider": "2", "cpu": "3", "optimisation": "4"}

    def copy(path: Path) -> None:
        shutil.copy(bundle.graph_path("visual"), path)

    used = [made_by, {**made_by, what: "another"}, made_by]
    first, other, again = (cache.find_or_make(graph, given, copy) for given in used)
    assert first == again != other
    assert other is not None


def test_another_processor_makes_its_own_entry(
    bundle: Bundle, cache: GraphCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(bundle, cache)
    monkeypatch.setattr(ort, "cpu_identity", lambda: "another")
    encode(bundle, cache)
    assert len(entries(cache)) == 2


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        (GRAPH_NAME, cut_off, r"graph\.onnx has \d+ bytes instead of \d+"),
        (GRAPH_NAME, flip_a_bit, r"graph\.onnx does not have the sha256"),
        (GRAPH_NAME, Path.unlink, r"graph\.onnx is missing"),
        (ENTRY_RECORD, cut_off, "."),
        (ENTRY_RECORD, Path.unlink, r"entry\.json cannot be read \(No such file"),
        (ENTRY_RECORD, lambda path: path.write_text("[1]"), "."),
        (ENTRY_RECORD, lambda path: path.write_text("{}"), "."),
    ],
)
def test_a_damaged_entry_is_made_anew(
    name: str,
    damage: Any,
    why: str,
    bundle: Bundle,
    cache: GraphCache,
    written: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = encode(bundle, cache)
    damage(entries(cache)[0] / name)
    np.testing.assert_array_equal(encode(bundle, cache), expected)
    assert len(written) == 2
    assert re.search(rf"is made again: .*{why}", caplog.text)
    caplog.clear()
    encode(bundle, cache)
    assert len(written) == 2
    assert len(entries(cache)) == 1
    assert caplog.text == ""


def test_weights_that_were_altered_are_noticed(
    tiny_bundle: Path, cache: GraphCache, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.open(tiny_bundle)
    size = bundle.manifest.model.input_size
    frames = np.zeros((1, size, size, 3), np.uint8)
    with OrtRuntime(bundle, cache=cache) as runtime:
        expected = runtime.encode_frames(frames)
    flip_a_bit(entries(cache)[0] / DATA_NAME)
    with OrtRuntime(bundle, cache=cache) as runtime:
        np.testing.assert_array_equal(runtime.encode_frames(frames), expected)
    assert f"{DATA_NAME} does not have the sha256" in caplog.text


def forge_record(entry: Path) -> None:
    """Write into the record of an entry that its graph is as it was meant to be."""
    path, record = entry / GRAPH_NAME, json.loads((entry / ENTRY_RECORD).read_text())
    record["files"][GRAPH_NAME] = {
        "size": path.stat().st_size,
        "sha256": sha256_of_file(path),
        "signature": file_signature(path),
    }
    (entry / ENTRY_RECORD).write_text(json.dumps(record))


def test_a_planted_graph_may_not_read_other_files(
    bundle: Bundle, cache: GraphCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = encode(bundle, cache)
    (entry,) = entries(cache)
    (tmp_path / "secret").write_bytes(WEIGHTS.tobytes())
    model = onnx.load(entry / GRAPH_NAME, load_external_data=False)
    weights = next(t for t in model.graph.initializer if t.dims == [3, 16])
    weights.ClearField("raw_data")
    weights.ClearField("float_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="../../../secret")
    (entry / GRAPH_NAME).write_bytes(model.SerializeToString())
    forge_record(entry)
    np.testing.assert_array_equal(encode(bundle, cache), expected)
    assert "it refers to ['../../../secret']" in caplog.text


def test_an_entry_that_onnxruntime_refuses_is_removed(
    bundle: Bundle, cache: GraphCache, caplog: pytest.LogCaptureFixture
) -> None:
    expected = encode(bundle, cache)
    (entry,) = entries(cache)
    model = onnx.load(entry / GRAPH_NAME, load_external_data=False)
    model.ir_version = 99
    (entry / GRAPH_NAME).write_bytes(model.SerializeToString())
    forge_record(entry)
    np.testing.assert_array_equal(encode(bundle, cache), expected)
    assert "is removed: it cannot be opened" in caplog.text
    assert entries(cache) == []


def test_a_folder_that_cannot_be_made_costs_the_cache_alone(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = GraphCache(tmp_path / "file" / "graphs")
    np.testing.assert_array_equal(encode(bundle, cache), encode(bundle, None))
    assert "is used without the cache in" in caplog.text


def test_a_cache_that_is_read_only_is_read(
    bundle: Bundle, cache: GraphCache, written: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = encode(bundle, cache)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(StoredEntry, "save", refuse)
    path = bundle.graph_path("visual")
    path.write_bytes(path.read_bytes())  # other times, so that the record would be written
    np.testing.assert_array_equal(encode(bundle, cache), expected)
    assert len(written) == 1


def test_a_disk_without_room_is_not_filled(
    bundle: Bundle,
    cache: GraphCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    usage = shutil.disk_usage(bundle.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    encode(bundle, cache)
    assert entries(cache) == []
    assert "the disk has 0 MiB left" in caplog.text


def test_a_disk_that_fills_up_while_it_is_written_to_leaves_nothing(
    bundle: Bundle,
    cache: GraphCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = encode(bundle, None)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    np.testing.assert_array_equal(encode(bundle, cache), expected)
    assert "No space left on device" in caplog.text
    assert entries(cache) == []


@pytest.mark.parametrize(
    ("name", "why"), [(GRAPH_NAME, "what was written is of no use"), (DATA_NAME, "is removed: ")]
)
def test_what_was_cut_off_while_it_was_written_is_not_kept(
    name: str,
    why: str,
    tiny_bundle: Path,
    cache: GraphCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    open_session = ort.open_session

    def cut(*given: Any, write_to: Path | None = None, **options: Any) -> Any:
        session = open_session(*given, write_to=write_to, **options)
        if write_to is not None:
            cut_off(write_to.with_name(name))
        return session

    monkeypatch.setattr(ort, "open_session", cut)
    bundle = Bundle.open(tiny_bundle)
    size = bundle.manifest.model.input_size
    frames = np.ones((2, size, size, 3), np.uint8)
    outputs = []
    for used in (None, cache):
        with OrtRuntime(bundle, cache=used) as runtime:
            outputs.append(runtime.encode_frames(frames))
    np.testing.assert_array_equal(*outputs)
    assert entries(cache) == []
    assert why in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_folder_that_others_may_write_to_is_not_trusted(
    bundle: Bundle, cache: GraphCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.folder.mkdir(parents=True)
    cache.folder.chmod(0o777)
    encode(bundle, cache)
    assert "other users may write to it; run chmod go-w on it" in caplog.text
    assert entries(cache) == []


def test_the_least_recently_used_go_first(
    tmp_path: Path, cache: GraphCache, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bundles = []
    for i in range(3):

        def scaled(name: str, model: Any, factor: int = i + 1) -> Any:
            if name == "visual":
                weights = next(t for t in model.graph.initializer if t.name == "weights")
                weights.raw_data = (factor * WEIGHTS).tobytes()
            return model

        bundles.append(write_tiny_bundle(tmp_path / str(i), change=scaled))
    encode(bundles[0], cache)
    encode(bundles[1], cache)
    first, second = sorted(entries(cache), key=lambda p: (p / ENTRY_RECORD).stat().st_mtime_ns)
    os.utime(first / ENTRY_RECORD, (2e9, 2e9))  # used again, and the second was not
    os.utime(second / ENTRY_RECORD, (1e9, 1e9))
    sizes = [sum(p.stat().st_size for p in entry.iterdir()) for entry in (first, second)]
    small = GraphCache(cache.folder, limit_bytes=sum(sizes) + 100)
    encode(bundles[2], small)
    assert first in entries(cache)
    assert second not in entries(cache)
    assert len(entries(cache)) == 2
    assert "is removed to stay below the limit" in caplog.text


def test_what_a_crash_left_is_removed_after_a_while(bundle: Bundle, cache: GraphCache) -> None:
    old, new = cache.folder / ".new-old", cache.folder / ".new-now"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 7200,) * 2)
    cache.folder.chmod(0o700)
    encode(bundle, cache)
    assert not old.exists()
    assert new.exists()


def test_two_that_start_at_once_end_with_one_entry(bundle: Bundle, cache: GraphCache) -> None:
    expected = encode(bundle, None)
    start = threading.Barrier(4)

    def race(_: int) -> np.ndarray:
        start.wait()
        return encode(bundle, cache)

    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(race, range(4)):
            np.testing.assert_array_equal(result, expected)
    assert len([path for path in entries(cache) if not path.name.startswith(".")]) == 1
    assert len(entries(cache)) == 1


def test_processes_that_start_at_once_end_with_one_entry(tiny_bundle: Path, tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np; from actionclip_deploy import Bundle, open_runtime;"
        "from actionclip_deploy.runtimes import graph_cache; graph_cache._MIN_GRAPH_BYTES = 0;"
        "r = open_runtime(Bundle.open(sys.argv[1]), cache=sys.argv[2], num_threads=1);"
        "s = r.manifest.model.input_size;"
        "print(r.encode_frames(np.ones((1, s, s, 3), np.uint8)).tobytes().hex())"
    )
    command = [sys.executable, "-c", program, str(tiny_bundle), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(outputs) == 1
    assert len(list((tmp_path / "cache" / "graphs").iterdir())) == 1


def test_small_graphs_are_not_worth_a_file(
    bundle: Bundle, cache: GraphCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_cache, "_MIN_GRAPH_BYTES", 2**20)
    encode(bundle, cache)
    assert not cache.folder.exists()


def test_the_environment_says_where_and_whether(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACTIONCLIP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        found = open_cache(True)
        assert found is not None
        assert found.folder == tmp_path / "xdg" / "actionclip-deploy" / "graphs"
    monkeypatch.setenv("ACTIONCLIP_CACHE", str(tmp_path / "here"))
    found = open_cache(True)
    assert found is not None
    assert found.folder == tmp_path / "here" / "graphs"
    for off in ("off", "OFF", "0"):
        monkeypatch.setenv("ACTIONCLIP_CACHE", off)
        assert open_cache(True) is None
    found = open_cache(tmp_path / "given")
    assert found is not None
    assert found.folder == tmp_path / "given" / "graphs"
    assert open_cache(False) is None


@pytest.mark.parametrize("text", ["much", "-1", "0", "nan", "inf"])
def test_a_limit_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTIONCLIP_CACHE_GB", text)
    with pytest.raises(ValueError, match=rf"ACTIONCLIP_CACHE_GB is '{text}'; it must be a number"):
        open_cache("somewhere")


def test_the_limit_is_in_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTIONCLIP_CACHE_GB", "0.5")
    found = open_cache("somewhere")
    assert found is not None
    assert found.limit_bytes == 2**29


def test_without_a_home_there_is_no_cache(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("ACTIONCLIP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless(path: str) -> str:
        return path

    monkeypatch.setattr(os.path, "expanduser", homeless)
    assert open_cache(True) is None
    assert "name a folder with ACTIONCLIP_CACHE" in caplog.text
