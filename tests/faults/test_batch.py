"""Jobs of many pictures go on where they were interrupted, and say in the end what failed and why."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from _tiny import FAST, copy_bundle, mifo, snapshot, tiny_base_folder, tiny_bundle_folder
from _warm import command_line
from PIL import Image

from mifo.errors import InputError
from mifo.evaluation import best_of
from mifo.evaluation import run as evaluation
from mifo.synthesis import variations as scenes
from mifo.synthesis.resumable import ImageJob
from mifo.toybox.examples import write_example

Draw = Callable[[], list[Image.Image]]
NIGHT = "a photo of <asset0> at night"


def draw(color: int, calls: list[int]) -> Draw:
    def drawn() -> list[Image.Image]:
        calls.append(color)
        return [Image.new("RGB", (8, 8), (color, k, 0)) for k in range(2)]

    return drawn


def do(folder: Path, colors: range, calls: list[int], facts: dict[str, Any] | None = None, **broken: Exception) -> ImageJob:
    job = ImageJob(folder, facts or {})
    for color in colors:
        error = broken.get(f"item{color}")

        def fail(error: Any = error) -> list[Image.Image]:
            raise error

        images = job.images(f"item{color}", {"color": color}, 2, fail if error else draw(color, calls))
        assert (images is None) == bool(error)
        if images:
            assert [image.getpixel((0, 0)) for image in images] == [(color, k, 0) for k in range(2)]
    return job


# --- one job ------------------------------------------------------------------------------------


def test_what_is_kept_is_not_drawn_again_unless_it_is_damaged_or_another(tmp_path: Path):
    calls: list[int] = []
    do(tmp_path, range(3), calls)
    assert do(tmp_path, range(4), calls).reused == 3 and calls == [0, 1, 2, 3]
    cut, changed, gone, _ = tmp_path.glob("item-*")
    content = bytearray(changed.read_bytes())
    content[-5] ^= 1
    changed.write_bytes(content), cut.write_bytes(cut.read_bytes()[:-20]), gone.unlink()
    assert do(tmp_path, range(4), calls).reused == 1 and len(calls) == 7
    assert do(tmp_path, range(4), calls, {"seed": 1}).reused == 0 and len(calls) == 11
    do(tmp_path, range(4), calls).clear()
    assert list(tmp_path.iterdir()) == []


def test_failures_are_told_and_only_they_are_tried_again(tmp_path: Path):
    calls: list[int] = []
    job = do(tmp_path, range(4), calls, item1=InputError("no such mask"), item3=ZeroDivisionError("by zero"))
    assert job.summary() == [
        "error: 2 of 4 items failed; the same command tries only them again", "  item1: no such mask",
        "  item3: ZeroDivisionError: by zero",
    ]  # fmt: skip
    assert job.status == 1 and do(tmp_path, range(4), calls, item1=InputError("no such mask")).status == 2
    job.clear()  # keeps what there is while something is missing
    last = do(tmp_path, range(4), calls)
    assert last.status == 0 and last.reused == 3 and sorted(calls) == [0, 1, 2, 3]


def test_a_disk_that_is_full_ends_the_job(tmp_path: Path):
    (tmp_path / "file").touch()
    calls: list[int] = []
    with pytest.raises(InputError, match="cannot be written"):
        do(tmp_path / "file" / "deep", range(4), calls)
    assert calls == [0]


# --- the commands -------------------------------------------------------------------------------


class Synthesize:
    """Stands before the real one: counts, and raises `error` for what it is told to break on."""

    def __init__(self, real: Any, breaks: Callable[[str, int], BaseException | None] = lambda prompt, calls: None):
        self.real, self.breaks, self.prompts = real, breaks, []

    def __call__(self, base: Any, prompt: str, *given: Any) -> Any:
        self.prompts.append(prompt)
        if error := self.breaks(prompt, len(self.prompts)):
            raise error
        return self.real(base, prompt, *given)


@pytest.fixture
def synthesize(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Callable[..., Synthesize]]:
    real = scenes.synthesize

    def replaced(*breaks: Any) -> Synthesize:
        stand_in = Synthesize(real, *breaks)
        for module in (scenes, evaluation, best_of):
            monkeypatch.setattr(module, "synthesize", stand_in)
        return stand_in

    yield replaced


def variations(output: Path, *more: object, bundle: Path | None = None) -> list[object]:
    return ["variations", bundle or tiny_bundle_folder(), "--output-path", output, "--count", 4, "--steps", 2, *more]


def test_variations_killed_and_interrupted_go_on_to_the_same_bytes(tmp_path: Path, synthesize: Callable[..., Synthesize]):
    """With SIGKILL in a process of its own, then with Ctrl-C at the last picture."""
    arguments = variations(tmp_path / "out", "--steps", 6)
    process = subprocess.Popen(command_line(*arguments), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    kept = tmp_path / ".checkpoints" / "out"
    until = time.monotonic() + 300
    while not list(kept.glob("item-*")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.wait()
    there = len(list(kept.glob("item-*")))
    assert 0 < there < 4 and not (tmp_path / "out").exists(), "it was not killed between two pictures"

    stopped = synthesize(lambda prompt, calls: KeyboardInterrupt() if calls == 4 - there else None)
    said = mifo(*arguments, exit_code=130).stderr
    assert len(stopped.prompts) == 4 - there and not (tmp_path / "out").exists()
    assert "; 3 items are kept: the same command goes on from there" in said
    again = synthesize()
    said = mifo(*arguments).stdout
    assert "4 pictures in" in said and "3 of them drawn before the interruption" in said and len(again.prompts) == 1
    assert not kept.exists()
    mifo(*variations(tmp_path / "whole", "--steps", 6))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_without_an_output_path_the_same_command_goes_on_and_takes_the_next_number(
    tmp_path: Path, synthesize: Callable[..., Synthesize], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    arguments = ["variations", tiny_bundle_folder(), "--count", 3, "--steps", 1]
    place = tmp_path / "output" / "two_cups"
    synthesize(lambda prompt, calls: KeyboardInterrupt() if calls == 3 else None)
    mifo(*arguments, exit_code=130)
    assert [p.name for p in place.iterdir()] == [".checkpoints"]  # no empty number
    other = synthesize()
    facts = json.loads(mifo(*arguments, "--seed", 5, "--json").stdout)  # another job neither uses nor forgets what is kept
    assert len(other.prompts) == 3 and facts["images"][0] == "output/two_cups/0001/variation00.png"
    again = synthesize()
    said = mifo(*arguments).stdout
    assert len(again.prompts) == 1 and "3 pictures in output/two_cups/0002, 2 of them drawn before the interruption" in said
    assert sorted(p.name for p in place.iterdir()) == ["0001", "0002"]


def test_a_bundle_learned_anew_draws_anew(tmp_path: Path, synthesize: Callable[..., Synthesize]):
    from safetensors.torch import load_file, save_file

    bundle = copy_bundle(tmp_path, "cups")
    synthesize(lambda prompt, calls: KeyboardInterrupt() if calls == 3 else None)
    mifo(*variations(tmp_path / "out", bundle=bundle), exit_code=130)
    rows = load_file(bundle / "assets.safetensors")
    save_file({k: 2 * v for k, v in rows.items()}, bundle / "assets.safetensors")
    again = synthesize()
    mifo(*variations(tmp_path / "out", bundle=bundle))
    assert len(again.prompts) == 4


def test_one_failing_variation_does_not_stop_the_others(tmp_path: Path, synthesize: Callable[..., Synthesize]):
    synthesize(lambda prompt, calls: RuntimeError("CUDA error: an illegal\x1b[2J access") if calls in (2, 3) else None)
    result = mifo(*variations(tmp_path / "out", "--json"), exit_code=1)
    facts, record = json.loads(result.stdout), json.loads((tmp_path / "out" / "variations.json").read_text())
    assert [Path(p).name for p in facts["images"]] == ["variation00.png", "variation03.png"]
    assert facts["failed"] == record["failed"] and list(facts["failed"]) == ["variation01", "variation02"]
    assert result.stderr.splitlines()[-3:] == [
        "error: 2 of 4 items failed; the same command with --overwrite tries only them again",
        r"  variation01: RuntimeError: CUDA error: an illegal\x1b[2J access",
        r"  variation02: RuntimeError: CUDA error: an illegal\x1b[2J access",
    ]
    again = synthesize()
    mifo(*variations(tmp_path / "out"), exit_code=2)
    mifo(*variations(tmp_path / "out", "--overwrite"))
    mifo(*variations(tmp_path / "whole"))
    assert len(again.prompts) == 2 + 4 and snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_when_everything_fails_nothing_is_written(tmp_path: Path, synthesize: Callable[..., Synthesize]):
    for error, status in ((InputError("not this size"), 2), (MemoryError("1 GiB"), 1)):
        synthesize(lambda prompt, calls, error=error: error)
        result = mifo(*variations(tmp_path / "out"), exit_code=status)
        assert "error: 4 of 4 items failed" in result.stderr and result.stdout == ""
        assert snapshot(tmp_path) == {}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that the toybox's judge can measure."""
    folder = tmp_path_factory.mktemp("twins")
    write_example("twins", folder / "twins")
    mifo("learn", folder / "twins", "--model-path", tiny_base_folder(), "--output-dir", folder / "bundles", *FAST)
    return folder / "bundles" / "twins"


