"""The service against its own OpenAPI, with 200 requests at once, and killed in the middle."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from _tiny import ROOT, copy_bundle, tiny_base_folder, write_instance
from PIL import Image

from mifo.jobs.store import JobStore
from mifo.jobs.worker import LIST

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")
KEY = "0123456789abcdef0123"


# --- against its own description ------------------------------------------------------------------


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """No worker runs: jobs wait."""
    from mifo.serve.service import Limits, make_service

    place = tmp_path_factory.mktemp("service")
    copy_bundle(place / "Model_ours")
    service = make_service(place / "state", place / "Model_ours", place / "output",
                           limits=Limits(most_a_minute=10**6, most_queued=10**6))  # fmt: skip

    async def asked_here(scope: Any, receive: Any, send: Any) -> None:
        """The client of these tests calls every machine `testserver`."""
        headers = [(name, b"localhost" if name == b"host" else value) for name, value in scope.get("headers", ())]
        await service({**scope, "headers": headers}, receive, send)

    return asked_here


OPERATIONS = ("POST /synthesize", "POST /edit", "POST /learn", "GET /jobs/{number}", "DELETE /jobs/{number}",
              "GET /jobs/{number}/images/{index}", "GET /bundles", "GET /health")  # fmt: skip


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize("label", OPERATIONS)
def test_it_does_what_its_openapi_says(application: Any, label: str, mode: str) -> None:
    """Requests that fit the description, and such as do not, from schemathesis; with all of its checks on the answers."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode

    described = schemathesis.openapi.from_asgi("/openapi.json", application)
    operations = {each.ok().label: each.ok() for each in described.get_all_operations()}
    assert set(operations) == set(OPERATIONS)

    @given(case=operations[label].as_strategy(generation_mode=GenerationMode[mode]))
    @settings(max_examples=40, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    def ask(case: Any) -> None:
        case.call_and_validate()

    try:
        ask()
    except Unsatisfiable:
        assert mode == "NEGATIVE"  # nothing to get wrong


# --- requests ---------------------------------------------------------------------------------------


@pytest.fixture
def client(tmp_path: Path) -> Any:
    from fastapi.testclient import TestClient

    from mifo.serve.access import read_keys
    from mifo.serve.service import Limits, make_service

    keys = tmp_path / "keys.txt"
    keys.write_text(f"# who may ask\nada {KEY}\nbob fedcba9876543210fedc\n")
    copy_bundle(tmp_path / "Model_ours")
    service = make_service(tmp_path / "state", tmp_path / "Model_ours", tmp_path / "output", keys=read_keys(keys),
                           limits=Limits(most_queued=2, most_a_minute=12, most_bytes=100_000))  # fmt: skip
    return TestClient(service, headers={"X-API-Key": KEY})


def encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_key_is_needed_and_jobs_are_their_owners(client: Any) -> None:
    assert client.get("/bundles", headers={"X-API-Key": "wrong"}).status_code == 401
    assert client.get("/health", headers={"X-API-Key": "wrong"}).status_code == 200
    assert client.get("/bundles").json()[0]["tokens"] == ["<asset0>", "<asset1>"]
    number = client.post("/synthesize", json={"prompt": "a photo of <asset0>", "bundles": ["two_cups"]}).json()["id"]
    assert client.get(f"/jobs/{number}").json()["state"] == "queued"
    assert client.get(f"/jobs/{number}", headers={"X-API-Key": "fedcba9876543210fedc"}).status_code == 404
    assert client.delete(f"/jobs/{number}").json()["state"] == "cancelled"


def test_all_that_is_asked_for_arrives_in_the_job(client: Any, tmp_path: Path) -> None:
    ask = {"prompt": "a photo of <asset0> and <asset1>", "bundles": ["two_cups"], "boxes": [[0, 0, 0.5, 1], [0.5, 0, 1, 1]],
           "seed": 3, "num_images": 2, "steps": 7, "guidance_scale": 4.5, "negative_prompt": "blurry",
           "contrast_scale": 1.5}  # fmt: skip
    number = client.post("/synthesize", json=ask).json()["id"]
    entry = JobStore(tmp_path / "state" / LIST).get(number)
    assert entry is not None and entry.request == {"kind": "synthesize", **ask}


def test_queue_rate_and_size_have_limits(client: Any) -> None:
    ask = {"prompt": "a photo of a car"}
    assert [client.post("/synthesize", json=ask).status_code for _ in range(3)] == [202, 202, 429]
    assert client.post("/edit", json={**ask, "image": "A" * 200_000, "mask": "A"}).status_code == 413
    answers = [client.get("/bundles") for _ in range(12)]
    assert answers[-1].status_code == 429 and int(answers[-1].headers["Retry-After"]) > 0


@pytest.mark.parametrize(("ask", "status", "said"), [
    ({"prompt": "x", "bundles": ["lamp"]}, 404, "no bundle 'lamp'"),
    ({"prompt": "x", "bundles": ["../two_cups"]}, 404, "no bundle"),
    ({"prompt": "x", "boxes": [[0.5, 0, 0.5, 1]]}, 409, "no area"), ({"prompt": "x", "output": "/tmp/x"}, 422, "output"),
    ({"prompt": "x", "model": "/etc"}, 422, "model"), ({"prompt": ""}, 422, "prompt"),
])  # fmt: skip
def test_what_cannot_be_done_is_said(client: Any, ask: dict[str, Any], status: int, said: str) -> None:
    answer = client.post("/synthesize", json=ask)
    assert answer.status_code == status and said in answer.text


def test_pictures_that_are_none_leave_nothing(client: Any, tmp_path: Path) -> None:
    image = encoded(Image.new("RGB", (64, 64)))
    for ask, said in (({"image": "####", "mask": image}, "no base64"), ({"image": image, "mask": "QUJD"}, "mask cannot be used")):
        answer = client.post("/edit", json={"prompt": "a car", **ask})
        assert answer.status_code == 409 and said in answer.text and str(tmp_path) not in answer.text
    answer = client.post("/learn", json={"name": "../x", "image": image, "masks": [image]})
    assert answer.status_code == 409 and "cannot name a bundle" in answer.text
    answer = client.post("/learn", json={"name": "x", "image": image, "masks": [image], "words": ["a", "b"]})
    assert answer.status_code == 409 and "2 words" in answer.text
    assert not list((tmp_path / "state" / "photos").glob("*"))


def test_keys_that_are_none_are_refused(tmp_path: Path) -> None:
    from mifo.errors import InputError
    from mifo.serve.access import read_keys

    file = tmp_path / "keys.txt"
    for text, said in (("ada short\n", "at least 16"), ("# nobody\n", "no keys"), (f"a {KEY}\nb {KEY}\n", "is a's already")):
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            read_keys(file)


def test_a_key_is_read_whole(tmp_path: Path) -> None:
    from mifo.serve.access import read_keys, whose

    file = tmp_path / "keys.txt"
    file.write_text(f"# who may ask\nada {KEY}#more  # until May\n  # and\nbob {KEY}\n")
    keys = read_keys(file)
    assert [whose(keys, key) for key in (f"{KEY}#more", KEY, f"{KEY}#")] == ["ada", "bob", None]


def test_without_keys_no_website_gets_in_by_a_name_of_its_own(tmp_path: Path) -> None:
    """DNS rebinding: the browser takes the website's name for this machine, and says so in `Host`."""
    from fastapi.testclient import TestClient

    from mifo.serve.service import make_service

    def status(keys: dict[str, str], host: str) -> int:
        service = make_service(tmp_path / "state", tmp_path / "Model_ours", tmp_path / "output", keys=keys)
        return int(TestClient(service).get("/health", headers={"Host": host}).status_code)

    for host in ("127.0.0.1:8600", "localhost", "LOCALHOST:8600", "[::1]:8600"):
        assert status({}, host) == 200
    for host in ("evil.example", "evil.example:8600", "127.0.0.1.evil.example", "localhost@evil.example", "10.0.0.1:8600", ""):
        assert status({}, host) == 400
    assert status({hashlib.sha256(KEY.encode()).hexdigest(): "ada"}, "mifo.example") == 200  # a website has no key


# --- a real process ---------------------------------------------------------------------------------


class Service:
    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        arguments = ["serve", "--port", str(self.port), "--model-path", str(tiny_base_folder()), "--most-a-minute", "100000"]
        self.process = subprocess.Popen([sys.executable, str(ROOT / "cli.py"), *arguments], cwd=folder, env=environment,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        end = time.monotonic() + 90
        while time.monotonic() < end:
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the service did not start")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            content = answer.read()
        return content if path.count("/") > 2 else json.loads(content)

    def post(self, path: str, data: Any) -> tuple[int, Any]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode(),
                                         {"Content-Type": "application/json"})  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait(self, numbers: list[int], seconds: float = 240) -> list[dict[str, Any]]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = [self.get(f"/jobs/{number}") for number in numbers]
            if all(job["state"] in ("done", "failed", "cancelled") for job in found):
                return found
            time.sleep(1)
        raise AssertionError([job["state"] for job in found])

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("serving")
    copy_bundle(folder / "Model_ours")
    yield folder


def test_two_hundred_requests_at_once_lose_nothing_and_survive_a_kill(place: Path) -> None:
    service = Service(place)
    jobs = 50  # of the requests; each is drawn afterwards
    asks = [{"prompt": f"a photo of <asset{k % 2}>", "bundles": ["two_cups"], "seed": k, "steps": 1} for k in range(jobs)]
    with ThreadPoolExecutor(200) as pool:
        asked = [pool.submit(service.post, "/synthesize", ask) for ask in asks]
        looked = [pool.submit(service.get, "/bundles") for _ in range(200 - jobs)]
        answers = [each.result() for each in asked]
        assert all(each.result()[0]["name"] == "two_cups" for each in looked)
    assert {status for status, _ in answers} == {202}
    numbers = sorted(answer["id"] for _, answer in answers)
    assert len(set(numbers)) == jobs
    service.wait(numbers[:3])
    worker = _worker_of(service.process.pid)
    for pid in (service.process.pid, worker):
        os.kill(pid, signal.SIGKILL)
    service.process.wait()
    again = Service(place)
    try:
        ended = again.wait(numbers)
        assert {job["state"] for job in ended} == {"done"}
        assert again.get(ended[0]["images"][0]).startswith(b"\x89PNG")
        seeds = sorted(json.loads(p.read_text())["seed"] for p in (place / "output" / "two_cups").glob("*/synthesis.json"))
        assert sorted(set(seeds)) == list(range(jobs)) and len(seeds) <= jobs + 1  # the one that was killed
    finally:
        again.close()


def _worker_of(parent: int) -> int:
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
                line = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if int(fields[1]) == parent and b"mifo.jobs.worker" in line:
                return int(process.name)
    raise AssertionError("no worker")


def test_learning_and_editing_by_request(place: Path, tmp_path: Path) -> None:
    service = Service(place)
    try:
        instance = write_instance(tmp_path / "photo")
        picture, masks = Image.open(next(instance.glob("img.*"))), [Image.open(p) for p in sorted(instance.glob("mask*"))]
        photo, *drawn = map(encoded, (picture, *masks))
        status, learning = service.post("/learn", {"name": "cups", "image": photo, "masks": drawn})
        assert status == 202, learning
        status, editing = service.post("/edit", {"prompt": "a photo of a car", "image": photo, "mask": drawn[0], "steps": 2})
        assert status == 202, editing
        time.sleep(3)
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{service.port}/jobs/{learning['id']}", method="DELETE"))
        learned, edited = service.wait([learning["id"], editing["id"]])
        assert learned["state"] == "cancelled" and edited["state"] == "done" and len(edited["images"]) == 1
    finally:
        service.close()


def test_others_are_not_served_without_keys(tmp_path: Path) -> None:
    from _tiny import mifo

    result = mifo("serve", "--host", "0.0.0.0", "--folder", tmp_path, exit_code=2)
    assert "give --keys too" in result.stderr


def test_a_port_that_is_taken_is_said_before_anything_starts(tmp_path: Path) -> None:
    from _tiny import mifo

    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = mifo("serve", "--port", taken.getsockname()[1], "--folder", tmp_path, exit_code=2)
    assert "cannot be had" in result.stderr and "serves at" not in result.stdout


def test_a_failed_job_names_no_folder_of_the_machine(client: Any, tmp_path: Path) -> None:
    from mifo.jobs.store import FAILED, JobStore
    from mifo.jobs.worker import LIST

    number = client.post("/synthesize", json={"prompt": "a car"}).json()["id"]
    JobStore(tmp_path / "state" / LIST).finish(number, FAILED, error=f"{tmp_path}/Model_ours/desk is damaged; learn it again")
    assert client.get(f"/jobs/{number}").json()["error"] == "desk is damaged; learn it again"
