"""The whole way in a minute: a random checkpoint becomes a bundle, and the bundle scores videos.

    python scripts/demo.py [VIDEO ...]

Everything is written to demo/. The commands are those that a user types; they are shown.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actionclip_deploy.model import ModelConfig, build_model, save_original_checkpoint

FOLDER = Path("demo")
CHECKPOINT = FOLDER / "demo-vit-8f.pt"
BUNDLE = FOLDER / "bundle"
LABELS = FOLDER / "labels.csv"
PICTURE = FOLDER / "predictions.png"
SOME_VIDEOS_FAILED = 3

LABEL_NAMES = (
    "abseiling",
    "archery",
    "bowling",
    "dribbling basketball",
    "playing guitar",
    "riding a bike",
    "salsa dancing",
    "snowboarding",
    "swimming backstroke",
    "walking the dog",
)

WIDTH, HEIGHT, NUM_FRAMES, FRAMES_PER_SECOND = 320, 240, 60, 20

# The sizes of a ViT-B/32, each divided by three or more; the rest is CLIP's own.
SMALL = ModelConfig(
    backbone="small ViT",
    embed_dim=128,
    input_size=224,
    vision_layers=4,
    vision_width=256,
    patch_size=32,
    context_length=77,
    vocab_size=49408,
    text_width=128,
    text_heads=2,
    text_layers=4,
).with_visual_prompt("transf", num_frames=8)

console = Console()


def main(own_videos: list[Path]) -> None:
    """Run every step, then print what happened."""
    FOLDER.mkdir(exist_ok=True)
    shutil.rmtree(BUNDLE, ignore_errors=True)  # of an earlier run
    table = Table(title="What happened", title_justify="left", show_lines=False)
    for heading in ("step", "result", "seconds"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")

    def step(name: str, action: Callable[[], str]) -> None:
        console.rule(f"[bold]{name}", align="left")
        start = time.perf_counter()
        result = action()
        table.add_row(name, escape(result), f"{time.perf_counter() - start:.1f}")

    videos = [FOLDER / f"{name}.mp4" for name in DRAWINGS] + own_videos
    step("make a checkpoint", make_checkpoint)
    step("render videos", render_videos)
    step("export", export)
    step("verify", verify)
    step("build a label bank", build_labels)
    step("predict", lambda: predict(videos))
    console.print(table)
    console.print(
        "The weights are random, so the scores mean nothing: shown is that the whole way works "
        "and agrees with PyTorch. With a real checkpoint the same four commands give real scores."
    )


def make_checkpoint() -> str:
    """Save random weights in the form of the files that the authors published."""
    save_original_checkpoint(build_model(SMALL, seed=0), CHECKPOINT)
    LABELS.write_text("id,name\n" + "".join(f"{i},{n}\n" for i, n in enumerate(LABEL_NAMES)))
    return f"{CHECKPOINT}, {CHECKPOINT.stat().st_size / 1e6:.0f} MB, random weights"


def export() -> str:
    """Turn the checkpoint into a bundle."""
    run("export", CHECKPOINT, "--output", BUNDLE)
    size = sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file())
    return f"{BUNDLE}, {size / 1e6:.0f} MB, agrees with PyTorch"


def verify() -> str:
    """Compare ONNX Runtime with the golden outputs in the bundle."""
    run("verify", BUNDLE)
    return "ONNX Runtime on this machine agrees with PyTorch"


def build_labels() -> str:
    """Embed the labels in all templates."""
    run("labels", "build", BUNDLE, "--labels", LABELS, "--name", "demo")
    return f"{len(LABEL_NAMES)} labels"


def predict(videos: list[Path]) -> str:
    """Score the videos, and draw what was seen."""
    options = ("--labels", "demo", "--top-k", "3", "--plot", PICTURE)
    code = run("predict", BUNDLE, *videos, *options, allowed=(0, SOME_VIDEOS_FAILED))
    what = f"{len(videos)} videos" if code == 0 else "some videos failed, see above"
    return f"{what}; picture in {PICTURE}"


def run(*arguments: str | Path, allowed: tuple[int, ...] = (0,)) -> int:
    """Run `actionclip` as a user would, and stop the demo if it fails."""
    words = [str(argument) for argument in arguments]
    command = f"$ actionclip {shlex.join(words)}"
    console.print(command, style="bold", markup=False, highlight=False, soft_wrap=True)
    program = Path(sys.executable).with_name("actionclip")
    code = subprocess.run([program, *words], check=False).returncode
    if code not in allowed:
        sys.exit(f"actionclip {words[0]} exited with {code}; the demo stops here.")
    return code


def square_moves_right(time_left: float) -> NDArray[np.bool_]:
    """Pixels of a square that has the fraction `time_left` of its way before it."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    left = (1 - time_left) * (WIDTH - 60)
    return (abs(y - HEIGHT / 2) < 30) & (x >= left) & (x < left + 60)


def disc_falls(time_left: float) -> NDArray[np.bool_]:
    """Pixels of a disc that falls faster and faster."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    bottom = 30 + (1 - time_left) ** 2 * (HEIGHT - 60)
    return (x - WIDTH / 2) ** 2 + (y - bottom) ** 2 < 30**2


def ring_grows(time_left: float) -> NDArray[np.bool_]:
    """Pixels of a ring that grows to the height of the frame."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    radius = 15 + (1 - time_left) * (HEIGHT / 2 - 25)
    return abs(np.hypot(x - WIDTH / 2, y - HEIGHT / 2) - radius) < 8


DRAWINGS = {
    "square-moves-right": square_moves_right,
    "disc-falls": disc_falls,
    "ring-grows": ring_grows,
}


def render_videos() -> str:
    """Draw each shape over a slope of grey and write it as H.264."""
    slope = np.linspace(40, 120, WIDTH).astype(np.uint8)
    ground = np.broadcast_to(slope[np.newaxis, :, np.newaxis], (HEIGHT, WIDTH, 3))
    for name, draw in DRAWINGS.items():
        with av.open(str(FOLDER / f"{name}.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=FRAMES_PER_SECOND)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for number in range(NUM_FRAMES):
                picture = ground.copy()
                picture[draw(1 - number / NUM_FRAMES)] = (230, 120, 40)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
    return f"{len(DRAWINGS)} videos of {NUM_FRAMES / FRAMES_PER_SECOND:.0f} s"


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
