"""Shows on this device that ONNX Runtime computes what PyTorch computed.

    python runtimes/onnxruntime/smoke.py BUNDLE [--execution-provider cuda]

Runs `actionclip doctor` and `actionclip verify`, which prints what ran. The exit code is 0 if
both succeed, otherwise that of the one that did not: 1 for an error, 4 for numbers that differ.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys


def main() -> int:
    """Run the commands until one fails."""
    parser = argparse.ArgumentParser(description="Verify a bundle on this device.")
    parser.add_argument("bundle")
    parser.add_argument("--execution-provider", default="cpu")
    options = parser.parse_args()
    for words in (
        ["doctor"],
        ["verify", options.bundle, "--execution-provider", options.execution_provider],
    ):
        print(f"$ actionclip {shlex.join(words)}", flush=True)
        code = subprocess.call([sys.executable, "-m", "actionclip_deploy.cli", *words])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
