"""Shows on this device that a runtime computes what PyTorch computed.

    python runtimes/smoke.py onnxruntime BUNDLE [--execution-provider cuda]
    python runtimes/smoke.py openvino BUNDLE [--device gpu] [--precision fp16]
    python runtimes/smoke.py tensorrt BUNDLE
    python runtimes/smoke.py tensorrt-rtx BUNDLE

Runs `actionclip doctor`, `build` where the runtime has engines, and `verify`. They print what
was built and what ran. The exit code is 0 if all succeed, otherwise that of the one that did
not: 1 for an error, 4 for numbers that differ.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

# Nothing but the standard library, so that the images need this one file and no torch.
WITH_ENGINES = ("tensorrt", "tensorrt-rtx")


def main() -> int:
    """Run the commands until one fails."""
    parser = argparse.ArgumentParser(description="Verify a bundle on this device.")
    parser.add_argument("runtime", choices=("onnxruntime", "openvino", *WITH_ENGINES))
    parser.add_argument("bundle")
    parser.add_argument("--execution-provider", help="of onnxruntime; cpu if not given")
    parser.add_argument("--device", help="of openvino; cpu if not given")
    parser.add_argument("--precision", help="of openvino; that of the bundle if not given")
    options = parser.parse_args()
    with_engines = options.runtime in WITH_ENGINES
    if options.runtime != "onnxruntime" and options.execution_provider is not None:
        parser.error(f"--execution-provider is for onnxruntime; {options.runtime} has none.")
    if options.runtime != "openvino" and (options.device or options.precision):
        parser.error(f"--device and --precision are for openvino and not for {options.runtime}.")

    chosen = ["--runtime", options.runtime]
    commands = [["doctor"]]
    if with_engines:
        commands += [["build", options.bundle, *chosen], ["verify", options.bundle, *chosen]]
    elif options.runtime == "openvino":
        chosen += ["--device", options.device or "cpu"]
        chosen += ["--precision", options.precision] if options.precision else []
        commands += [["verify", options.bundle, *chosen]]
    else:
        provider = ["--execution-provider", options.execution_provider or "cpu"]
        commands += [["verify", options.bundle, *chosen, *provider]]
    for arguments in commands:
        print(f"$ actionclip {shlex.join(arguments)}", flush=True)
        code = subprocess.call([sys.executable, "-m", "actionclip_deploy.cli", *arguments])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
