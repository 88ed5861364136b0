"""From an ONNX graph to a plan: shapes, options, one build, and a refit with other weights.

One code path serves TensorRT 10.3 to 11.x and TensorRT for RTX. The precision is the graph's alone:
networks are strongly typed, and no flag lowers or raises it. TF32, which TensorRT allows by
default, is switched off, since it keeps 10 bits of fp32's 23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actionclip_deploy.errors import ArgumentError, EngineError
from actionclip_deploy.files import write_bytes
from actionclip_deploy.manifest import GraphName, Manifest
from actionclip_deploy.runtimes.call_sizes import PROFILES, PROMPT_PROFILE
from actionclip_deploy.runtimes.trt.api import Api, MessageLog

# Profiles are narrow on purpose. The width of a profile changes the kernels that TensorRT chooses,
# with them their speed, and in some versions whether they are right.

# A batch between two profiles is filled up to the smallest batch of the larger one.
DEFAULT_PROFILES = tuple(PROFILES)

# Tokens of a prompt: text is embedded once for a label bank.
_MIN_TOKENS, _OPT_TOKENS = 2, 16


@dataclass(frozen=True)
class Profile:
    """Numbers of clips in a call."""

    name: str  # `latency`, `throughput`, or the three numbers
    min_clips: int  # fewest; smaller batches are filled up
    opt_clips: int  # what the kernels are chosen for
    max_clips: int  # most; larger batches are split

    def __post_init__(self) -> None:
        if not 1 <= self.min_clips <= self.opt_clips <= self.max_clips:
            raise ValueError(
                f"The profile {self.name!r} has {self.min_clips}, {self.opt_clips} and "
                f"{self.max_clips} clips; expected three numbers from 1 up, none smaller than the "
                "one before: MIN,OPT,MAX."
            )


@dataclass(frozen=True)
class ShapeRange:
    """Smallest, preferred and largest shape of the input of one graph."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    @property
    def is_fixed_but_rows(self) -> bool:
        """Whether only the number of rows is free."""
        return self.min[1:] == self.max[1:]

    def to_list(self) -> list[list[int]]:
        """As JSON takes it."""
        return [list(self.min), list(self.opt), list(self.max)]

    @classmethod
    def from_list(cls, values: Sequence[Sequence[int]]) -> ShapeRange:
        """From what `to_list` gave."""
        smallest, preferred, largest = (tuple(int(size) for size in shape) for shape in values)
        return cls(smallest, preferred, largest)


def narrowest(shapes: Sequence[ShapeRange], rows: int) -> int:
    """Place of the profile that serves a batch: the first of those with the smallest room for it.

    Args:
        shapes: Of an input in each profile.
        rows: At most those of the largest profile.
    """
    fitting = [place for place, shape in enumerate(shapes) if shape.max[0] >= rows]
    return min(fitting, key=lambda place: shapes[place].max[0])


def parse_profiles(texts: Sequence[str]) -> tuple[Profile, ...]:
    """Profiles from their names or numbers, in the order of their largest batch.

    Args:
        texts: Each `latency`, `throughput` or `MIN,OPT,MAX` in clips; none for both names.

    Raises:
        ValueError: If one is neither, or the numbers do not rise.
    """
    profiles = []
    for text in texts or DEFAULT_PROFILES:
        numbers = PROFILES.get(text) or tuple(
            int(part) if part.strip().isdecimal() else 0 for part in text.split(",")
        )
        if len(numbers) != 3 or 0 in numbers:
            raise ValueError(
                f"{text!r} is not a valid profile; it must be one of {', '.join(PROFILES)}, or "
                "three numbers of clips as in 1,4,8."
            )
        profiles.append(Profile(text, *numbers))
    return tuple(sorted(set(profiles), key=lambda p: (p.max_clips, p.min_clips)))


def shape_ranges(
    manifest: Manifest, graph: GraphName, profiles: Sequence[Profile], num_frames: int
) -> tuple[ShapeRange, ...]:
    """The shapes of a graph's input in each profile, without repetitions; `num_frames` is T."""
    model, shape = manifest.model, manifest.graphs[graph].input.shape
    if graph == "textual":
        opt = min(_OPT_TOKENS, model.context_length)
        lengths = (min(_MIN_TOKENS, opt), opt, model.context_length)
        return (ShapeRange(*zip(PROMPT_PROFILE, lengths, strict=True)),)
    fixed = tuple(num_frames if size == "T" else int(size) for size in shape[1:])
    ranges = []
    for profile in profiles:
        rows = (profile.min_clips, profile.opt_clips, profile.max_clips)
        if graph == "visual":
            # A stream gives single frames to the profile of one clip.
            few, usual, most = (count * num_frames for count in rows)
            rows = (1 if profile.min_clips == 1 else few, usual, most)
        ranges.append(ShapeRange(*((count, *fixed) for count in rows)))
    return tuple(dict.fromkeys(ranges))


