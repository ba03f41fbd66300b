"""The page, end to end: a real server, a real worker, a real browser. The pictures of docs/web are this test's screenshots."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _learned import put_cars
from PIL import Image

import mifo
from mifo.boxes import Box
from mifo.toybox.judge import judge_images, load_judge
from mifo.toybox.scoring import best_in_box

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]
ROOT = Path(mifo.__file__).parents[1]
PHOTO = ROOT / "example" / "toy_car" / "img.png"
ARGUMENTS = ["--no-sandbox", "--disable-quic", "--disable-background-networking"]
#: Where the photo's cars are, as fractions, and what they are.
CARS = ((0.27, 0.28, "red car"), (0.72, 0.52, "blue car"), (0.32, 0.83, "green car"))
SHOTS = os.environ.get("MIFO_SCREENSHOTS")  # a folder: the screenshots and the film are written there, of whole learning
STEPS = {"learn-steps1": "0", "learn-steps2": "0", "place-steps": "0"} if SHOTS else {
    "learn-steps1": "20", "learn-steps2": "10", "place-steps": "12"}  # fmt: skip  # 0: the preset's
FRAMES: list[bytes] = []
FILM_WIDTH, FILM_SECONDS = 560, 1.2
WAIT = 600_000  # milliseconds that learning may take on a busy machine
#: What reaches beyond a narrow page, for the message.
TOO_WIDE = """[...document.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > 391)
    .map(e => e.tagName + '#' + e.id + '.' + e.className).slice(0, 12)"""


class Server:
    """`mifo web` in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, str(ROOT / "cli.py"), "web"], cwd=folder, env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
        assert self.process.stdout
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line
        self.address = found[0]

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)  # a shell's background ignores SIGINT, and what it starts inherits that
        self.process.wait(150)  # the worker ends its step first


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("site"))
    yield made
    made.close()
    if SHOTS and FRAMES:
        save_film(Path(SHOTS) / "film.gif")


def save_film(path: Path) -> None:
    """A newcomer's path from a photo to its things in a new picture; at most 3 MB, for the README."""
    import io

    images = [Image.open(io.BytesIO(frame)).convert("RGB") for frame in FRAMES]
    size = FILM_WIDTH, round(images[0].height * FILM_WIDTH / images[0].width)
    small = [image.resize(size, Image.Resampling.LANCZOS).quantize(64, dither=Image.Dither.NONE) for image in images]
    small[0].save(path, save_all=True, append_images=small[1:], duration=int(FILM_SECONDS * 1000), loop=0, optimize=True)
    assert path.stat().st_size <= 3_000_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


