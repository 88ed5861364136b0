"""Full-size models with random weights, for programs that measure time and not accuracy."""

from __future__ import annotations

from pathlib import Path

from actionclip_deploy.export import export_checkpoint
from actionclip_deploy.model import ModelConfig, build_model, save_original_checkpoint

NUM_FRAMES = 8


def write_checkpoint(backbone: str, path: Path) -> None:
    """Write a checkpoint of one of open_clip's ViTs with the temporal transformer of the paper."""
    config = ModelConfig.from_open_clip(backbone, visual_prompt="transf", num_frames=NUM_FRAMES)
    save_original_checkpoint(build_model(config, seed=0), path)


def make_bundle(backbone: str, precision: str, folder: Path) -> Path:
    """Write a checkpoint into a folder and export it; gives the bundle's folder."""
    checkpoint = folder / f"random-{NUM_FRAMES}f.pt"
    write_checkpoint(backbone, checkpoint)
    return export_checkpoint(checkpoint, folder / "bundle", precision=precision).bundle.path
