"""Beyond one machine: many videos on a cluster, and bundles for the servers that clusters run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from actionclip_deploy.bundle import Bundle

if TYPE_CHECKING:
    from actionclip_deploy.scale.batch import BatchSettings

__all__ = ["score"]


def score(
    dataset: Any,
    bundle: str | Path | Bundle,
    labels: Any = None,
    *,
    settings: BatchSettings | None = None,
    runtime: str = "auto",
    device: str | None = None,
    num_actors: int | None = None,
) -> Any:
    """Score the videos of a Ray dataset, on its cluster.

    Args:
        dataset: With a column `uri`: paths that each machine knows, or addresses such as
            s3://bucket/video.mp4. Columns `etag` and `size` spare a question to the storage; all
            others are kept.
        bundle: The model.
        labels: As `ActionCLIP` takes them; None for the only bank of the bundle.
        settings: Views, labels of a row, and limits of a video.
        runtime: What executes the graphs.
        device: `cpu` or `cuda`; None for GPUs where the cluster has some.
        num_actors: Most processes that encode; None for what the cluster has room for now.

    Returns:
        A Ray dataset with a row for each video, also for one that failed: see
        `result_folder.result_schema`. Ray may compute a video twice, and gives its row once.

    Raises:
        ClusterError: If there is no cluster.
        BundleError: If the bundle or its labels cannot be used.
        MissingExtraError: If Ray is not installed.
    """
    from actionclip_deploy.scale import ray_data

    return ray_data.score_dataset(
        dataset,
        bundle if isinstance(bundle, Bundle) else Bundle.open(bundle),
        labels,
        settings,
        runtime={"name": runtime, "device": device},
        num_actors=num_actors,
    )
