"""Decoding processes: real ones, since it is their death that matters."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import fake_manifest
from rendering import render
from serving import npy_bytes

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.preprocess import preprocess_frames
from actionclip_deploy.sampling import Views
from actionclip_deploy.serve.decode_pool import DecodeJob, DecodePool, DecodeProcess
from actionclip_deploy.serve.settings import Limits
from actionclip_deploy.video import VideoReader
from actionclip_deploy.views import Stopwatch, ViewReader

TIMEOUT_SECONDS = 120.0
ONE = Views(1, 1)


def run_pool(
    use: Callable[[DecodePool], Awaitable[Any]], *, num_workers: int = 1, **limits: Any
) -> Any:
    async def run() -> Any:
        pool = DecodePool(fake_manifest(), Limits(**limits), num_workers=num_workers)
        await pool.start()
        try:
            return await asyncio.wait_for(use(pool), TIMEOUT_SECONDS)
        finally:
            await pool.stop()

    return asyncio.run(run())


def refusal(pool: DecodePool, job: DecodeJob, **options: Any) -> Awaitable[RequestRefusedError]:
    async def ask() -> RequestRefusedError:
        with pytest.raises(RequestRefusedError) as caught:
            await pool.decode(job, **options)
        return caught.value

    return ask()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A file that can be opened as an array and never gives a byte; no video is read from it."""
    path = tmp_path / "endless.mp4"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("views", [ONE, Views(3, 1), Views(2, 3)], ids=str)
def test_a_process_gives_what_the_pipeline_gives_here(rendered_video: Path, views: Views) -> None:
    async def use(pool: DecodePool) -> Any:
        return await pool.decode(DecodeJob(rendered_video, "square.mp4", views))

    decoded = run_pool(use)
    reader = ViewReader(fake_manifest(), views, "frame")
    with VideoReader(rendered_video) as video:
        expected = reader.read(video, rendered_video, Stopwatch())
    np.testing.assert_array_equal(decoded.pixels, expected.pixels)
    np.testing.assert_array_equal(decoded.views, expected.views)
    np.testing.assert_array_equal(decoded.indices, expected.indices)
    np.testing.assert_array_equal(decoded.pts_seconds, expected.pts_seconds)
    assert set(decoded.timings_ms) == {"open", "read", "preprocess", "total"}


def test_frames_that_came_as_an_array_are_sampled_and_preprocessed_too(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (20, 40, 60, 3), np.uint8)
    path = tmp_path / "frames.npy"
    path.write_bytes(npy_bytes(frames))

    async def use(pool: DecodePool) -> Any:
        return await pool.decode(DecodeJob(path, "frames.npy", ONE, "frames"))

    decoded = run_pool(use)
    # By hand: 20 frames, T = 4 -> segments of 5, centre at (5 - 1) / 2.
    assert decoded.indices.tolist() == [[2, 7, 12, 17]]
    expected = preprocess_frames(frames[[2, 7, 12, 17]], input_size=32, resize_size=36)[0]
    np.testing.assert_array_equal(decoded.pixels, expected)
    assert decoded.pts_seconds is None


def test_a_file_that_is_no_video_is_refused_under_the_name_its_sender_gave(tmp_path: Path) -> None:
    path = tmp_path / "0-0"
    path.write_bytes(b"no video at all")
    error = run_pool(lambda pool: refusal(pool, DecodeJob(path, "holiday.mp4", ONE)))
    assert (error.status, error.code) == (422, "video_unreadable")
    assert "holiday.mp4 is not a video in a format that FFmpeg knows" in str(error)
    assert str(tmp_path) not in str(error)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"pixels": 96 * 72 - 1}, "has frames of 96 x 72 and they may have 6,911 pixels"),
        ({"frames": 39}, "has 40 frames and may have 39"),
        ({"duration_seconds": 3.9}, "lasts 4.0 seconds and may last 3.9"),
    ],
)
def test_a_video_beyond_a_limit_is_refused(
    rendered_video: Path, limits: dict[str, Any], text: str
) -> None:
    job = DecodeJob(rendered_video, "square.mp4", ONE)
    error = run_pool(lambda pool: refusal(pool, job), **limits)
    assert (error.status, error.code) == (413, "video_too_large")
    assert f"square.mp4 {text}" in str(error)


