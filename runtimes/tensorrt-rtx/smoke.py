"""Shows on this device that TensorRT for RTX builds engines that compute what PyTorch computed.

    python runtimes/tensorrt-rtx/smoke.py BUNDLE

Runs `actionclip doctor`, `build` and `verify`, which print what was built and what ran. The exit
code is 0 if all succeed, otherwise that of the one that did not: 1 for an error, 4 for numbers
that differ.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

RUNTIME = "tensorrt-rtx"


def main() -> int:
    """Run the commands until one fails."""
    parser = argparse.ArgumentParser(description="Build and verify engines on this device.")
    parser.add_argument("bundle")
    bundle = parser.parse_args().bundle
    for words in (
        ["doctor"],
        ["build", bundle, "--runtime", RUNTIME],
        ["verify", bundle, "--runtime", RUNTIME],
    ):
        print(f"$ actionclip {shlex.join(words)}", flush=True)
        code = subprocess.call([sys.executable, "-m", "actionclip_deploy.cli", *words])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
