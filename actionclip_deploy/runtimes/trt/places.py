"""Where an engine was built and where it may run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actionclip_deploy.runtimes.jetson import read_jetson
from actionclip_deploy.runtimes.machine import nvidia_driver
from actionclip_deploy.runtimes.trt.api import Api
from actionclip_deploy.runtimes.trt.driver import Cuda, Device
from actionclip_deploy.runtimes.trt.engine_entries import Entry
from actionclip_deploy.runtimes.trt.plan import BuildOptions

_ANY = "any"
_FIELDS = ("runtime", "version", "gpu", "compute_capability", "cuda", "driver", "l4t")
_ROOT = Path("/")


@dataclass(frozen=True)
class Place:
    """A machine with a TensorRT.

    Attributes:
        fields: What an engine depends on: runtime, version, GPU, compute capability, CUDA, driver
            and L4T; only the first two where no GPU is.
        card: The very card with the driver and the version, on which a verification counts; None
            where no GPU is.
    """

    fields: dict[str, str]
    card: str | None

    def built_with(self, options: BuildOptions) -> dict[str, str]:
        """The place that an engine built here with some options is for."""
        place = dict(self.fields)
        if options.targets:
            return {"runtime": place["runtime"], "version": place["version"]}
        if options.hardware_compatible:
            place |= {"gpu": _ANY, "compute_capability": _ANY}
        if options.version_compatible:
            place |= {"version": _ANY}
        return place

    def differences(self, entry: Entry) -> list[str]:
        """In words, why an engine cannot run here; empty if it can."""
        built: dict[str, Any] = entry.key["place"]
        return [
            f"{name.replace('_', ' ')} {built[name]} and not {self.fields.get(name, 'none')}"
            for name in _FIELDS
            if name in built and built[name] not in (_ANY, self.fields.get(name))
        ]


def find_place(api: Api, cuda: Cuda | None, *, root: Path = _ROOT) -> Place:
    """The place that this process is at.

    Args:
        api: The TensorRT.
        cuda: The GPU; None where there is none, which TensorRT for RTX can build without.
        root: Where `/proc` and `/etc` are; another one in tests.
    """
    fields = {"runtime": api.name, "version": api.version}
    if cuda is None:
        return Place(fields, None)
    # The power mode, for which alone another program would be asked, is no part of a place.
    device, jetson = cuda.device, read_jetson(root, query=lambda: "")
    fields |= {
        "gpu": device.name,
        "compute_capability": device.compute_capability,
        "cuda": device.driver,
        "driver": nvidia_driver(root) or "unknown",
        "l4t": (jetson.l4t if jetson else None) or "none",
    }
    return Place(fields, _card(api, device, fields["driver"]))


def _card(api: Api, device: Device, driver: str) -> str:
    return " ".join((device.uuid, driver, device.driver, api.name, api.version))