def test_a_decoding_that_takes_too_long_is_killed_and_the_next_goes_on(
    endless: Path, rendered_video: Path
) -> None:
    async def use(pool: DecodePool) -> Any:
        before = pool.process_ids
        error = await refusal(pool, DecodeJob(endless, "endless.mp4", ONE, "frames"))
        decoded = await pool.decode(DecodeJob(rendered_video, "square.mp4", ONE))
        return error, decoded, before, pool.process_ids, pool.num_replaced

    error, decoded, before, after, num_replaced = run_pool(use, decode_seconds=0.5)
    assert (error.status, error.code) == (413, "video_too_large")
    assert "Decoding endless.mp4 took more than 0.5 seconds" in str(error)
    assert decoded.pixels.shape == (4, 32, 32, 3)
    assert before != after
    assert num_replaced == 1
    with pytest.raises(ProcessLookupError):
        os.kill(before[0], 0)


def test_memory_beyond_the_limit_is_refused_and_the_process_goes_on(
    tmp_path: Path, rendered_video: Path
) -> None:
    # 8 frames of 2048 x 2048 x 3 bytes, and 4 of them are taken at a time.
    path = tmp_path / "large.npy"
    path.write_bytes(npy_bytes(np.zeros((8, 2048, 2048, 3), np.uint8)))

    async def use(pool: DecodePool) -> Any:
        before = pool.process_ids
        error = await refusal(pool, DecodeJob(path, "large.npy", ONE, "frames"))
        decoded = await pool.decode(DecodeJob(rendered_video, "square.mp4", ONE))
        return error, decoded, before == pool.process_ids

    error, decoded, is_same = run_pool(use, decode_memory_bytes=120 * 1024 * 1024)
    assert error.status == 413
    assert "takes more than 125,829,120 bytes of memory" in str(error)
    assert decoded.pixels.shape == (4, 32, 32, 3)
    assert is_same


def test_a_killed_process_is_replaced_and_its_video_given_to_another(endless: Path) -> None:
    async def use(pool: DecodePool) -> Any:
        (victim,) = pool.process_ids
        job = asyncio.ensure_future(pool.decode(DecodeJob(endless, "endless.mp4", ONE, "frames")))
        await asyncio.sleep(0.2)
        os.kill(victim, signal.SIGKILL)
        # The second process finds frames in the place of the file that hung the first.
        endless.unlink()
        endless.write_bytes(npy_bytes(np.zeros((20, 40, 60, 3), np.uint8)))
        return await job, pool.num_replaced

    decoded, num_replaced = run_pool(use)
    assert decoded.pixels.shape == (4, 32, 32, 3)
    assert num_replaced == 1


def test_a_video_that_ends_every_process_is_given_up(endless: Path, rendered_video: Path) -> None:
    async def use(pool: DecodePool) -> Any:
        job = asyncio.ensure_future(pool.decode(DecodeJob(endless, "evil.mp4", ONE, "frames")))
        for _ in range(2):
            await until(lambda: len(pool.process_ids) == 1)
            victim = pool.process_ids
            await asyncio.sleep(0.2)
            os.kill(victim[0], signal.SIGSEGV)
            await until(lambda victim=victim: pool.process_ids != victim)
        with pytest.raises(RequestRefusedError) as caught:
            await job
        return caught.value, await pool.decode(DecodeJob(rendered_video, "square.mp4", ONE))

    error, decoded = run_pool(use)
    assert (error.status, error.code) == (422, "video_unreadable")
    assert "evil.mp4 made the decoder crash 2 times" in str(error)
    assert decoded.pixels.shape == (4, 32, 32, 3)


