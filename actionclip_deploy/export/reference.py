"""A checkpoint that nobody exported, opened as if it were a bundle: PyTorch runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from actionclip_deploy.bundle import Bundle, hash_files
from actionclip_deploy.export.pipeline import TOKENIZER_NAME, describe_checkpoint
from actionclip_deploy.model import load_checkpoint
from actionclip_deploy.runtimes.pyt import TorchRuntime
from actionclip_deploy.tokenizer import Tokenizer, find_clip_merges


@contextmanager
def open_checkpoint(
    checkpoint: str | Path,
    *,
    family: str = "auto",
    num_frames: int | None = None,
    base: str | Path | None = None,
    visual_prompt: str | None = None,
    device: str = "cpu",
    num_threads: int | None = None,
) -> Iterator[tuple[Bundle, TorchRuntime]]:
    """Open a checkpoint in PyTorch for the time of a block.

    Preprocessing, templates and scale are those that its bundle would have.

    Args:
        checkpoint: A file, `open_clip:MODEL/TAG`, or `motions`.
        family: Whose format it has; "auto" finds it from the keys.
        num_frames: T; None takes it from the checkpoint or its name.
        base: The CLIP checkpoint that supplies what the file lacks.
        visual_prompt: How time enters, where the checkpoint does not tell.
        device: `cpu` or `cuda`.
        num_threads: Threads of one call on the CPU.

    Yields:
        A bundle that holds a tokenizer and no graphs, enough to build label banks for, and the
        runtime.

    Raises:
        ValueError: If an argument has a value that is not allowed.
        CheckpointError: If the checkpoint cannot be read.
        ExportError: If no bundle can be made of it.
        RuntimeUnavailableError: If there is no such device.
    """
    loaded = load_checkpoint(
        checkpoint, family=family, num_frames=num_frames, base=base, visual_prompt=visual_prompt
    )
    _, manifest = describe_checkpoint(loaded)
    with TemporaryDirectory() as name:
        folder = Path(name)
        Tokenizer.from_clip_merges(find_clip_merges()).save(folder / TOKENIZER_NAME)
        manifest = manifest.model_copy(update={"files": hash_files(folder)})
        runtime = TorchRuntime(manifest, loaded.model, device=device, num_threads=num_threads)
        with runtime:
            yield Bundle(folder, manifest), runtime