DEFAULT_OPT_LEVEL = 3
MAX_OPT_LEVEL = 5
# GPUs that TensorRT for RTX compiles for, in the words of its own names.
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
_RTX_SERIES = {20: "sm75", 30: "sm86", 40: "sm89", 50: "sm120"}

_GIB = 2**30
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "requested amount of gpu")

OnProgress = Callable[[str, int, int], None]  # a phase of the build, its steps done, its steps


def default_targets(manifest: Manifest) -> tuple[str, ...]:
    """The RTX 20 to 50 cards that TensorRT for RTX compiles all graphs of a bundle for."""
    spec, precision = manifest.quantization, manifest.precision()
    if precision == "fp8":
        return tuple(target for series, target in _RTX_SERIES.items() if series >= 40)
    between = precision if spec is None else spec.rest_precision
    # No fp32 matrix products for RTX 20. The fp32 heads that have some are recurrent.
    has_products = manifest.graphs["textual"].precision == "fp32" or between == "fp32"
    oldest = 30 if has_products or manifest.model.visual_prompt.endswith("lstm") else 20
    return tuple(target for series, target in _RTX_SERIES.items() if series >= oldest)


@dataclass(frozen=True)
class BuildOptions:
    """How engines are built; everything but the timing cache is part of an engine's identity."""

    # Scratch memory that a kernel may take; None for TensorRT's own limit.
    workspace_bytes: int | None = None
    opt_level: int = DEFAULT_OPT_LEVEL  # 0 to 5: how long the builder looks for faster kernels
    timing_cache: Path | None = None  # file of measured kernels, read and written; None for none
    version_compatible: bool = False  # whether later versions of TensorRT may load the plan
    hardware_compatible: bool = False  # whether GPUs from Ampere on may
    strip: bool = False  # whether weights are left out, to be filled in by a refit
    targets: tuple[str, ...] = ()  # for TensorRT for RTX: GPUs to compile for, of `RTX_TARGETS`

    def __post_init__(self) -> None:
        if not 0 <= self.opt_level <= MAX_OPT_LEVEL:
            raise ArgumentError(
                "opt_level", f"is {self.opt_level}; it must be 0 to {MAX_OPT_LEVEL}."
            )
        unknown = [target for target in self.targets if target not in RTX_TARGETS]
        if unknown:
            raise ArgumentError(
                "targets", f"has {unknown[0]!r}; each must be one of {', '.join(RTX_TARGETS)}."
            )

    def identity(self) -> dict[str, Any]:
        """What an engine depends on, for JSON."""
        fields = asdict(self) | {"targets": list(self.targets)}
        del fields["timing_cache"]
        return fields


def default_workspace_bytes(free_bytes: int, *, integrated: bool) -> int:
    """Scratch memory that leaves room for what else a build needs.

    Where the GPU shares the memory of the CPU, the graph, its weights and the builder itself come
    out of the same few gigabytes.
    """
    share, most = (8, _GIB) if integrated else (2, 16 * _GIB)
    return max(_GIB // 4, min(most, free_bytes // share))


def build_plan(
    api: Api,
    model: Path,
    inputs: Mapping[str, Sequence[ShapeRange]],
    options: BuildOptions,
    *,
    on_progress: OnProgress | None = None,
) -> bytes:
    """Build one engine.

    Args:
        api: The TensorRT to build with. All but TensorRT for RTX need a GPU.
        model: The ONNX file.
        inputs: By the name of an input, its shape in each optimization profile.
        options: How to build.
        on_progress: An exception of it, as of Ctrl-C, ends the build.

    Returns:
        The serialized engine.

    Raises:
        EngineError: If the parser refuses the graph, or the builder gives no engine.
        KeyboardInterrupt: If it was interrupted; nothing is left behind.
    """
    trt = api.trt
    log = MessageLog(trt)
    builder = trt.Builder(log.logger)
    # Required from 10.12 to 10.x, and ignored from 11 on, where there is nothing else.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(model)):
        raise EngineError(
            f"{api.title} does not take {model.name}: {_why_not_parsed(parser, log)}. Export the "
            "bundle again with another --precision, or use another version."
        )
    config = builder.create_builder_config()
    _configure(api, config, options)
    for ranges in zip(*inputs.values(), strict=True):
        shapes = builder.create_optimization_profile()
        for name, shape in zip(inputs, ranges, strict=True):
            shapes.set_shape(name, shape.min, shape.opt, shape.max)
        config.add_optimization_profile(shapes)
    monitor = _new_monitor(trt, on_progress)
    config.progress_monitor = monitor
    timing = _open_timing_cache(api, config, options)
    plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise _build_error(api, model, log, options)
    if timing is not None and options.timing_cache is not None:
        _save_timing_cache(config, options.timing_cache)
    return bytes(plan)


def _why_not_parsed(parser: Any, log: MessageLog) -> str:
    errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
    return "; ".join(errors) or log.text()


def _configure(api: Api, config: Any, options: BuildOptions) -> None:
    trt = api.trt
    config.builder_optimization_level = options.opt_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.strip:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT)
    if api.is_rtx and options.targets:
        config.num_compute_capabilities = len(options.targets)
        for place, target in enumerate(options.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), place)