class Person:
    """Who uses the page; every request to another host is written down."""

    def __init__(self, browser: Any, server: Server, width: int = 1000, height: int = 1200):
        self.context = browser.new_context(viewport={"width": width, "height": height})
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.elsewhere: list[str] = []
        self.page.on("request", self._note)
        self.server = server
        self.page.goto(server.address)
        self.page.wait_for_selector("#learn-photo input[type=file]", state="attached")

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.server.address, "data:", "blob:", self.server.address.replace("http", "ws"))):
            self.elsewhere.append(request.url)

    def shot(self, name: str) -> None:
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)

    def film(self) -> None:
        """One frame: what is in view now."""
        if SHOTS:
            FRAMES.append(self.page.screenshot())

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab, exact=True).click()

    def fill(self, name: str, value: str) -> None:
        field = self.page.locator(f"#{name} textarea, #{name} input").first
        for _ in range(10):  # on a busy machine a field that has just been shown is drawn once more, with what it had
            field.fill(value)
            field.blur()
            self.page.wait_for_timeout(200)
            if field.input_value() == value:
                return
        raise AssertionError(f"#{name} holds {field.input_value()!r}, not {value!r}")

    def settings(self) -> None:
        for each in self.page.get_by_role("button", name="Settings").all():
            if each.is_visible():
                each.click()

    def drop(self, name: str, path: Path) -> None:
        self.page.set_input_files(f"#{name} input[type=file]", str(path))

    def at(self, canvas: str, x: float, y: float) -> tuple[float, float]:
        stage = self.page.locator(f"#{canvas} .mifo-stage")
        stage.scroll_into_view_if_needed()
        box = stage.bounding_box()
        return box["x"] + box["width"] * x, box["y"] + box["height"] * y

    def drag(self, canvas: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        from_x, from_y = self.at(canvas, *start)
        to_x, to_y = self.at(canvas, *end)
        self.page.mouse.move(from_x, from_y)
        self.page.mouse.down()
        self.page.mouse.move(to_x, to_y, steps=6)
        self.page.mouse.up()

    def boxes(self, canvas: str) -> list[str]:
        return [str(each.get_attribute("aria-label")) for each in self.page.locator(f"#{canvas} .mifo-box").all()]

    def wait_boxes(self, canvas: str, count: int) -> None:
        self.page.wait_for_function(f"document.querySelectorAll('#{canvas} .mifo-box').length == {count}", timeout=WAIT)

    def wait_photo(self, canvas: str = "learn-canvas") -> None:
        script = f"(document.querySelector('#{canvas} .mifo-stage') || {{style: {{}}}}).style.backgroundImage"
        self.page.wait_for_function(script, timeout=WAIT)

    def wait_status(self, text: str) -> None:
        self.page.wait_for_function(
            "text => (document.querySelector('#job-status')?.innerText ?? '').includes(text)", arg=text, timeout=WAIT
        )

    def wait_table(self, text: str) -> None:
        script = "text => (document.querySelector('#library-table')?.innerText ?? '').includes(text)"
        self.page.wait_for_function(script, arg=text)

    def toast(self) -> str:
        self.page.wait_for_selector(".toast-body")
        text = str(self.page.locator(".toast-body").first.inner_text())
        self.page.locator(".toast-body .toast-close").first.click()
        self.page.wait_for_selector(".toast-body", state="detached")  # else the next one would be this one, on its way out
        return text

    def mark_cars(self, filmed: bool = False) -> None:
        self.drop("learn-photo", PHOTO)
        self.wait_photo()
        if filmed:
            self.film()
        for count, (x, y, _) in enumerate(CARS):
            self.page.mouse.click(*self.at("learn-canvas", x, y))
            self.wait_boxes("learn-canvas", count + 1)
            if filmed:
                self.film()
        for k, (_, _, words) in enumerate(CARS):
            self.fill(f"word-{k}", words)

    def close(self) -> None:
        self.context.close()


@pytest.fixture(scope="module")
def learned(server: Server, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """The server with a bundle that somebody has made on the page: photo, three clicks, three words, Learn, in few steps. Then
    with one in its place that has learned the same cars in full."""
    person = Person(browser, server)
    try:
        person.film()
        person.mark_cars(filmed=True)
        person.page.locator("#word-2 textarea, #word-2 input").first.scroll_into_view_if_needed()
        person.film()
        person.shot("learn")
        person.fill("learn-name", "cars")
        person.settings()
        for name in ("learn-steps1", "learn-steps2"):
            person.fill(name, STEPS[name])
        person.page.click("#learn-start")
        person.wait_status("phase 1")
        person.page.evaluate("window.scrollTo(0, 0)")
        person.film()
        person.shot("learning")
        person.page.reload()  # in the middle of the job
        person.wait_status("Learning cars")
        person.wait_boxes("learn-canvas", 3)  # and the photo's masks are there again
        assert [person.page.input_value(f"#word-{k} textarea, #word-{k} input") for k in range(3)] == [w for _, _, w in CARS]
        person.wait_status("done in")
        person.film()
        assert person.elsewhere == []
    finally:
        person.close()
    if not SHOTS:
        put_cars(tmp_path_factory, server.folder / "Model_ours")
    return server


def test_masks_by_clicks_are_those_of_the_things(learned: Server) -> None:
    import numpy as np

    for k in range(3):
        made, true = (np.asarray(Image.open(folder / f"mask{k}.png").convert("L")) > 127
                      for folder in (learned.folder / "my_photos" / "cars", PHOTO.parent))  # fmt: skip
        assert (made & true).sum() / (made | true).sum() > 0.9  # segment's own bar on drawn scenes
    assert (learned.folder / "my_photos" / "cars" / "words.txt").read_text().split("\n")[:3] == [w for _, _, w in CARS]


def test_assets_are_placed_by_dragging_and_edited_into_a_picture(learned: Server, browser: Any) -> None:
    person = Person(browser, learned)
    try:
        person.open("Place")
        person.wait_boxes("place-canvas", 2)
        shelf, photo = (person.page.locator(f"#place-shelf{inside}").first.bounding_box() for inside in ("", " img"))
        assert shelf["y"] < photo["y"] and photo["y"] + photo["height"] < shelf["y"] + shelf["height"]  # the whole photo is seen
        person.at("place-canvas", 0.5, 0.5)
        person.film()
        person.page.click("#chip-2")
        person.wait_boxes("place-canvas", 3)
        person.film()
        assert person.page.input_value("#place-prompt textarea").endswith("and <asset2>")
        before = person.boxes("place-canvas")
        person.drag("place-canvas", (0.25, 0.25), (0.25, 0.35))
        person.page.wait_for_timeout(500)
        moved = person.boxes("place-canvas")
        person.film()
        assert moved[0] != before[0] and moved[1:] == before[1:]
        person.page.locator("#place-canvas .mifo-box").nth(1).focus()
        for _ in range(3):
            person.page.keyboard.press("ArrowDown")
        person.page.keyboard.press("Shift+ArrowRight")
        person.page.wait_for_timeout(500)
        assert _edges(person.boxes("place-canvas")[1]) == [a + b for a, b in zip(_edges(moved[1]), (0, 3, 1, 3), strict=True)]
        person.settings()
        person.fill("place-steps", STEPS["place-steps"])
        person.fill("place-contrast", "0" if SHOTS else "0.5")
        person.fill("place-count", "2")
        person.page.click("#place-draw")
        person.page.wait_for_selector("#place-gallery img", timeout=WAIT)
        person.page.locator("#place-gallery img").first.click()
        person.page.wait_for_selector("#place-send:not([disabled])")
        person.page.locator("#place-gallery").scroll_into_view_if_needed()
        person.film()
        person.shot("place")
        picture = learned.folder / "output" / "cars" / "0001" / "000000.png"
        recipe = Image.open(picture).text["mifo"]  # type: ignore[attr-defined]
        assert '"<asset2>": [' in recipe and (SHOTS or ('"steps": 12' in recipe and '"contrast_scale": 0.5' in recipe))
        _check_placed(picture.parent)

        person.page.click("#place-send")
        person.page.wait_for_selector("#edit-painter canvas", timeout=WAIT)
        person.page.wait_for_timeout(1500)
        canvas = person.page.locator("#edit-painter canvas").first.bounding_box()
        x, y = canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2
        for shift in (-20, 0, 20):  # few moves: without a GPU the editor takes seconds for each
            person.page.mouse.move(x - 30, y + shift)
            person.page.mouse.down()
            person.page.mouse.move(x + 30, y + shift, steps=2)
            person.page.mouse.up()
        person.page.locator("#edit-bundle input").click()
        person.page.get_by_role("option", name=re.compile("^cars")).click()
        person.fill("edit-prompt", "a photo of <asset1>")
        person.fill("edit-steps", "8")
        person.page.wait_for_timeout(500)
        person.page.click("#edit-draw")
        person.page.wait_for_selector("#edit-gallery img", timeout=WAIT)
        person.shot("edit")
        _check_edit(learned.folder)
        assert person.elsewhere == []
    finally:
        person.close()


def _check_placed(folder: Path) -> None:
    """By the judge: of the six boxes of two pictures, more than half hold the car that was asked there; by chance a third do."""
    truth = json.loads((PHOTO.parent / "truth.json").read_text())
    judge, right = load_judge(), 0
    for picture in (Image.open(folder / f"{k:06d}.png") for k in range(2)):
        boxes = json.loads(picture.text["mifo"])["boxes"]  # type: ignore[attr-defined]
        [verdict] = judge_images(judge, [picture.convert("RGB")])
        for k in range(3):
            found, _ = best_in_box(verdict, Box(*boxes[f"<asset{k}>"]))
            right += found is not None and found.main == truth["things"][k]["main"]
    assert right > 3


def _edges(label: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", label.split(": ")[1])]


def _check_edit(folder: Path) -> None:
    """Something changed, and nothing outside of what was painted."""
    import numpy as np

    job = max((folder / "output" / "cars").glob("*/edit.json"))
    edited = np.asarray(Image.open(job.parent / "edit00.png").convert("RGB")).astype(int)
    uploads = sorted((folder / ".mifo_web" / "uploads").iterdir(), key=os.path.getmtime)
    mask = np.asarray(Image.open(next(p for p in uploads if p.name.endswith("-mask.png"))).convert("L")) > 127
    source = np.asarray(Image.open(next(p for p in uploads if not p.name.endswith("-mask.png"))).convert("RGB")).astype(int)
    changed = (edited != source).any(-1)
    assert changed.any() and not (changed & ~mask).any() and 0.02 < mask.mean() < 0.6
    assert json.loads(job.read_text())["prompt"] == "a photo of <asset1>"


def test_the_library_evaluates_exports_renames_and_throws_away(learned: Server, browser: Any) -> None:
    shutil.copytree(learned.folder / "Model_ours" / "cars", learned.folder / "Model_ours" / "second")
    person = Person(browser, learned)
    try:
        person.open("Library")
        person.wait_table("second")
        person.shot("library")
        person.page.locator("#library-bundle input").click()
        person.page.get_by_role("option", name=re.compile("^second")).click()
        person.page.click("#library-export")
        person.page.wait_for_selector("#library-exported >> text=Written")
        assert list((learned.folder / "output" / "second" / "export").glob("*/pytorch_lora_weights.safetensors"))
        person.fill("library-new-name", "../third")
        person.page.click("#library-rename")
        assert "cannot name a bundle" in person.toast()
        person.fill("library-new-name", "third")
        person.page.click("#library-rename")
        person.wait_table("third")
        assert (learned.folder / "Model_ours" / "third" / "bundle.json").is_file()
        person.page.click("#library-delete")
        person.page.wait_for_function("document.querySelector('#library-table')?.innerText.includes('third') === false")
        assert list((learned.folder / "Model_ours" / ".trash").glob("third-*/bundle.json"))
        assert (learned.folder / "Model_ours" / "cars" / "bundle.json").is_file()
    finally:
        person.close()


def test_learning_stops_after_a_step_and_goes_on(learned: Server, browser: Any) -> None:
    person = Person(browser, learned)
    try:
        person.mark_cars()
        person.fill("learn-name", "stopped")
        person.settings()
        person.fill("learn-steps1", "60")
        person.fill("learn-steps2", "2")
        person.page.click("#learn-start")
        person.wait_status("phase 1")
        person.page.click("#job-stop")
        person.wait_status("stopped.")
        kept = list((learned.folder / "Model_ours" / ".checkpoints" / "stopped").glob("*.safetensors"))
        assert kept and not (learned.folder / "Model_ours" / "stopped").exists()
        person.page.reload()
        person.page.click("#learn-resume")
        person.wait_status("done in")
        assert (learned.folder / "Model_ours" / "stopped" / "bundle.json").is_file()
        assert not list((learned.folder / "Model_ours" / ".checkpoints").glob("stopped/*.safetensors"))
    finally:
        person.close()


def _large_png(path: Path) -> Path:
    """20,000 x 20,000 pixels in a few kilobytes: 400 megapixels once it is read."""
    import struct

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (20_000 * 2501), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_hostile_uploads_get_a_message(server: Server, browser: Any, tmp_path: Path) -> None:
    archive = tmp_path / "photo.png"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../evil.txt", "x")
    drawing = tmp_path / "drawing.svg"
    drawing.write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>window.hit = 1</script></svg>')
    renamed = tmp_path / "drawing.png"
    renamed.write_text(drawing.read_text())
    person = Person(browser, server)
    try:
        for path, said in ((_large_png(tmp_path / "large.png"), "megapixels"), (archive, "image"), (renamed, "image")):
            person.drop("learn-photo", path)
            text = person.toast()
            assert said in text and str(tmp_path) not in text and "/" not in text.replace("20000x20000", ""), text
            person.page.locator("#learn-photo button[aria-label='Clear'], #learn-photo button[aria-label='Remove']").first.click()
        person.drop("learn-photo", drawing)
        assert "file type" in person.toast().lower()
        assert person.page.evaluate("window.hit") is None
        answer = person.page.request.post(f"{server.address}/gradio_api/upload", multipart={
            "files": {"name": "../../../escaped.png", "mimeType": "image/png", "buffer": PHOTO.read_bytes()}})  # fmt: skip
        assert not list(server.folder.glob("escaped.png")) and not list(server.folder.parent.glob("escaped.png"))
        assert answer.status >= 400 or ".." not in answer.text()
        for secret in ("/etc/passwd", str(server.folder / ".mifo_web" / "jobs.sqlite3")):
            assert person.page.request.get(f"{server.address}/gradio_api/file={secret}").status >= 400
    finally:
        person.close()


def test_a_narrow_page_has_all_in_view(learned: Server, browser: Any) -> None:
    """390 pixels, a phone's width: nothing needs sideways scrolling."""
    person = Person(browser, learned, 390, 844)
    try:
        for tab in ("Learn", "Place", "Edit", "Library"):
            if not person.page.get_by_role("tab", name=tab, exact=True).is_visible():
                person.page.get_by_role("button", name=re.compile("tabs", re.IGNORECASE)).last.click()
            person.open(tab)
            person.page.wait_for_timeout(1500)  # what is loaded later makes it wider
            assert person.page.evaluate("document.documentElement.scrollWidth") <= 390, (tab, person.page.evaluate(TOO_WIDE))
        person.open("Learn")
        person.mark_cars()
        person.shot("narrow")
        assert person.page.evaluate("document.documentElement.scrollWidth") <= 390
    finally:
        person.close()


def test_two_pages_at_once_see_the_same_jobs(learned: Server, browser: Any) -> None:
    first, second = Person(browser, learned), Person(browser, learned)
    try:
        for person, seed in ((first, "11"), (second, "12")):
            person.open("Place")
            person.wait_boxes("place-canvas", 2)
            person.settings()
            person.fill("place-steps", "4")
            person.fill("place-seed", seed)
        first.page.click("#place-draw")
        second.page.click("#place-draw")
        for person, seed in ((first, "11"), (second, "12")):
            person.page.wait_for_function(
                "seed => document.querySelector('#place-gallery')?.innerText.includes('seed ' + seed)", arg=seed, timeout=WAIT
            )
    finally:
        first.close()
        second.close()


def test_things_of_two_bundles_stand_in_one_picture(learned: Server, browser: Any) -> None:
    other = Path(shutil.copytree(learned.folder / "Model_ours" / "cars", learned.folder / "Model_ours" / "shelf"))
    person = Person(browser, learned)
    try:
        person.open("Place")
        person.wait_boxes("place-canvas", 2)
        assert person.page.input_value("#place-bundle input").startswith("cars")
        person.page.locator("#place-more input").click()
        person.page.get_by_role("option", name=re.compile("^shelf")).click()
        person.page.keyboard.press("Escape")
        person.page.wait_for_selector("#chip-4:has-text('<shelf.asset1>')")
        person.page.click("#chip-4")
        person.wait_boxes("place-canvas", 3)
        assert person.page.input_value("#place-prompt textarea").endswith("<asset1> and <shelf.asset1>")
        person.settings()
        person.fill("place-steps", "4")
        person.fill("place-seed", "31")
        person.page.click("#place-draw")
        person.page.wait_for_function(
            "document.querySelector('#place-gallery')?.innerText.includes('seed 31')", timeout=WAIT)  # fmt: skip
        [picture] = (learned.folder / "output").glob("cars+shelf/*/000031.png")
        recipe = json.loads(Image.open(picture).text["mifo"])  # type: ignore[attr-defined]
        assert recipe["bundles"] == ["cars", "shelf"] and len(recipe["boxes"]) == 3
        person.page.locator("#place-show-boxes input").check()
        person.page.wait_for_timeout(1500)
        assert person.page.locator("#place-gallery img").count() == 1
    finally:
        person.close()
        shutil.rmtree(other)


def test_only_this_machine_is_served_and_nobody_else_is_called(learned: Server) -> None:
    """The sockets of the server and of its worker: they listen on the loopback alone, and hold no connection to elsewhere."""
    pids = _family(learned.process.pid)
    assert len(pids) > 1  # the worker is there
    listening, others = _sockets(pids)
    assert int(learned.address.rsplit(":", 1)[1]) in [port for _, port in listening]
    assert {address for address, _ in listening + others} <= {"127.0.0.1", "::1"}


def _family(pid: int) -> list[int]:
    """The process and all that it began, and those began."""
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _sockets(pids: list[int]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Where TCP sockets of these processes listen, and the other ends of those that are connected: (address, port)."""
    inodes = {link.split("[")[1][:-1] for pid in pids for fd in Path(f"/proc/{pid}/fd").iterdir()
              if (link := _target(fd)).startswith("socket:")}  # fmt: skip
    listening, others = [], []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pids[0]}/net/{name}").read_text().splitlines()[1:]:
            here, there, state, inode = (line.split()[k] for k in (1, 2, 3, 9))
            if inode in inodes:
                (listening if state == "0A" else others).append(_address(here if state == "0A" else there))
    return listening, others


def _target(fd: Path) -> str:
    try:
        return os.readlink(fd)
    except OSError:  # it was closed meanwhile
        return ""


def _address(text: str) -> tuple[str, int]:
    """The kernel's hexadecimal words, each in the machine's byte order, as an address and a port."""
    words, port = text.split(":")
    raw = b"".join(int(words[k : k + 8], 16).to_bytes(4, sys.byteorder) for k in range(0, len(words), 8))
    address = ipaddress.ip_address(raw)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address), int(port, 16)