def test_an_interrupted_evaluation_goes_on_and_one_failure_does_not_stop_it(
    tmp_path: Path, twins: Path, synthesize: Callable[..., Synthesize]
):
    (tmp_path / "prompts.txt").write_text(f"a photo of <asset1> in the snow\n{NIGHT}\n")
    more = ["--prompts", tmp_path / "prompts.txt", "--samples", 2, "--backend", "toybox", "--steps", 2]

    def evaluate(name: str, status: int = 0, *options: str) -> dict[str, Any]:
        said = mifo("evaluate", twins, "--output-path", tmp_path / name, *more, *options, exit_code=status).stderr
        with suppress(FileNotFoundError):
            return {**json.loads((tmp_path / name / "evaluation.json").read_text()), "said": said}
        return {"said": said}

    count = synthesize()
    whole = evaluate("whole")
    total = len(count.prompts)
    first = synthesize(lambda prompt, calls: KeyboardInterrupt() if prompt == NIGHT else None)
    assert "items are kept: the same command goes on" in evaluate("out", 130)["said"]
    assert not (tmp_path / "out").exists()
    broken = synthesize(lambda prompt, calls: RuntimeError("out of luck") if prompt == NIGHT else None)
    found = evaluate("out", 1)
    assert len(first.prompts) - 1 + len(broken.prompts) == total
    name = f"'{NIGHT}', seeds 0 to 1"
    assert found["failed"] == {name: "RuntimeError: out of luck"} and f"  {name}: RuntimeError: out of luck" in found["said"]
    assert [p["name"] for p in found["pictures"]] == ["00-000000.png", "00-000001.png"]
    last = synthesize()
    again = evaluate("out", 0, "--overwrite")
    assert last.prompts == [NIGHT]
    assert {**again, "said": ""} == {**whole, "said": ""}
    shutil.rmtree(tmp_path / "whole")
    assert not (tmp_path / ".checkpoints").exists()
    (tmp_path / "prompts.txt").write_text("a photo of <asset1>\na photo of <asset0> " + "and a car " * 40)
    none = synthesize()
    assert "tokens too long" in evaluate("new", 2)["said"] and none.prompts == []


