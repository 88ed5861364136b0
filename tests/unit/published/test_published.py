"""Checkpoints by name: the table, and the whole way from a name to predictions."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from schemas import check_json
from typer.testing import CliRunner

from actionclip_deploy import published
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import app
from actionclip_deploy.command_records import ModelsRecord
from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.model import ActionClipNetwork, ModelConfig, build_model, load_checkpoint
from actionclip_deploy.motions import write_dataset
from actionclip_deploy.published import (
    find_published,
    local_checkpoint,
    published_checkpoints,
    published_labels,
)

LABELS = Path(__file__).resolve().parents[2] / "data" / "labels" / "kinetics_400.json"
NAMES = ("actionclip-k400-vit-b-32-8f", "actionclip-k400-vit-b-16-8f")


def tiny_model() -> ActionClipNetwork:
    config = ModelConfig(
        backbone="tiny",
        embed_dim=16,
        input_size=32,
        vision_layers=1,
        vision_width=64,
        patch_size=16,
        context_length=77,
        vocab_size=49408,
        text_width=64,
        text_heads=1,
        text_layers=1,
        visual_prompt="meanp",
        num_frames=8,
    )
    return build_model(config.with_visual_prompt("transf", num_frames=8), seed=7)


def as_mmaction2(model: ActionClipNetwork) -> dict:
    towers = {f"clip.{key}": value for key, value in model.towers.state_dict().items()}
    head = {f"adapter.{key}": value for key, value in model.visual_prompt.state_dict().items()}
    return {"meta": {}, "state_dict": towers | head}


def as_original(model: ActionClipNetwork) -> dict:
    head = {f"module.{key}": value for key, value in model.visual_prompt.state_dict().items()}
    towers = model.towers.state_dict()
    return {"epoch": 1, "model_state_dict": towers, "fusion_model_state_dict": head}


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A server in the place of the publisher's: the files that it has, by their paths."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            content = files.get(self.path)
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv("ACTIONCLIP_MIRROR", f"http://127.0.0.1:{server.server_address[1]}/")
        monkeypatch.setenv("ACTIONCLIP_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield files
        server.shutdown()
        thread.join()


def publish(files: dict[str, bytes], name: str, content: dict) -> None:
    written = io.BytesIO()
    torch.save(content, written)
    files[urlsplit(published_checkpoints()[name].address).path] = written.getvalue()


@pytest.mark.parametrize(("name", "write"), [(NAMES[0], as_mmaction2), (NAMES[1], as_original)])
def test_a_name_becomes_a_bundle_that_recognises_kinetics(
    mirror: dict[str, bytes], name: str, write: Callable[[ActionClipNetwork], dict]
) -> None:
    publish(mirror, name, write(tiny_model()))
    exported = CliRunner().invoke(app, ["export", name])
    assert exported.exit_code == 0, exported.output
    assert f"actionclip predict {name} VIDEO --labels kinetics-400" in exported.output
    write_dataset(Path("videos"), "test", 1, 5)
    video = next(Path("videos").rglob("*.mp4"))
    predicted = CliRunner().invoke(
        app, ["predict", name, str(video), "--labels", "kinetics-400", "--json"]
    )
    assert predicted.exit_code == 0, predicted.output
    best = json.loads(predicted.stdout)["predictions"][0]
    assert best["label"] in published_labels("kinetics-400")
    verified = CliRunner().invoke(app, ["verify", name, "--runtime", "torch", "--checkpoint", name])
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("known", ["as its publisher states it", "by an earlier download"])
def test_a_file_that_was_fetched_by_hand_is_known_by_its_hash(
    mirror: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    publish(mirror, NAMES[0], as_mmaction2(tiny_model()))
    content = mirror[urlsplit(published_checkpoints()[NAMES[0]].address).path]
    mine = tmp_path / "mine.pth"
    mine.write_bytes(content)
    words = ["export", str(mine), "--num-frames", "8", "--output"]
    unknown = CliRunner().invoke(app, [*words, str(tmp_path / "unknown")])
    assert unknown.exit_code == 0, unknown.output
    assert Bundle.open(tmp_path / "unknown").label_bank_names() == ()
    if known == "by an earlier download":
        local_checkpoint(NAMES[0])
    else:
        row = published_checkpoints()[NAMES[0]]
        stated = dataclasses.replace(row, sha256_prefix=hashlib.sha256(content).hexdigest()[:8])
        monkeypatch.setitem(published_checkpoints(), NAMES[0], stated)
    exported = CliRunner().invoke(app, [*words, str(tmp_path / "known")])
    assert exported.exit_code == 0, exported.output
    assert "--labels kinetics-400" in exported.output
    assert Bundle.open(tmp_path / "known").label_bank_names() == ("kinetics-400",)


def test_models_tells_licences_and_what_is_not_known_of_them() -> None:
    shown = CliRunner().invoke(app, ["models"], env={"COLUMNS": "80"}).stdout
    assert "Licence of the weights: unknown" in shown
    assert "MIT (code of ActionCLIP): actionclip-*" in shown
    assert "Apache-2.0 (code of mmaction2): mmaction2-*" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_a_hub_that_is_not_reached_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        raise FileNotFoundError("set 'local_files_only' to False")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(published, "is_reachable", lambda _: False)  # no test waits for a network
    with pytest.raises(CheckpointError) as caught:
        local_checkpoint("hf://me/it/x.pt")
    host = huggingface_hub.constants.ENDPOINT
    assert str(caught.value) == (
        f"hf://me/it/x.pt could not be fetched (no connection to {host}); give the file of "
        f"{host}/me/it/resolve/main/x.pt"
    )


def test_models_tells_what_is_in_the_cache_and_frees_it(mirror: dict[str, bytes]) -> None:
    publish(mirror, NAMES[0], as_mmaction2(tiny_model()))
    path = local_checkpoint(NAMES[0])
    printed = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)
    check_json(ModelsRecord, printed)
    listed = printed["models"]
    row = next(row for row in listed if row["name"] == NAMES[0])
    assert (row["path"], row["bytes"]) == (str(path), path.stat().st_size)
    shown = CliRunner().invoke(app, ["models"], env={"COLUMNS": "80"})
    assert all(name in shown.stdout for name in (*NAMES, "motions", "open_clip:MODEL/TAG"))
    assert CliRunner().invoke(app, ["models", "remove", "other"]).exit_code == 2
    assert CliRunner().invoke(app, ["models", "remove", NAMES[0]]).exit_code == 0
    assert not path.exists()


def test_an_address_without_a_hash_says_how_to_pin_it(
    mirror: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(mirror, NAMES[0], as_mmaction2(tiny_model()))
    published = published_checkpoints()[NAMES[0]].download
    loaded = load_checkpoint(Path(published.address))  # a path makes one slash of two
    assert any(f"#sha256={loaded.sha256}" in note for note in loaded.notes)
    pinned = load_checkpoint(f"{published.address}#sha256={loaded.sha256[:12]}")
    assert not any("#sha256" in note for note in pinned.notes)
    with pytest.raises(CheckpointError, match="00000000 was expected"):
        load_checkpoint(f"{published.address}#sha256=00000000")
    with pytest.raises(CheckpointError, match=r"write #sha256= and 8 to 64"):
        load_checkpoint(f"{published.address}#md5=00000000")


def test_the_labels_are_those_of_the_class_ids() -> None:
    labels = published_labels("kinetics-400")
    assert list(labels) == json.loads(LABELS.read_text(encoding="utf-8"))
    assert (len(set(labels)), list(labels)) == (400, sorted(labels))


def test_a_missing_checkpoint_names_what_comes_close() -> None:
    match = r"did you mean actionclip-k400-vit-b-32-8f.*`actionclip models`"
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint("actionclip-k400-vitb-32-8f")


def test_a_file_of_that_name_is_taken_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_published(NAMES[0]) is not None
    Path(NAMES[0]).write_bytes(b"mine")
    assert find_published(NAMES[0]) is None
    assert local_checkpoint(NAMES[0]) == Path(NAMES[0])


@pytest.mark.parametrize("given", ["hf://user/file.pth", "hf://a/b@x/c.pt@y", "hf://"])
def test_a_hub_address_that_names_no_file_is_refused(given: str) -> None:
    with pytest.raises(CheckpointError, match=r"hf:/+|does not exist"):
        load_checkpoint(given)


def test_hub_files_are_asked_for_with_their_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def fetched(repository: str, file: str, *, revision: str | None, local_files_only: bool) -> str:
        asked.append((repository, file, revision))
        return str(tmp_path / "x.pt")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    for given in ("hf://me/it/a/x.pt", "hf://me/it@v1/x.pt", "hf://me/it/x.pt@v1"):
        assert local_checkpoint(given) == tmp_path / "x.pt"
    assert asked == [("me/it", "a/x.pt", None), *[("me/it", "x.pt", "v1")] * 2]


def test_without_a_cache_the_address_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTIONCLIP_CACHE", "off")
    with pytest.raises(CheckpointError, match=r"cache, which is off.*download https://"):
        local_checkpoint(NAMES[0])
    assert CliRunner().invoke(app, ["models"]).exit_code == 0