def _new_monitor(trt: Any, on_progress: OnProgress | None) -> Any:
    """Reports progress, and ends the build at Ctrl-C, after which `interrupted` is True."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: Any, num_steps: int) -> None:  # noqa: ARG002
            self.steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self.steps.get(phase_name, 0))
            self.steps.pop(phase_name, None)

        def _tell(self, phase: str, done: int) -> None:
            # An exception must not leave a call that comes from the builder: it would end the
            # process.
            try:
                if on_progress is not None:
                    on_progress(phase, done, self.steps.get(phase, 0))
            except (KeyboardInterrupt, SystemExit):
                self.interrupted = True

    return Monitor()


def _build_error(api: Api, model: Path, log: MessageLog, options: BuildOptions) -> EngineError:
    text = log.text()
    what = f"{api.title} cannot build an engine of {model.name}: {text}"
    if any(words in text.lower() for words in _OUT_OF_MEMORY):
        gib = (options.workspace_bytes or 0) / _GIB
        limit = f" (it is {gib:.2g} GiB)" if options.workspace_bytes else ""
        return EngineError(
            f"{what}. Memory ran out: close other programs, add swap, build with a smaller "
            f"--workspace{limit}, --opt-level 2 or lower, or --profile latency alone."
        )
    return EngineError(
        f"{what}. Try --opt-level 2, another --profile, or a bundle of another precision; "
        "`actionclip doctor` lists what is known of this version."
    )


def _open_timing_cache(api: Api, config: Any, options: BuildOptions) -> Any:
    if options.timing_cache is None:
        return None
    try:
        known = options.timing_cache.read_bytes() if options.timing_cache.exists() else b""
    except OSError as exc:
        raise EngineError(f"The timing cache cannot be read ({exc}); name another file.") from exc
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineError(
            f"{options.timing_cache} is not a timing cache of {api.title} on this GPU; name "
            "another file, or remove this one."
        )
    return cache


def _save_timing_cache(config: Any, path: Path) -> None:
    """Write the cache; what another process wrote meanwhile is kept as well."""
    cache = config.get_timing_cache()
    with suppress(OSError):
        written = config.create_timing_cache(path.read_bytes())
        if written is not None:
            cache.combine(written, ignore_mismatch=False)
    write_bytes(path, bytes(cache.serialize()))


def refit_plan(api: Api, plan: bytes, model: Path) -> bytes:
    """Fill a stripped engine with the weights of another fine-tune of the same architecture.

    Args:
        api: The TensorRT that built it.
        plan: The serialized engine without its weights.
        model: The ONNX file with the weights.

    Returns:
        The serialized engine with them.

    Raises:
        EngineError: If the engine cannot be loaded, or the weights are not all of its.
    """
    trt = api.trt
    log = MessageLog(trt)
    runtime = trt.Runtime(log.logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{api.title} cannot load the stripped engine ({log.text()}); build it again with "
            "`actionclip build --strip --rebuild`."
        )
    refitter = trt.Refitter(engine, log.logger)
    filler = trt.OnnxParserRefitter(refitter, log.logger)
    why = None
    if not filler.refit_from_file(str(model)):
        why = _why_not_parsed(filler, log)
    elif missing := list(refitter.get_missing_weights()):
        why = f"it lacks {len(missing)} weights, first {missing[0]}"
    elif not refitter.refit_cuda_engine():
        why = log.text()
    if why is not None:
        raise EngineError(
            f"{api.title} cannot fill the stripped engine with the weights of {model.name}: {why}; "
            "build without --strip."
        )
    serialization = engine.create_serialization_config()
    serialization.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    return bytes(engine.serialize_with_config(serialization))