def test_best_of_goes_on_to_the_same_picture(tmp_path: Path, twins: Path, synthesize: Callable[..., Synthesize]):
    """Killed by Ctrl-C at the last seed; the best among those kept is drawn once more for its record, the others are not."""

    def best(name: str, status: int = 0, *options: str) -> Any:
        return mifo("synthesize", twins, "--prompt", "a photo of <asset0> and <asset1>", "--steps", 2, "--best-of", 4,
                    "--backend", "toybox", "--output-path", tmp_path / name, "--json", *options, exit_code=status)  # fmt: skip

    whole = json.loads(best("whole").stdout)
    synthesize(lambda prompt, calls: KeyboardInterrupt() if calls == 4 else None)
    assert "; 3 items are kept: the same command goes on from there" in best("out", 130).stderr
    assert not (tmp_path / "out").exists() and len(list((tmp_path / ".checkpoints" / "out").glob("item-*"))) == 3
    again = synthesize()
    found = json.loads(best("out").stdout)
    is_kept = found["best_of"][0]["seed"] < 3
    assert len(again.prompts) == 1 + is_kept and found["best_of"] == whole["best_of"]
    records = [json.loads((tmp_path / name / "synthesis.json").read_text()) for name in ("out", "whole")]
    assert len({json.dumps({**r, "seconds": 0, "peak_gib": 0}) for r in records}) == 1
    (name,) = records[0]["images"]
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / ".checkpoints").exists()
    synthesize(lambda prompt, calls: RuntimeError("out of luck") if calls in (1, 2) else None)
    result = best("less", 1)
    assert [e["seed"] for e in sorted(json.loads(result.stdout)["best_of"], key=lambda e: e["seed"])] == [2, 3]
    assert "error: 2 of 4 items failed" in result.stderr and "  seed 0: RuntimeError: out of luck" in result.stderr
    synthesize(lambda prompt, calls: InputError("not this size"))
    assert best("none", 2).stdout == "" and not (tmp_path / "none").exists()


def test_drift_leaves_out_a_prompt_that_one_side_lacks(tmp_path: Path, twins: Path, synthesize: Callable[..., Synthesize]):
    (tmp_path / "prompts.txt").write_text("a photo of <asset1> in the snow\n")
    more = ["--prompts", tmp_path / "prompts.txt", "--samples", 1, "--backend", "toybox", "--steps", 1]
    seen: list[str] = []

    def breaks(prompt: str, calls: int) -> BaseException | None:
        seen.append(prompt)
        return RuntimeError("no") if "<" not in prompt and seen.count(prompt) == 1 and len(set(seen)) % 2 else None

    synthesize(breaks)
    mifo("evaluate", twins, "--output-path", tmp_path / "out", *more, exit_code=1)
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert 0 < record["drift"]["values"] == len({p for p in seen if "<" not in p}) - len(record["failed"])