def test_an_idle_process_that_is_killed_is_replaced(rendered_video: Path) -> None:
    async def use(pool: DecodePool) -> Any:
        before = pool.process_ids
        os.kill(before[0], signal.SIGKILL)
        await until(lambda: len(pool.process_ids) == 2 and before[0] not in pool.process_ids)
        job = DecodeJob(rendered_video, "square.mp4", ONE)
        return await asyncio.gather(*(pool.decode(job) for _ in range(6)))

    decoded = run_pool(use, num_workers=2)
    assert len({each.pixels.tobytes() for each in decoded}) == 1


def test_more_than_may_wait_are_refused(endless: Path) -> None:
    async def use(pool: DecodePool) -> Any:
        job = DecodeJob(endless, "endless.mp4", ONE, "frames")
        tasks = [asyncio.ensure_future(pool.decode(job))]
        await asyncio.sleep(0.1)
        tasks += [asyncio.ensure_future(pool.decode(job)) for _ in range(2)]
        await asyncio.sleep(0.1)
        error = await refusal(pool, job)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return error

    error = run_pool(use, waiting_decodes=2)
    assert (error.status, error.code) == (429, "queue_full")
    assert "2 videos wait to be decoded" in str(error)
    assert error.retry_after_seconds > 0


def test_a_deadline_that_passes_is_refused(endless: Path) -> None:
    async def use(pool: DecodePool) -> Any:
        deadline = asyncio.get_running_loop().time() + 0.1
        return await refusal(
            pool, DecodeJob(endless, "endless.mp4", ONE, "frames"), deadline=deadline
        )

    assert run_pool(use).status == 504


def test_stopping_refuses_what_waits_and_leaves_no_process(endless: Path) -> None:
    async def run() -> Any:
        pool = DecodePool(fake_manifest(), Limits(), num_workers=1)
        await pool.start()
        processes = pool.process_ids
        job = DecodeJob(endless, "endless.mp4", ONE, "frames")
        tasks = [asyncio.ensure_future(pool.decode(job)) for _ in range(2)]
        await asyncio.sleep(0.1)
        await pool.stop()
        return processes, await asyncio.gather(*tasks, return_exceptions=True)

    processes, outcomes = asyncio.run(run())
    assert [outcome.status for outcome in outcomes] == [503, 503]
    with pytest.raises(ProcessLookupError):
        os.kill(processes[0], 0)


def test_processes_that_decode_large_videos_stay_as_they_are(tmp_path: Path) -> None:
    # Before, each video left its frames behind: 12 MB each, and 63 filled a process.
    path = render(tmp_path / "uhd.mp4", num_frames=4, size=(3840, 2160), b_frames=0)

    async def use(pool: DecodePool) -> Any:
        before = pool.process_ids
        job = DecodeJob(path, "uhd.mp4", ONE)
        await pool.decode(job)
        grown = [resident_bytes(before[0])]
        for _ in range(12):
            await pool.decode(job)
            grown.append(resident_bytes(before[0]))
        return grown, pool.process_ids == before

    grown, is_same = run_pool(use)
    assert max(grown) - grown[0] < 24 * 2**20
    assert is_same


