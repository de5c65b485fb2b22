"""The same results from this process, several processes and a real Ray cluster of two machines."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from packing_toys import captions, cost, page

from data_packing.document import DocumentError
from data_packing.executors import Executor
from data_packing.index import build_index
from data_packing.info import survey
from data_packing.lint import lint
from data_packing.sample import Cost
from data_packing.scan import find_sources
from data_packing.sharding import write_shards

HERE = Path(__file__).parent


def test_an_unknown_executor_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown executor 'spark'; valid: local, ray"):
        Executor("spark")


KILLED = """
import os, signal
from test_executors import name_and_wait
from data_packing.executors import Executor
if __name__ == "__main__":
    for process in Executor("local", 2).each(name_and_wait, range(9)):
        print(process, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def name_and_wait(thing: int) -> int:
    """Give the first result at once, the others late."""
    time.sleep(0 if thing == 0 else 60)
    return os.getpid()


def test_processes_leave_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    run = subprocess.run(
        [sys.executable, str(tmp_path / "killed.py")],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
    worker = int(run.stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two nodes with one processor each, as on two machines."""
    pytest.importorskip("ray")
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        paths = [str(HERE), str(HERE.parents[1])]  # what a cluster has installed
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        nodes = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, log_to_driver=False)
        assert len(ray.nodes()) == 2
        yield
        ray.shutdown()
        nodes.shutdown()


def where(thing: int) -> tuple[int, str]:
    import ray

    return thing, ray.get_runtime_context().get_node_id()


def refuse_long(words: int, document: object) -> Cost:
    raise DocumentError(f"longer than {words} words")


@pytest.mark.timeout(600)
def test_a_cluster_indexes_and_checks_like_this_process(cluster: None, tmp_path: Path) -> None:
    write_shards([*captions(20), page([3, 5], images=True)], tmp_path, "toys", 3)
    sources = find_sources([str(tmp_path)])
    paths = sources["toys"]
    on_ray = Executor("ray")
    index = build_index(paths, cost, "f", on_ray)
    kept = {path.name for path in tmp_path.glob("*.tokens-*.npz")}
    assert len(kept) == len(paths) == 7
    for path in tmp_path.glob("*.tokens-*.npz"):
        path.unlink()
    assert build_index(paths, cost, "f").fingerprint == index.fingerprint
    refused = build_index(paths, partial(refuse_long, 2), "g", on_ray)
    assert refused.refused_documents == 21
    there, here = (survey(sources, executor=executor)["toys"] for executor in (on_ray, Executor()))
    assert there.to_json() == here.to_json()
    paths[3].write_bytes(paths[3].read_bytes()[:-600])
    found = lint(sources, executor=on_ray)
    assert found == lint(sources)
    assert found.defects


@pytest.mark.timeout(600)
def test_both_machines_work_and_the_order_stays(cluster: None) -> None:
    results = list(Executor("ray").each(where, range(12)))
    assert [thing for thing, _ in results] == list(range(12))
    assert len({node for _, node in results}) == 2
    assert not [one.name for one in threading.enumerate() if "usage" in one.name]


def fail(thing: int) -> int:
    if thing == 3:
        raise ValueError("shard three is damaged")
    return thing


@pytest.mark.timeout(600)
def test_an_error_on_the_cluster_is_the_error_here(cluster: None) -> None:
    with pytest.raises(ValueError, match="^shard three is damaged$"):
        list(Executor("ray").each(fail, range(5)))
