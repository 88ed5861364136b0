"""Checkpoints that are known by name."""

from __future__ import annotations

import json
import urllib.error
from pathlib import Path

import pytest
import torch

from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.model import load_checkpoint, zoo
from actionclip_deploy.model.zoo import is_packaged, packaged_path, read_provenance, write_packaged
from actionclip_deploy.tokenizer import NUM_TOKENS

MAX_BYTES = 8_000_000


def test_the_weights_that_ship_are_small_and_load_by_their_name() -> None:
    assert packaged_path("motions").stat().st_size <= MAX_BYTES
    loaded = load_checkpoint("motions")
    assert (loaded.family, loaded.num_frames, loaded.num_frames_from) == (
        "original",
        8,
        "provenance",
    )
    assert loaded.model.config.visual_prompt == "transf"
    assert any("other words say nothing to it" in note for note in loaded.notes)


def test_the_provenance_says_where_the_weights_come_from() -> None:
    provenance = read_provenance("motions")
    assert {"stages", "commit", "seed", "seconds", "metrics", "versions"} <= provenance.keys()
    assert provenance["metrics"]["test"]["top1"] > 0.95
    assert provenance["metrics"]["heldout"]["top1"] > 0.80


def test_a_model_is_written_with_the_rows_that_were_trained(
    small_model, clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("transf", vocab_size=NUM_TOKENS, context_length=77)
    known = [5, 9, 400, 49406, 49407]
    path = tmp_path / "motions.safetensors"
    write_packaged(model, known, {"licence": "MIT"}, path)
    monkeypatch.setattr(zoo, "packaged_path", lambda _: path)

    loaded = load_checkpoint("motions")
    again = loaded.model

    assert loaded.licence == "MIT"
    assert again.config.num_frames == model.config.num_frames
    state, wanted = again.state_dict(), model.state_dict()
    table = "towers.token_embedding.weight"
    assert all(torch.equal(state[key], wanted[key]) for key in wanted if key != table)
    assert torch.equal(state[table][known], wanted[table][known])
    others = torch.ones(NUM_TOKENS, dtype=torch.bool)
    others[known] = False
    assert not state[table][others].any()
    with torch.no_grad():
        torch.testing.assert_close(again.encode_video(clips), model.encode_video(clips))


def test_a_file_of_that_name_is_taken_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_packaged("motions")
    (tmp_path / "motions").mkdir()
    assert is_packaged("motions")  # a folder is no checkpoint
    (tmp_path / "motions").rmdir()
    (tmp_path / "motions").write_bytes(b"")
    assert not is_packaged("motions")


def test_damaged_weights_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "motions.safetensors"
    path.write_bytes(b"half")
    monkeypatch.setattr(zoo, "packaged_path", lambda _: path)
    with pytest.raises(CheckpointError, match=r"motions cannot be read .*install actionclip-dep"):
        load_checkpoint("motions")


@pytest.mark.parametrize("missing", ["licence", "num_frames"])
def test_a_provenance_without_a_field_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    path = tmp_path / "motions.safetensors"
    path.write_bytes(packaged_path("motions").read_bytes())
    content = {"licence": "MIT", "num_frames": 8}
    del content[missing]
    path.with_suffix(".json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(zoo, "packaged_path", lambda _: path)
    with pytest.raises(CheckpointError, match=rf"cannot be read \('{missing}'\)"):
        load_checkpoint("motions")


def test_the_default_model_is_of_no_other_family() -> None:
    with pytest.raises(ValueError, match=r"family is 'openai'; .* 'original'"):
        load_checkpoint("motions", family="openai")


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
