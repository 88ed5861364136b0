from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest
import torch

from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.model import load_checkpoint, zoo


def test_without_a_network_a_tag_fails_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(_: dict) -> str:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(zoo.open_clip, "download_pretrained", unreachable)
    match = r"open_clip:ViT-B-32/laion2b_s34b_b79k could not be fetched .*no route.*connect to the"
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint("open_clip:ViT-B-32/laion2b_s34b_b79k", num_frames=8)


def test_an_unknown_tag_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match="no weights 'nothing' of model 'ViT-B-32': its tags"):
        load_checkpoint("open_clip:ViT-B-32/nothing")


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="it has no such model; write open_clip:MODEL/TAG"):
        load_checkpoint("open_clip:ViT-Z-99/openai")


def test_a_model_of_another_architecture_is_refused_before_it_is_fetched() -> None:
    with pytest.raises(
        CheckpointError, match=r"ViT-B-16-SigLIP/webli: .* sets .*only CLIP's plain"
    ):
        load_checkpoint("open_clip:ViT-B-16-SigLIP/webli")


@pytest.mark.parametrize(
    ("tag", "family", "quick_gelu", "scale"),
    [
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "open_clip", False, 1 / 0.07),
        ("open_clip:ViT-B-32/openai", "openai", True, 100.0),
        ("open_clip:ViT-B-32-quickgelu/metaclip_400m", "open_clip-quickgelu", True, 1 / 0.07),
    ],
)
def test_a_fetched_file_is_read_with_its_activation(
    small_model, save, clips, monkeypatch, tag: str, family: str, quick_gelu: bool, scale: float
) -> None:
    model = small_model("meanp", quick_gelu=quick_gelu)
    path: Path = save(dict(model.towers.state_dict()))
    monkeypatch.setattr(zoo.open_clip, "download_pretrained", lambda _: str(path))
    loaded = load_checkpoint(tag, num_frames=4)
    assert (loaded.family, loaded.path) == (family, path)
    assert loaded.model.config.quick_gelu is quick_gelu
    assert loaded.model.config.scale == pytest.approx(scale)
    assert loaded.pixel_mean == (0.48145466, 0.4578275, 0.40821073)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.encode_video(clips), model.encode_video(clips))


def test_a_tag_is_not_taken_for_another_family() -> None:
    with pytest.raises(ValueError, match=r"family is 'original'; the weights of .* 'openai'"):
        load_checkpoint("open_clip:ViT-B-32/openai", family="original")
