"""A Ray cluster of several nodes on this machine, and a run on it, in one process.

    python ray_program.py NODES KILLED_AFTER_ROWS ARGUMENT...         of the command line
    python ray_program.py NODES 0 score BUNDLE LIST LABELS OUTPUT     of `scale.score`

Each node has one core. KILLED_AFTER_ROWS rows, or videos of an archive, after its start, the last
node is killed; 0 for none. It runs beside the tests, since Ray's own warnings are not ours to mend.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # else the driver looks for the head at another address
    RAY_USAGE_STATS_ENABLED="0",
    RAY_health_check_initial_delay_ms="1000",
    RAY_health_check_period_ms="1000",
    RAY_health_check_failure_threshold="3",
)

import ray
import ray.data
from ray.cluster_utils import Cluster

from actionclip_deploy.archive import ArchiveWriter
from actionclip_deploy.cli import app
from actionclip_deploy.scale import score
from actionclip_deploy.scale.result_folder import ResultFolder

STORE_BYTES = 120 * 2**20


def main() -> None:
    num_nodes, killed_after = map(int, sys.argv[1:3])
    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    others = [cluster.add_node(**node) for _ in range(num_nodes - 1)]
    try:
        if sys.argv[3] == "score":
            code = write_scores(cluster, *sys.argv[4:])
        else:
            code = run_command(cluster, others, killed_after)
    finally:
        ray.shutdown()
        cluster.shutdown()
    sys.exit(code)


def write_scores(cluster: Cluster, bundle: str, videos: str, labels: str, output: str) -> int:
    """What a user's own program does with a list; the cluster is found by RAY_ADDRESS."""
    os.environ["RAY_ADDRESS"] = cluster.address
    listed = ray.data.read_parquet(videos)
    rows = score(listed, bundle, Path(labels), runtime="onnxruntime").materialize()
    rows.write_parquet(output)
    print(rows.stats())
    print("progress bars:", ray.data.DataContext.get_current().enable_progress_bars)
    return 0


def run_command(cluster: Cluster, others: Sequence[Any], killed_after: int) -> int:
    """The command line; a node is killed on the way."""
    add, is_killed = ResultFolder.add, not killed_after

    def add_and_kill(self: ResultFolder, rows: Any) -> int:
        nonlocal is_killed
        count = add(self, rows)
        if not is_killed and self.num_now >= killed_after:
            is_killed = True
            cluster.remove_node(others[-1], allow_graceful=False)
            print("a node was killed", file=sys.stderr, flush=True)
        return count

    put = ArchiveWriter.put

    def put_and_kill(self: ArchiveWriter, *args: Any) -> None:
        nonlocal is_killed, num_put
        put(self, *args)
        num_put += 1
        if not is_killed and num_put >= killed_after:
            is_killed = True
            cluster.remove_node(others[-1], allow_graceful=False)
            print("a node was killed", file=sys.stderr, flush=True)

    num_put = 0
    ResultFolder.add = add_and_kill  # type: ignore[method-assign]
    ArchiveWriter.put = put_and_kill  # type: ignore[method-assign]
    words = [*sys.argv[3:], "--engine", "ray", "--address", cluster.address]
    return app(words, standalone_mode=False) or 0


if __name__ == "__main__":
    main()