def test_a_process_that_kept_its_memory_is_replaced_after_its_answer(
    rendered_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DecodeProcess.ask

    async def ask(process: DecodeProcess, question: dict[str, Any]) -> dict[str, Any]:
        return {**await real(process, question), "is_worn": True}

    # Nothing is known to fill a process any more.
    monkeypatch.setattr(DecodeProcess, "ask", ask)

    async def use(pool: DecodePool) -> Any:
        job = DecodeJob(rendered_video, "square.mp4", ONE)
        shapes = [(await pool.decode(job)).pixels.shape for _ in range(3)]
        await until(lambda: pool.num_replaced == 3 and len(pool.process_ids) == 1)
        return shapes, pool.num_replaced

    shapes, num_replaced = run_pool(use)
    assert shapes == [(4, 32, 32, 3)] * 3
    assert num_replaced == 3


def test_a_process_near_its_bound_is_replaced_and_gives_the_same(tmp_path: Path) -> None:
    # What glibc keeps for the next frames after this video is 70 MB in a fresh process, more than
    # a quarter of the bound; after the small one 2 MB.
    large = render(
        tmp_path / "uhd.mp4",
        pictures=[np.full((2160, 3840, 3), level, np.uint8) for level in (90, 180)],
        options={"preset": "ultrafast"},
    )
    small = render(tmp_path / "small.mp4")

    async def use(pool: DecodePool) -> Any:
        seen = []
        for video in (large, large, small):
            (before,) = pool.process_ids
            decoded = await pool.decode(DecodeJob(video, video.name, ONE))
            if video is large:
                await until(lambda before=before: before not in pool.process_ids)
                await until(lambda: len(pool.process_ids) == 1)
            seen.append((decoded.pixels.tobytes(), pool.process_ids == (before,)))
        return seen, pool.num_replaced

    seen, num_replaced = run_pool(use, decode_memory_bytes=200 * 2**20)
    assert [is_same for _, is_same in seen] == [False, False, True]
    assert seen[0][0] == seen[1][0]
    assert num_replaced == 2


def test_no_file_is_blamed_for_memory_that_others_took(
    rendered_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process but a fresh one has no memory left: its answer is taken over by the test."""
    real, seen = DecodeProcess.ask, []

    async def ask(process: DecodeProcess, question: dict[str, Any]) -> dict[str, Any]:
        answer = await real(process, question)
        if "path" in question:
            seen.append(process.num_jobs)
            if process.num_jobs > 1:
                answer = {"status": 413, "code": "video_too_large", "error": "no memory"}
                answer |= {"is_out_of_memory": True, "is_worn": False}
        return answer

    # Memory that runs out in the middle of a job cannot be had at will.
    monkeypatch.setattr(DecodeProcess, "ask", ask)

    async def use(pool: DecodePool) -> Any:
        job = DecodeJob(rendered_video, "square.mp4", ONE)
        return [(await pool.decode(job)).pixels.shape for _ in range(3)]

    assert run_pool(use) == [(4, 32, 32, 3)] * 3
    assert seen == [1, 2, 1, 2, 1]


def test_processes_that_are_killed_from_outside_are_not_the_files_fault(
    endless: Path, rendered_video: Path
) -> None:
    async def use(pool: DecodePool) -> Any:
        job = DecodeJob(endless, "large.mp4", ONE, "frames")
        task = asyncio.ensure_future(pool.decode(job))
        for _ in range(2):
            await until(lambda: len(pool.process_ids) == 1)
            victim = pool.process_ids
            await asyncio.sleep(0.2)
            os.kill(victim[0], signal.SIGKILL)
            await until(lambda victim=victim: pool.process_ids != victim)
        with pytest.raises(RequestRefusedError) as caught:
            await task
        await pool.decode(DecodeJob(rendered_video, "square.mp4", ONE))
        return caught.value

    error = run_pool(use)
    assert (error.status, error.code) == (503, "out_of_memory")
    assert "had not enough memory to decode large.mp4" in str(error)


@pytest.mark.parametrize("kind", ["video", "frames"])
def test_an_upload_that_is_gone_ends_no_process(
    tmp_path: Path, rendered_video: Path, kind: Any
) -> None:
    async def use(pool: DecodePool) -> Any:
        before = pool.process_ids
        error = await refusal(pool, DecodeJob(tmp_path / "gone", "left.mp4", ONE, kind))
        await pool.decode(DecodeJob(rendered_video, "square.mp4", ONE))
        return error, before == pool.process_ids

    error, is_same = run_pool(use)
    assert (error.status, error.code) == (422, "video_unreadable")
    assert "left.mp4" in str(error)
    assert is_same


def resident_bytes(process: int) -> int:
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
