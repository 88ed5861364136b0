"""Shows that a built image of the server does what compose.yaml and the manifests ask of it.

    python runtimes/server/try_image.py BUNDLE VIDEO [--engine docker] [--image actionclip-serve]

Runs the smoke test in the image, then the image's own command as a pod does: nothing but its
volumes can be written to, no capabilities, limits of memory and processes. It has no network, so
the clients are a second container that shares its loopback address. Prints what it saw; the exit
code is 1, with a sentence, at the first thing that is not so. BUNDLE needs a label bank.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

# Nothing but the standard library: the file runs in the image as well, as the server's client.
URL = "http://127.0.0.1:8000"
START_SECONDS, END_SECONDS = 120, 40
NUM_CLIENTS = 4
HERE = Path(__file__).resolve()
SMOKE = HERE.parents[1] / "smoke.py"
SMOKE_WORDS = ("/opt/smoke.py", "onnxruntime", "/bundle")
LEFT_OVER = """
import pathlib
for name in ("/root/.cache", "/var/lib/apt/lists", "/src", "/home/actionclip/.cache"):
    if sum(path.stat().st_size for path in pathlib.Path(name).rglob("*")) > 100_000:
        print(name)
"""
WRITES = """
import pathlib
for name in ("/", "/usr/local", "/home/actionclip", "/bundle", "/cache", "/spool", "/tmp"):
    try:
        (pathlib.Path(name) / "written").write_text("")
        print(name)
    except OSError:
        pass
