"""A real Ray cluster on this machine: the same bytes as in one process, also when a worker is killed in the middle.

A worker takes ten seconds to import its libraries, so there are few.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from _tiny import mifo, tiny_base_folder, tiny_bundle_folder

from mifo.errors import InputError

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Any:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    folder = tmp_path_factory.mktemp("cluster")
    shutil.copytree(tiny_bundle_folder(), folder / "Model_ours" / "desk")
    return folder


def jobs_of(count: int, steps: int = 3) -> list[Any]:
    from mifo.jobs.job import SynthesizeJob

    return [SynthesizeJob(f"a photo of <asset{k % 2}>", ("desk",), '[[0.1, 0.1, 0.9, 0.9]]', seed=k, steps=steps,
                          model=str(tiny_base_folder())) for k in range(count)]  # fmt: skip


def pictures(folder: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in folder.glob("[0-9]*/[0-9]*.png")}


@pytest.fixture(scope="module")
def in_one_process(place: Path) -> dict[str, bytes]:
    from mifo.jobs.batch import do_all, items_of
    from mifo.jobs.workshop import Workshop

    items = items_of(jobs_of(8), place / "one", place / "Model_ours")
    assert [o.state for o in do_all(Workshop(place / "Model_ours"), items)] == ["done"] * 8
    return pictures(place / "one")


def run_on(place: Path, items: list[Any], bundles: str, workers: int = 1) -> list[Any]:
    from mifo.cluster.run import Workers, run

    return list(run(items, Workers(workers), bundles))


def test_a_killed_worker_and_a_node_that_leaves_lose_nothing(cluster: Any, place: Path,
                                                             in_one_process: dict[str, bytes]) -> None:  # fmt: skip
    """One run of two workers: a node joins, a worker is killed once a job is done, and the node leaves again."""
    from mifo.jobs.batch import items_of

    items = items_of(jobs_of(8), place / "killed", place / "Model_ours")
    node, victims = cluster.add_node(num_cpus=1), []

    def wait_for(done: int) -> None:
        while len(list((place / "killed").glob("*/synthesis.json"))) < done:
            time.sleep(0.05)

    def disturb() -> None:
        wait_for(1)
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                try:
                    line = (process / "cmdline").read_bytes()
                except OSError:
                    continue
                if line.startswith(b"ray::Worker"):
                    os.kill(int(process.name), signal.SIGKILL)
                    victims.append(int(process.name))
                    break
        wait_for(3)
        cluster.remove_node(node)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    outcomes = run_on(place, items, str(place / "Model_ours"), workers=2)
    disturber.join()
    assert len(victims) == 1
    assert sorted(o.index for o in outcomes) == list(range(8)) and {o.state for o in outcomes} <= {"done", "there"}
    assert pictures(place / "killed") == in_one_process


def test_addresses_hold_bundles_and_results(cluster: Any, place: Path, in_one_process: dict[str, bytes]) -> None:
    """Any fsspec address; here file://, which every machine has."""
    from mifo.jobs.batch import items_of

    items = items_of(jobs_of(3), f"file://{place}/remote", place / "Model_ours")
    outcomes = run_on(place, items, f"file://{place}/Model_ours")
    assert [o.state for o in outcomes] == ["done"] * 3
    found = pictures(place / "remote")
    assert found and all(in_one_process[name] == content for name, content in found.items())
    assert {o.state for o in run_on(place, items, f"file://{place}/Model_ours")} == {"there"}


def test_what_is_half_copied_is_not_there(place: Path, tmp_path: Path) -> None:
    from mifo.cluster.storage import fetch, is_whole, put
    from mifo.io.manifest import MANIFEST

    source, copy = place / "Model_ours" / "desk", f"file://{tmp_path}/desk"
    put(source, copy)
    assert is_whole(copy)
    with pytest.raises(InputError, match="there already"):
        put(source, copy)
    fetch(copy, tmp_path / "back")
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == sorted(p.name for p in source.iterdir())
    (tmp_path / "desk" / "bundle.json").write_text("{}")
    with pytest.raises(InputError, match="not as it was written"):
        fetch(copy, tmp_path / "changed")
    assert not (tmp_path / "changed").exists()
    (tmp_path / "desk" / MANIFEST).unlink()
    assert not is_whole(copy)
    with pytest.raises(InputError, match="still being written"):
        fetch(copy, tmp_path / "half")


def test_the_command_says_which_jobs_failed(cluster: Any, place: Path, tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    good, bad = jobs_of(1)[0].to_json(), {**jobs_of(1)[0].to_json(), "bundles": ["lamp"]}
    file.write_text("\n".join(map(json.dumps, (good, bad))))
    done = mifo("cluster", "synthesize", file, "--output-path", tmp_path / "out", "--output-dir", place / "Model_ours",
                "--workers", 1, "--json", exit_code=2)  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["item"]: line["state"] for line in lines} == {0: "done", 1: "failed"}
    assert "there is no learned bundle 'lamp'" in done.stderr
