"""Preparation on a Ray cluster of several nodes, of which one is killed half-way."""

import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from nestcli.errors import DataError, MissingDependencyError
from nestcli.jobs.pool import Died, local_pool
from nestcli.prepare.pipeline import PrepareOptions, prepare

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def cluster(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the nodes need the functions below
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster, nodes
    cluster.shutdown()


def slow_square(number):
    import time

    time.sleep(0.02)
    return number * number


def fatal(number):
    import os

    if number == 3:
        os._exit(1)
    return number


def failing(number):
    raise ValueError("no")


def test_a_node_that_is_killed_changes_no_result(cluster):
    from nestcli.jobs.ray_pool import ray_pool

    whole, nodes = cluster
    with ray_pool(whole.address) as pool:
        assert pool.jobs == 3
        results = []
        for result in pool.in_order(slow_square, range(200)):
            results.append(result)
            if len(results) == 60:
                whole.remove_node(nodes[0], allow_graceful=False)
    with local_pool(2) as pool:
        assert results == list(pool.in_order(slow_square, range(200)))


def test_a_task_that_kills_its_process_costs_itself_only(cluster):
    from nestcli.jobs.ray_pool import ray_pool

    with ray_pool(cluster[0].address) as pool:
        results = list(pool.in_order(fatal, range(6)))
        assert [each for each in results if not isinstance(each, Died)] == [0, 1, 2, 4, 5]
        with pytest.raises(ValueError, match="no"):
            list(pool.in_order(failing, range(3)))


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes().replace(str(out).encode(), b"OUT")
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_a_preparation_on_a_cluster_that_loses_a_node_is_that_of_one_machine(cluster, tmp_path):
    for number in range(120):
        rng = np.random.default_rng(number)
        path = tmp_path / "in" / f"{number % 7}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, 0.1 * rng.standard_normal(rng.integers(8000, 40000)), 16000)
    (tmp_path / "in" / "broken.wav").write_text("<html>")
    whole, nodes = cluster
    done = 0

    def progress(count, total, doing=""):
        nonlocal done
        done += 1
        if done == 40:
            whole.remove_node(nodes[0], allow_graceful=False)
            time.sleep(0.5)

    common = {"val_fraction": 0.2, "segment": 1.0, "convert": True, "shards": 3}
    prepare([tmp_path / "in"], tmp_path / "cluster", PrepareOptions(**common, ray=whole.address), progress)
    assert done > 40
    prepare([tmp_path / "in"], tmp_path / "machine", PrepareOptions(**common, jobs=1))
    ours, theirs = contents(tmp_path / "cluster"), contents(tmp_path / "machine")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:1", "nothing responds there"), ("nowhere", "give HOST:PORT"), ("a:b", "give HOST")],
)
def test_a_cluster_that_is_not_there_is_said_soon(address, message):
    pytest.importorskip("ray")
    from nestcli.jobs.ray_pool import ray_pool

    with pytest.raises(DataError, match=message), ray_pool(address):
        pass


def test_without_ray_the_remedy_is_named(monkeypatch):
    import sys

    from nestcli.jobs.ray_pool import ray_pool

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"nestcli\[ray\]"), ray_pool("local"):
        pass