"""


class NotSoError(Exception):
    """What was expected of the image, and what was there."""


def main() -> int:
    """Try everything until one thing is not as it is to be."""
    parser = argparse.ArgumentParser(description="Try a built image of the server.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("video", type=Path)
    parser.add_argument("--engine", default="docker", help="or podman")
    parser.add_argument("--image", default="actionclip-serve")
    options = parser.parse_args()
    try:
        try_image(options.engine, options.image, options.bundle.resolve(), options.video.resolve())
    except (NotSoError, subprocess.SubprocessError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    return 0


def try_image(engine: str, image: str, bundle: Path, video: Path) -> None:
    """See the module."""

    def run(*words: str, seconds: float = START_SECONDS) -> str:
        done = subprocess.run(
            [engine, *words], capture_output=True, text=True, check=False, timeout=seconds
        )
        expect(done.returncode == 0, f"{engine} {words[0]}: {done.stdout}{done.stderr}")
        return done.stdout

    found = json.loads(run("image", "inspect", image))[0]
    config = found["Config"]
    print(f"{image}: {found['Size'] / 1e6:,.0f} MB, {found['Architecture']}, as {config['User']}")
    expect(config["User"].split(":")[0].isdigit(), "USER is a number, which Kubernetes can check")
    expect(config["Entrypoint"][0] == "actionclip", "ENTRYPOINT is the program, without a shell")
    health = (config.get("Healthcheck") or found.get("Healthcheck") or {}).get("Test", [])
    expect(health[:1] == ["CMD"], "HEALTHCHECK is in the image; buildah drops it from OCI's format")

    # As compose.yaml and deployment.yaml have it. Without a network nothing of this is reached from
    # outside, and the server reaches nothing.
    shut = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    shut += ["--tmpfs", "/tmp:size=64m", "--memory", "4g", "--pids-limit", "512"]
    given = ["--volume", f"{bundle}:/bundle:ro"]
    code = run("run", "--rm", "--entrypoint", "python", "--user", "0", image, "-c", LEFT_OVER)
    expect(not code.strip(), f"no cache of pip or apt is left in the image: {code}")
    smoke = ["--volume", f"{SMOKE}:/opt/smoke.py:ro", "--entrypoint", "python"]
    told = run("run", "--rm", "--network=none", *shut, *given, *smoke, image, *SMOKE_WORDS)
    print(f"smoke.py: {told.strip().splitlines()[-1]}")

    name = f"actionclip-{uuid.uuid4().hex[:8]}"
    started = time.monotonic()
    run("run", "--detach", "--network=none", "--name", name, *shut, *given, image)
    try:
        first = is_healthy(engine, name, health)
        while not is_healthy(engine, name, health):
            logs = subprocess.run(
                [engine, "logs", name], capture_output=True, text=True, check=True
            )
            expect(time.monotonic() - started < START_SECONDS, f"it is healthy: {logs.stderr}")
            time.sleep(0.2)
        expect(not first, "it is not healthy before it was verified")
        print(f"healthy after {time.monotonic() - started:.1f} s, and not before")
        print("user:", run("exec", name, "id").strip())
        written = run("exec", name, "python", "-c", WRITES).split()
        expect(
            written == ["/cache", "/spool", "/tmp"], f"only its volumes are written to: {written}"
        )
        print("can be written to:", *written)

        client = ["--volume", f"{HERE}:/opt/client.py:ro", "--volume", f"{video}:/video.mp4:ro"]
        client += ["--network", f"container:{name}", "--entrypoint", "python"]
        words = [
            engine,
            "run",
            "--rm",
            *client,
            image,
            "-u",
            "/opt/client.py",
            "--ask",
            "/video.mp4",
        ]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as asking:
            assert asking.stdout is not None
            print(asking.stdout.readline().strip())
            begun = asking.stdout.readline().strip()
            expect(bool(begun), "clients are answered; what the second container said is above")
            told_at = time.monotonic()
            run("stop", "--time", str(END_SECONDS), name)
            seconds = time.monotonic() - told_at
            counts = json.loads(asking.stdout.readline())
        print(f"SIGTERM under load ({begun}): {counts}, ended after {seconds:.1f} s")
        expect(counts.get("200", 0) > 0, "requests were answered")
        expect(set(counts) <= {"200", "503", "refused"}, f"what has begun is answered: {counts}")
        code = run("inspect", "--format", "{{.State.ExitCode}}", name).strip()
        expect(code == "0", f"the exit code after SIGTERM is 0: {code}")
    finally:
        subprocess.run([engine, "rm", "--force", name], capture_output=True, check=False)


def is_healthy(engine: str, name: str, health: list[str]) -> bool:
    """Ask what HEALTHCHECK asks; engines differ in who asks it, and in how they tell the answer."""
    done = subprocess.run([engine, "exec", name, *health[1:]], capture_output=True, check=False)
    return done.returncode == 0


def expect(is_so: bool, what: str) -> None:
    """Go on only where something is so."""
    if not is_so:
        raise NotSoError(f"It is expected that {what}")


# In the image: a client of the server


def ask_until_refused(video: Path) -> None:
    """Print one answer, then that more have come, then, once nothing listens, what all became."""
    print(f"/v2/health/ready: {get('/v2/health/ready').status}", end="; ")
    (bank, *_) = json.load(get("/v1/labels"))["banks"]
    form, boundary = b"", uuid.uuid4().hex
    for name, content in (("labels", bank["name"].encode()), ("video", video.read_bytes())):
        form += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'.encode()
        form += b'; filename="a.mp4"' if name == "video" else b""
        form += b"\r\n\r\n" + content + b"\r\n"
    form += f"--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    counts: Counter[str] = Counter()

    def classify() -> Any:
        with get("/v1/classify", form, kind) as answer:
            return json.load(answer)

    def ask() -> None:
        while True:
            try:
                classify()
                counts["200"] += 1
            except urllib.error.HTTPError as exc:
                counts[str(exc.code)] += 1
                return
            except urllib.error.URLError as exc:
                is_refused = isinstance(exc.reason, ConnectionRefusedError)
                counts["refused" if is_refused else repr(exc.reason)] += 1
                return
            except OSError as exc:
                counts[repr(exc)] += 1
                return

    (result,) = classify()["results"]
    print("/v1/classify:", json.dumps(result["predictions"][0]))
    clients = [threading.Thread(target=ask) for _ in range(NUM_CLIENTS)]
    for each in clients:
        each.start()
    while counts["200"] < 3 * NUM_CLIENTS and any(each.is_alive() for each in clients):
        time.sleep(0.01)
    print(f"{NUM_CLIENTS} clients, {counts['200']} answers so far")
    for each in clients:
        each.join()
    print(json.dumps(counts))


def get(path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
    """An answer of the server."""
    request = urllib.request.Request(URL + path, body, headers or {})
    return urllib.request.urlopen(request, timeout=END_SECONDS)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ask"]:
        ask_until_refused(Path(sys.argv[2]))
    else:
        sys.exit(main())
