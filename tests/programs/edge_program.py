"""Uses a bundle as an edge device does; run by the interpreter of an environment without torch.

    python edge_program.py BUNDLE VIDEO LABELS

Writes two label banks into the bundle. Exits with an error at the first thing that is not so.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

import actionclip_deploy
from actionclip_deploy import (
    ActionCLIP,
    Bundle,
    LabelBank,
    Recognizer,
    open_runtime,
    read_labels,
    verify_bundle,
)

ABSENT = ("torch", "torchvision", "open_clip", "onnx", "omegaconf", "matplotlib", "pytest")


def main(bundle: Path, video: Path, labels: Path) -> None:
    check_environment()
    use_from_python(bundle, video, labels)
    use_from_the_command_line(bundle, video, labels)
    use_openvino_alone(bundle, video)
    site_packages = Path(sysconfig.get_path("purelib"))
    sizes = {True: 0, False: 0}  # of OpenVINO, which is an extra of its own, and of the rest
    for path in site_packages.rglob("*"):
        if path.is_file():
            is_openvino = path.relative_to(site_packages).parts[0].startswith("openvino")
            sizes[is_openvino] += path.stat().st_size
    print(f"site-packages: {sizes[False] / 1e6:.0f} MB, and openvino {sizes[True] / 1e6:.0f} MB")


def check_environment() -> None:
    present = [name for name in ABSENT if importlib.util.find_spec(name) is not None]
    if present:
        sys.exit(f"this environment has {', '.join(present)}; it should have none of them")
    if Path(sys.prefix) not in Path(actionclip_deploy.__file__).parents:
        sys.exit(f"the package comes from {actionclip_deploy.__file__}, not from the wheel")


def use_openvino_alone(bundle: Path, video: Path) -> None:
    """Predict as where ONNX Runtime is not installed."""
    program = (
        "import sys; sys.modules['onnxruntime'] = None; from actionclip_deploy.cli import main; "
        "sys.argv[0] = 'actionclip'; main()"
    )
    words = ["predict", bundle, video, "--labels", "python", "--device", "cpu", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"without onnxruntime: {done.stdout}{done.stderr}")
    runtime = json.loads(done.stdout)["runtime"]["name"]
    if runtime != "openvino":
        sys.exit(f"without onnxruntime, {runtime} ran and not openvino")


def use_from_python(path: Path, video: Path, labels: Path) -> None:
    bundle = Bundle.open(path, check_hashes=True)
    with open_runtime(bundle, "onnxruntime", num_threads=1) as runtime:
        verify_bundle(bundle, runtime).check()
        bank = LabelBank.build(bundle, runtime, read_labels(labels), name="python")
        bank.save(bundle)
        prediction = Recognizer(runtime, LabelBank.load(bundle, "python")).predict(video)
    total = float(prediction.scores.sum())
    if abs(total - 1) > 1e-5:
        sys.exit(f"the scores of all labels sum to {total}, not to 1")
    print(f"python: {prediction.predictions[0]}")
    with ActionCLIP(path, runtime="onnxruntime", num_threads=1) as model:
        found = model([video, video.read_bytes()], labels=labels)
        (embedding,) = model.embed(video)
    if [each.label for each in found.scored] != 2 * [prediction.label]:
        sys.exit(f"ActionCLIP gives {found!r}, and the recognizer {prediction!r}")
    if abs(float(embedding @ embedding) - 1) > 1e-4:
        sys.exit(f"the embedding has the norm {float(embedding @ embedding)}")
    print(f"ActionCLIP: {found[0]!r}")


def use_from_the_command_line(bundle: Path, video: Path, labels: Path) -> None:
    run("doctor", "--json")
    run("inspect", bundle, "--json")
    report = run("verify", bundle, "--json")
    if not report["passed"]:
        sys.exit(f"verify exited with 0 and reports {report}")
    run("labels", "build", bundle, "--labels", labels, "--name", "shell", "--json")
    prediction = run("predict", bundle, video, "--labels", "shell", "--top-k", "3", "--json")
    print(f"shell: {prediction['predictions'][0]}")
    with TemporaryDirectory() as folder:
        annotations = Path(folder) / "list.txt"
        annotations.write_text(f"{video} {read_labels(labels)[0]}\n", encoding="utf-8")
        accuracy = run("evaluate", bundle, annotations, "--labels", labels, "--json")
    if accuracy["num_videos"] != 1:
        sys.exit(f"evaluate scored {accuracy['num_videos']} videos, not 1")


def run(*arguments: str | Path) -> dict[str, object]:
    """Run `actionclip` with these arguments and read the JSON that it prints."""
    program = Path(sys.executable).with_name("actionclip")
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        sys.exit(f"actionclip {arguments[0]} exited with {done.returncode}: {done.stderr}")
    result: dict[str, object] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main(*(Path(argument).absolute() for argument in sys.argv[1:]))
