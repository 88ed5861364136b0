"""The visual graph beside PyTorch eager and ONNX Runtime on the plain export of the same weights.

    python benchmarks/bench_graphs.py --rounds 9 --output graphs.json
    python benchmarks/bench_graphs.py --variants --backbones ViT-B-16 --threads 1

Models are full-size with random weights, biases and LayerNorms too: what an exporter can leave out
because it is zero would flatter it. All answers are compared before anything is timed. In each
round every row runs once, another one first; ratios are medians over rounds of the ratio to `ours`
in the same round, so a ratio of 1.1 says that a row takes 1.1 times as long.

--variants adds the graph with each rewrite undone and with those that were tried (graph_variants).
--options adds the graph under each session option that was thought to matter.
--cpu-time counts the time of the process and not of the clock: for one thread on a busy machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from graph_variants import VARIANTS, opset_of
from workbench import make_parser, settings_of, time_in_turns, write_report

from actionclip_deploy.export.graphs import plan_graphs
from actionclip_deploy.export.layers import PixelStatistics
from actionclip_deploy.export.onnx_files import write_graph
from actionclip_deploy.model import ActionClipNetwork, ModelConfig, build_model
from actionclip_deploy.runtimes.call_sizes import TOKENS_IN_CACHES
from actionclip_deploy.runtimes.machine import num_available_cores
from actionclip_deploy.runtimes.ort import CPU, open_session

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOLERANCE = 1e-4  # of fp32 features, whose standard deviation is about 1
Call = Callable[[], np.ndarray]

# What each row of --options changes in the session that the runtime would open.
OPTIONS: dict[str, Callable[[Any], None]] = {
    "as the runtime": lambda _: None,
    "no spinning": lambda options: options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    ),
    "denormals as zero": lambda options: options.add_session_config_entry(
        "session.set_denormal_as_zero", "1"
    ),
    "no memory arena": lambda options: setattr(options, "enable_cpu_mem_arena", False),
    "no memory pattern": lambda options: setattr(options, "enable_mem_pattern", False),
    "no packed weights": lambda options: options.add_session_config_entry(
        "session.disable_prepacking", "1"
    ),
    "parallel execution": lambda options: setattr(
        options, "execution_mode", onnxruntime.ExecutionMode.ORT_PARALLEL
    ),
    "extended optimisation": lambda options: setattr(
        options,
        "graph_optimization_level",
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    ),
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--backbones", default="ViT-B-32,ViT-B-16")
    parser.add_argument("--frames", type=int, default=8, help="frames of a call")
    parser.add_argument("--threads", type=int, default=num_available_cores())
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--options", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.cpu_time else time.perf_counter
    results = {}
    for backbone in given.backbones.split(","):
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            calls = make_calls(backbone, given, Path(folder))
            differences = check_answers(calls)
            results[backbone] = time_calls(calls, given.rounds, clock)
            for name, difference in differences.items():
                results[backbone][name]["max_abs_difference"] = difference
    write_report({"results": results, "settings": settings_of(given)}, given.output)


def make_model(backbone: str) -> ActionClipNetwork:
    """A model with random weights, of which none is 0 or 1 throughout."""
    config = ModelConfig.from_open_clip(backbone, visual_prompt="transf", num_frames=8)
    model = build_model(config, seed=0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for values in model.parameters():
        if values.ndim == 1:
            values += 0.1 * torch.randn(values.shape, generator=generator)
    return model


def make_calls(backbone: str, given: argparse.Namespace, folder: Path) -> dict[str, Call]:
    """What is compared, by name; each call gives the features of the same frames."""
    num_frames, num_threads = given.frames, given.threads
    model = make_model(backbone)
    visual: Any = model.towers.visual
    generator = np.random.default_rng(0)
    size = model.config.input_size
    frames = generator.integers(0, 256, (num_frames, size, size, 3), dtype=np.uint8)
    pixels = PixelStatistics(MEAN, STD)
    plan = plan_graphs(model, pixels, "fp32")[0]
    calls: dict[str, Call] = {"torch eager": lambda: visual(_normalised(frames)).numpy()}
    export_plain(visual, size, folder / "plain.onnx")
    calls["plain export"] = _session_call(
        folder / "plain.onnx", lambda: _normalised(frames).numpy(), num_threads
    )
    for name, build in VARIANTS.items() if given.variants else [("ours", VARIANTS["ours"])]:
        path = folder / f"{len(calls)}.onnx"
        with torch.inference_mode(False), opset_of(name):
            module = build(model, pixels)
            write_graph(dataclasses.replace(plan, build=lambda module=module: module), path)
        calls[name] = _session_call(path, lambda: frames, num_threads)
    # The file of `ours`, which was written when there were so many rows before it.
    path = folder / f"{list(calls).index('ours')}.onnx"
    # As the runtime computes a batch: so many frames at a time that activations stay in caches.
    step = max(1, TOKENS_IN_CACHES // (visual.positional_embedding.shape[0]))
    session = open_session(path, num_threads=num_threads)
    calls["ours, in parts"] = lambda: np.concatenate(
        [session.run(None, {"frames": frames[i : i + step]})[0] for i in range(0, num_frames, step)]
    )
    for name in OPTIONS if given.options else ():
        calls[name] = _optional_call(path, frames, num_threads, OPTIONS[name])
    return calls


def _optional_call(
    path: Path, frames: np.ndarray, num_threads: int, change: Callable[[Any], None]
) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 4
    change(options)
    session = onnxruntime.InferenceSession(str(path), options, providers=[CPU])
    return lambda: session.run(None, {"frames": frames})[0]


def _normalised(frames: np.ndarray) -> torch.Tensor:
    """What a model without rewrites takes; its cost is part of the call."""
    levels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return (levels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def export_plain(visual: Any, size: int, path: Path) -> None:
    """Call torch.onnx.export on the tower as it is."""
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            visual,
            (torch.zeros(2, 3, size, size),),
            input_names=["frames"],
            dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
            opset_version=18,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=False)


def _session_call(path: Path, prepare: Callable[[], np.ndarray], num_threads: int) -> Call:
    session = open_session(path, num_threads=num_threads)

    def call() -> np.ndarray:
        output: np.ndarray = session.run(None, {"frames": prepare()})[0]
        return output

    return call


def check_answers(calls: dict[str, Call]) -> dict[str, float]:
    """Largest difference of each row from PyTorch; ends the program where one is too large."""
    expected = calls["torch eager"]()
    differences = {name: float(abs(call() - expected).max()) for name, call in calls.items()}
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    if wrong:
        raise SystemExit(f"These differ from PyTorch by more than {TOLERANCE}: {wrong}.")
    return differences


def time_calls(
    calls: dict[str, Call], rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Milliseconds, and ratios to `ours`."""
    seconds = time_in_turns(calls, rounds, clock=clock)
    ours = seconds["ours"]
    return {
        name: {
            "median_ms": 1e3 * statistics.median(values),
            "min_ms": 1e3 * min(values),
            "times_ours": statistics.median(a / b for a, b in zip(values, ours, strict=True)),
        }
        for name, values in seconds.items()
    }


if __name__ == "__main__":
    main()
