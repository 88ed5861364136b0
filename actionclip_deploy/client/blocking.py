"""`Client`: asks a server and waits for its answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from actionclip_deploy.client import operations
from actionclip_deploy.client.answers import (
    BankState,
    RefusedVideo,
    ServerEmbeddings,
    ServerPrediction,
)
from actionclip_deploy.client.exchange import Attempt, Outcome, Result, Steps
from actionclip_deploy.client.operations import OnProgress
from actionclip_deploy.client.settings import (
    DEFAULT_RETRIES,
    DEFAULT_TIMEOUT_SECONDS,
    make_connection,
    make_headers,
)
from actionclip_deploy.client.uploads import Videos
from actionclip_deploy.labels import LabelBankDiff
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.sampling import Views

if TYPE_CHECKING:
    import httpx


class Client:
    """Asks a server of `actionclip serve`; may be used from several threads.

        with Client("http://127.0.0.1:8000") as client:
            (result,) = client.classify("video.mp4", "mine")
            print(result.predictions[0])

    Every method raises `RequestRefusedError` with the server's sentence where the server does not
    do what is asked, and `RuntimeUnavailableError` where no server answers. A server that is full
    or starting is asked again after the time that it says, and so is one whose connection failed,
    where that does no harm; files are streamed, and read again from their beginning.

    Args:
        base_url: Address of the server, such as http://127.0.0.1:8000.
        api_key: One of the server's keys; None where it has none.
        timeout_seconds: Of one method with its retries.
        max_retries: Attempts after the first one.
        transport: What carries requests instead of the network, for tests.

    Raises:
        MissingExtraError: If httpx is not installed.
        ValueError: If an argument is not allowed.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        max_retries: int = DEFAULT_RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        from actionclip_deploy.client import sending

        self._connection = make_connection(base_url, timeout_seconds, max_retries)
        self._send = sending.send
        self._http = sending.open_client(base_url, make_headers(api_key), transport)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def classify(
        self,
        videos: Videos,
        labels: str | Sequence[str],
        *,
        top_k: int = 5,
        views: Views | str = "1x1",
        templates: Sequence[str] | None = None,
        multi_label: bool = False,
        per_template: bool = False,
        timeout_seconds: float | None = None,
    ) -> tuple[ServerPrediction | RefusedVideo, ...]:
        """Rank labels for videos.

        Args:
            videos: One or a list of them: a path, bytes, a file opened with "rb", frames as uint8
                RGB of shape (N, H, W, 3), or embeddings of one video's views as float32 of norm
                1, shape (V, D) or (D,). A path that ends in .npy is such an array.
            labels: Name of a label bank, or a list of labels.
            top_k: Labels of a result.
            views: Clips x crops per video, such as "10x3".
            templates: Sentences with {} for the label, for a list of labels; of a bank, those of
                its templates to use; None for all.
            multi_label: Whether each label is scored by itself.
            per_template: Whether to say what each template alone would choose.
            timeout_seconds: Of this call, for the server too; None takes the client's, and the
                server its own limit.

        Returns:
            A result for each video, in their order. Of several, one that the server cannot do is
            a `RefusedVideo`; a single one raises.

        Raises:
            RequestRefusedError: If the server does not do it.
            RuntimeUnavailableError: If no server answers in time.
            VideoError: If a file cannot be read.
        """
        return self._run(
            operations.classify(
                self._connection,
                videos,
                labels,
                top_k=top_k,
                views=views,
                templates=templates,
                multi_label=multi_label,
                per_template=per_template,
                timeout_seconds=timeout_seconds,
            )
        )

    def embed(
        self,
        videos: Videos,
        *,
        views: Views | str = "1x1",
        timeout_seconds: float | None = None,
    ) -> tuple[ServerEmbeddings | RefusedVideo, ...]:
        """Embed videos; arguments and errors are those of `classify`."""
        return self._run(
            operations.embed(self._connection, videos, views=views, timeout_seconds=timeout_seconds)
        )

    def embed_texts(
        self, texts: Sequence[str], *, timeout_seconds: float | None = None
    ) -> Float32Array:
        """Embed prompts as they are: unit norm, float32, shape (M, D)."""
        return self._run(
            operations.embed_texts(self._connection, texts, timeout_seconds=timeout_seconds)
        )

    def list_banks(self) -> tuple[BankState, ...]:
        """All label banks of the server, by name, without their labels."""
        return self._run(operations.list_banks(self._connection))

    def get_bank(self, name: str) -> BankState:
        """One label bank, with its labels, its last versions and its build."""
        return self._run(operations.get_bank(self._connection, name))

    def put_bank(
        self,
        name: str,
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        *,
        wait: bool = True,
        on_progress: OnProgress | None = None,
        timeout_seconds: float = 600.0,
    ) -> BankState:
        """Build a label bank on the server, or a new version of it.

        Args:
            name: Of the bank.
            labels: C labels.
            templates: K sentences with {} for the label; None takes the bundle's.
            wait: Whether to wait until it is active; without, `get_bank` tells how far it is.
            on_progress: Told while waiting of prompts that are embedded, and how many there are.
            timeout_seconds: How long to wait.

        Raises:
            LabelBankError: If the build fails or is ended.
            RequestRefusedError: If the server does not begin it.
            RuntimeUnavailableError: If it takes longer, or no server answers.
        """
        return self._run(
            operations.put_bank(
                self._connection,
                name,
                labels,
                templates,
                wait=wait,
                on_progress=on_progress,
                timeout_seconds=timeout_seconds,
            )
        )

    def delete_bank(self, name: str) -> None:
        """Remove a label bank from the server, or end its build."""
        self._run(operations.delete_bank(self._connection, name))

    def diff(self, name: str, old: int, new: int | None = None) -> LabelBankDiff:
        """What changed from one version of a bank to another; None is the active one."""
        return self._run(operations.diff(self._connection, name, old, new))

    def info(self) -> dict[str, Any]:
        """What runs: version, bundle, model, runtime, batching, banks, limits."""
        return self._run(operations.info(self._connection))

    def is_ready(self) -> bool:
        """Whether there is a server that takes requests at this moment."""
        return self._run(operations.is_ready(self._connection))

    def wait_until_ready(self, timeout_seconds: float = 60.0) -> None:
        """Wait until the server takes requests.

        Raises:
            RuntimeUnavailableError: If it takes longer; says why.
        """
        self._run(operations.wait_until_ready(self._connection, timeout_seconds))

    def _run(self, steps: Steps[Result]) -> Result:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            if isinstance(step, Attempt):
                outcome = self._send(self._http, step)
            else:
                time.sleep(step.seconds)
                outcome = None
