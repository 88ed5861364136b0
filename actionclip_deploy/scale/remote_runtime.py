"""A server of the inference protocol as a runtime, over HTTP or gRPC: for verification.

Triton, KServe and our own server answer to the same models and names of tensors, so what compares a
runtime with the golden data compares a server too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from actionclip_deploy.errors import (
    ArgumentError,
    InferenceError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from actionclip_deploy.manifest import GraphName, GraphOrClip, Manifest
from actionclip_deploy.runtimes.base import Array, Float32Array, Runtime, RuntimeInfo

try:
    import tritonclient.grpc as by_grpc
    import tritonclient.http as by_http
    from tritonclient.utils import InferenceServerException
except ModuleNotFoundError as exc:
    raise MissingExtraError("actionclip triton", "triton") from exc

_SECONDS = 120.0
# Everything that the clients raise where a server is not there or does not speak the protocol.
_FOREIGN_ERRORS = (InferenceServerException, OSError)
_DATATYPES = {"uint8": "UINT8", "int32": "INT32", "float32": "FP32"}


class RemoteRuntime(Runtime):
    """Asks a server to run the models of a bundle.

    Args:
        manifest: Of the bundle that the server should have.
        url: `http://HOST:PORT` or `grpc://HOST:PORT`.
        prefix: What the names of its models begin with.
        api_key: A key of the server, if it asks for one.

    Raises:
        ArgumentError: If the address is neither.
        RuntimeUnavailableError: If the server is not ready or has not the models.
    """

    def __init__(
        self, manifest: Manifest, url: str, *, prefix: str = "", api_key: str | None = None
    ) -> None:
        super().__init__(manifest)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "grpc") or not parts.netloc or parts.path not in ("", "/"):
            raise ArgumentError(
                "url", f"is {url!r}; give http://HOST:PORT or grpc://HOST:PORT of a server."
            )
        self._url, self._prefix, self._scheme = url, prefix, parts.scheme
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._api: Any = by_http if parts.scheme == "http" else by_grpc
        if parts.scheme == "http":
            self._client: Any = by_http.InferenceServerClient(
                parts.netloc, connection_timeout=_SECONDS, network_timeout=_SECONDS
            )
        else:
            self._client = by_grpc.InferenceServerClient(parts.netloc)
        self._server = self._call(self._describe_server, "be described")
        self._rows = {name: self._rows_of(name) for name in self._names()}

    def describe(self) -> RuntimeInfo:
        """The server, as it calls itself."""
        name, version = self._server
        return RuntimeInfo(
            name=name,
            execution_provider=self._scheme,
            precision=self.manifest.precision(),
            num_threads=None,
            versions={name: version},
        )

    def encode_video(self, frames: Any) -> Float32Array:
        """As of every runtime, by the model that takes whole clips."""
        self.manifest.check_input("clip", frames)
        return self._ask("clip", frames)

    def _run(self, graph: GraphName, array: Array) -> Float32Array:
        return self._ask(graph, array)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _names(self) -> list[GraphOrClip]:
        return [*(name for name in self.manifest.graphs if name != "video"), "clip"]

    def _describe_server(self) -> tuple[str, str]:
        if not self._client.is_server_ready(headers=self._headers):
            raise InferenceServerException("it is not ready")
        told = self._client.get_server_metadata(headers=self._headers)
        if isinstance(told, dict):
            return str(told["name"]), str(told.get("version", ""))
        return str(told.name), str(told.version)

    def _rows_of(self, name: GraphOrClip) -> int:
        """Rows that a request may have; those of servers that do not say, as many as there are."""
        model = self._prefix + name
        if not self._call(
            lambda: self._client.is_model_ready(model, headers=self._headers), "be asked"
        ):
            raise RuntimeUnavailableError(
                f"The server at {self._url} has no model {model!r} that is ready; give it the "
                "repository of this bundle, or the prefix that its models have with --prefix."
            )
        try:
            config = self._client.get_model_config(model, headers=self._headers)
        except _FOREIGN_ERRORS:  # an extension of the protocol, which KServe's servers lack
            return 0
        if not isinstance(config, dict):
            return int(config.config.max_batch_size)
        return int(config.get("max_batch_size", 0))

    def _ask(self, name: GraphOrClip, array: Array) -> Float32Array:
        rows = self._rows[name] or len(array)
        parts = [
            self._ask_once(name, array[start : start + rows])
            for start in range(0, len(array), rows)
        ]
        return np.concatenate(parts)

    def _ask_once(self, name: GraphOrClip, array: Array) -> Float32Array:
        spec, output = self.manifest.input_spec(name), self.manifest.output_spec(name)
        tensor = self._api.InferInput(spec.name, list(array.shape), _DATATYPES[spec.dtype])
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        try:
            result = self._client.infer(self._prefix + name, [tensor], headers=self._headers)
            found = result.as_numpy(output.name)
        except _FOREIGN_ERRORS as exc:
            raise InferenceError(f"{self._url} failed in {name}: {exc}") from exc
        if found is None:
            raise InferenceError(f"{self._url} gave no {output.name} of {name}.")
        return np.asarray(found, np.float32)

    def _call(self, ask: Callable[[], Any], what: str) -> Any:
        try:
            return ask()
        except _FOREIGN_ERRORS as exc:
            raise RuntimeUnavailableError(
                f"The server at {self._url} cannot {what} ({exc}); start it, or give the address "
                "of one that speaks the inference protocol."
            ) from exc
