"""From frames to embeddings in shared calls, against encoding each row alone; and readers ahead."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Iterator
from threading import Event

import numpy as np
import pytest
from fakes import FakeRuntime, fake_manifest

from actionclip_deploy.errors import ShapeError
from actionclip_deploy.manifest import QuantizationSpec
from actionclip_deploy.runtimes.call_sizes import CallSizes
from actionclip_deploy.views import (
    FeatureCache,
    Job,
    ViewFrames,
    content_keys,
    default_num_workers,
    encode_in_full_calls,
    encode_views,
    work_ahead,
)

COUNTS = [3, 0, 1, 12, 5, 0, 4]


def rows_of(owner: int, count: int) -> np.ndarray:
    return np.arange(count * 2, dtype=np.uint8).reshape(count, 2) + np.uint8(10 * owner)


def jobs(counts: list[int]) -> Iterator[Job[int]]:
    for owner, count in enumerate(counts):
        yield Job.of_rows(owner, rows_of(owner, count))


class Encoder:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        self.sizes.append(len(rows))
        return rows.astype(np.float32) * 3


@pytest.mark.parametrize("rows_per_call", [1, 2, 4, 5, 100])
@pytest.mark.parametrize("shares_calls", [True, False])
def test_each_job_gets_the_outputs_of_its_own_rows(rows_per_call: int, shares_calls: bool) -> None:
    encoder = Encoder()
    done = list(
        encode_in_full_calls(
            jobs(COUNTS), encoder, rows_per_call=rows_per_call, shares_calls=shares_calls
        )
    )
    assert [job.owner for job in done] == list(range(len(COUNTS)))
    for job, count in zip(done, COUNTS, strict=True):
        if count:
            np.testing.assert_array_equal(job.output(), rows_of(job.owner, count) * np.float32(3))
    assert max(encoder.sizes) <= rows_per_call
    assert sum(encoder.sizes) == sum(COUNTS)


def test_calls_are_full_but_for_the_last() -> None:
    encoder = Encoder()
    list(encode_in_full_calls(jobs(COUNTS), encoder, rows_per_call=4))
    assert encoder.sizes == [4] * 6 + [1]


def test_calls_that_are_not_shared_end_with_their_job() -> None:
    encoder = Encoder()
    list(encode_in_full_calls(jobs([3, 9, 4]), encoder, rows_per_call=4, shares_calls=False))
    assert encoder.sizes == [3, 4, 4, 1, 4]


def test_no_more_jobs_are_drawn_than_fill_a_call() -> None:
    drawn = []

    def watched() -> Iterator[Job[int]]:
        for job in jobs([2] * 10):
            drawn.append(job.owner)
            yield job

    done = encode_in_full_calls(watched(), Encoder(), rows_per_call=4)
    assert next(done).owner == 0
    assert drawn == [0, 1]


def test_the_time_of_a_call_is_shared_out_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 8.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    first, second = encode_in_full_calls(jobs([1, 3]), Encoder(), rows_per_call=4)
    assert (first.seconds, second.seconds) == (2.0, 6.0)


SIZES = CallSizes(visual=8, temporal=2, video=2, textual=4)  # T = 4


def visual_rows(runtime: FakeRuntime) -> list[int]:
    return [shape[0] for graph, shape in runtime.calls if graph == "visual"]


@pytest.mark.parametrize("visual_prompt", ["transf", "shift"])
def test_shared_calls_give_each_its_own_rows(visual_prompt: str) -> None:
    runtime = FakeRuntime(fake_manifest(visual_prompt=visual_prompt))
    rng = np.random.default_rng(0)
    works = [
        ViewFrames(
            rng.integers(0, 256, (frames, 32, 32, 3), np.uint8),
            rng.integers(0, frames, (views, 4)),
        )
        for frames, views in ((4, 1), (9, 3), (5, 2))
    ]
    encoded = list(encode_views(runtime, works, sizes=SIZES))
    # No call is larger than it may be, which bounds memory.
    assert max(visual_rows(runtime), default=0) <= 8
    for graph in ("temporal", "video"):
        assert max((s[0] for name, s in runtime.calls if name == graph), default=0) <= 2
    assert [each.work for each in encoded] == works
    for work, each in zip(works, encoded, strict=True):
        wanted = runtime.encode_video(work.pixels[work.views])
        np.testing.assert_allclose(each.embeddings, wanted, atol=1e-6)
    stages = {"visual", "temporal"} if visual_prompt == "transf" else {"video"}
    assert all(set(each.seconds) == stages for each in encoded)


def test_the_features_of_frames_come_with_the_embeddings() -> None:
    runtime = FakeRuntime(fake_manifest())
    frames = np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3), np.uint8)
    (encoded,) = encode_views(runtime, [ViewFrames(frames, np.array([[0, 3, 5, 8]]))], sizes=SIZES)
    assert encoded.features is not None
    np.testing.assert_array_equal(encoded.features, runtime.encode_frames(frames))


def test_a_graph_whose_rows_depend_on_each_other_shares_no_call() -> None:
    quantization = QuantizationSpec.model_construct(recipe="dynamic")
    runtime = FakeRuntime(fake_manifest().model_copy(update={"quantization": quantization}))
    works = [ViewFrames.of_clips(np.full((1, 4, 32, 32, 3), n, np.uint8)) for n in (1, 2, 3)]
    list(encode_views(runtime, works, sizes=SIZES))
    assert [shape[0] for _, shape in runtime.calls] == [4, 1] * 3


def stream(num_frames: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (num_frames, 32, 32, 3), np.uint8)


def windows(frames: np.ndarray, length: int, stride: int) -> Iterator[ViewFrames]:
    """Windows of a stream as they come, each of the T frames that are spread over it."""
    for start in range(0, len(frames) - length + 1, stride):
        numbers = start + np.linspace(0, length - 1, 4).astype(int)
        yield ViewFrames(
            frames[numbers], np.arange(4)[np.newaxis], keys=[(7, n) for n in numbers.tolist()]
        )


@pytest.mark.parametrize(("length", "stride"), [(4, 1), (7, 2), (4, 4), (10, 3)])
@pytest.mark.parametrize("max_frames", [1, 3, 100])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_frame_that_comes_again_gives_the_same_bits(
    length: int, stride: int, max_frames: int, rows: int
) -> None:
    frames = stream(30)
    runtime, plain = FakeRuntime(fake_manifest()), FakeRuntime(fake_manifest())
    cache, sizes = FeatureCache(max_frames), CallSizes(rows, 2, 2, 4)
    cached = encode_views(runtime, windows(frames, length, stride), sizes=sizes, cache=cache)
    anew = encode_views(plain, windows(frames, length, stride), sizes=sizes)
    for one, other in zip(cached, anew, strict=True):
        np.testing.assert_array_equal(one.embeddings, other.embeddings)
        np.testing.assert_array_equal(one.features, other.features)
    assert len(cache) <= max_frames
    assert sum(visual_rows(runtime)) <= sum(visual_rows(plain))
    if max_frames == 100:
        numbers = {key for work in windows(frames, length, stride) for key in work.keys or ()}
        assert sum(visual_rows(runtime)) == len(numbers)


def test_windows_that_come_one_by_one_encode_only_their_new_frames() -> None:
    runtime, cache = FakeRuntime(fake_manifest()), FeatureCache(4)
    for window in windows(stream(8), length=4, stride=1):
        list(encode_views(runtime, [window], sizes=SIZES, cache=cache))
    assert visual_rows(runtime) == [4, 1, 1, 1, 1]


def test_streams_of_several_sources_share_calls_and_no_features() -> None:
    runtime, cache = FakeRuntime(fake_manifest()), FeatureCache(100)
    works = [
        ViewFrames(stream(4) + np.uint8(source), np.arange(4)[np.newaxis], keys=[
            (source, number) for number in range(4)
        ])
        for source in (0, 1, 0)
    ]  # fmt: skip
    first, second, third = encode_views(runtime, works, sizes=SIZES, cache=cache)
    assert visual_rows(runtime) == [8]
    np.testing.assert_array_equal(first.embeddings, third.embeddings)
    assert not np.array_equal(first.embeddings, second.embeddings)


def test_a_model_that_mixes_frames_encodes_each_window_anew() -> None:
    runtime, cache = FakeRuntime(fake_manifest(visual_prompt="shift")), FeatureCache(4)
    works = list(windows(stream(6), length=4, stride=1))
    encoded = list(encode_views(runtime, works, sizes=SIZES, cache=cache))
    assert [shape[:2] for _, shape in runtime.calls] == [(2, 4), (1, 4)]
    assert len(cache) == 0
    assert all(each.features is None for each in encoded)


@pytest.mark.parametrize(
    ("pixels", "views", "keys", "message"),
    [
        ((4, 32, 32), [[0]], None, r"shape \(4, 32, 32\) and their views \(1, 1\); expected"),
        ((4, 32, 32, 3), [0], None, r"views \(1,\); expected \(F, S, S, 3\) and \(V, T\)"),
        ((4, 32, 32, 3), [[0, 4]], None, "made of frames 0 to 4, and there are 4"),
        ((4, 32, 32, 3), [[-1, 2]], None, "made of frames -1 to 2"),
        ((4, 32, 32, 3), [[0, 1]], [1, 2, 3], "There are 3 keys for 4 frames"),
    ],
)
def test_frames_and_views_that_do_not_fit_are_refused(
    pixels: tuple[int, ...], views: list[object], keys: list[int] | None, message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        ViewFrames(np.zeros(pixels, np.uint8), np.array(views), keys=keys)


def test_a_cache_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="max_frames is 0; it must be 1 or more"):
        FeatureCache(0)


def test_frames_are_known_by_all_of_their_pixels() -> None:
    frames = stream(3)
    changed = frames.copy()
    changed[1, 31, 31, 2] ^= 1
    first, other, third = content_keys(frames)
    assert content_keys(frames[::-1].copy()[:, :, ::1]) == [third, other, first]
    assert content_keys(np.asfortranarray(frames)) == [first, other, third]
    again = content_keys(changed)
    assert (again[0], again[2]) == (first, third)
    assert again[1] != other
    assert len({first, other, third, again[1]}) == 4


def test_the_features_of_a_run_over_files_are_bounded_in_memory() -> None:
    manifest = fake_manifest()
    cache = FeatureCache.of_files(manifest)
    per_feature = 4 * manifest.model.embedding_dim
    assert cache.max_frames * per_feature < 32 * 2**20
    tracemalloc.start()
    for number in range(2000):
        feature = np.zeros(manifest.model.embedding_dim, np.float32)
        cache.put(
            content_keys(np.full((1, 1, 1, 3), number % 256, np.uint8))[0] + b"%d" % number, feature
        )
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(cache) == 2000
    assert size / 2000 * cache.max_frames < 32 * 2**20


def names() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("actionclip-read")]


def test_results_come_in_the_order_of_the_items_however_long_each_takes() -> None:
    def work(item: int, stop: Event) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    results = work_ahead(range(40), work, num_workers=4, max_ahead=6)
    assert list(results) == [item * item for item in range(40)]
    assert names() == []


def test_work_is_done_while_nobody_asks_for_it() -> None:
    done = threading.Semaphore(0)

    def work(item: int, stop: Event) -> int:
        done.release()
        return item

    results = work_ahead(range(10), work, num_workers=2, max_ahead=5)
    assert next(results) == 0
    # Without another result being taken, all that the bound allows is done; and no more.
    assert all(done.acquire(timeout=120) for _ in range(5))
    assert not done.acquire(timeout=0.05)
    results.close()


def test_two_threads_work_at_a_time() -> None:
    both = threading.Barrier(2, timeout=120)  # breaks if the second never comes

    def work(item: int, stop: Event) -> int:
        both.wait()
        return item

    assert list(work_ahead(range(4), work, num_workers=2, max_ahead=4)) == [0, 1, 2, 3]


def test_an_error_comes_in_the_place_of_its_result_and_ends_the_work() -> None:
    def work(item: int, stop: Event) -> int:
        if item == 2:
            raise OSError("disk")
        return item

    results = work_ahead(range(100), work, num_workers=2, max_ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="disk"):
        next(results)
    assert names() == []


def test_an_error_of_the_items_ends_the_work() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("folder is gone")

    with pytest.raises(OSError, match="folder is gone"):
        list(work_ahead(items(), lambda item, _: item, num_workers=1, max_ahead=3))
    assert names() == []


def test_closing_tells_work_under_way_to_stop_and_drops_the_rest() -> None:
    begun: list[int] = []

    def work(item: int, stop: Event) -> int:
        begun.append(item)
        if item:
            assert stop.wait(timeout=120)
        return item

    results = work_ahead(range(100), work, num_workers=2, max_ahead=50)
    assert next(results) == 0
    while len(begun) < 3:
        time.sleep(0.001)
    results.close()
    assert names() == []
    assert len(begun) == 3


def test_there_is_at_least_one_worker_by_default() -> None:
    assert 1 <= default_num_workers() <= 8
