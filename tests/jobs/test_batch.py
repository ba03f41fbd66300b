"""Many jobs in one process: the same bytes as one by one, a failed one stops no other, only what is missing is done again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from _tiny import FAST, copy_bundle, learn_arguments, mifo, tiny_base_folder, write_instance

from mifo.errors import InputError
from mifo.io.lock import checkpoint_folder, hold_lock

BOX = "[[0.1, 0.1, 0.9, 0.9]]"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    copy_bundle(tmp_path / "Model_ours", "desk")
    copy_bundle(tmp_path / "Model_ours", "shelf")
    return tmp_path


def write_jobs(place: Path, *jobs: dict[str, object]) -> Path:
    file = place / "jobs.jsonl"
    file.write_text("".join(json.dumps({"model": str(tiny_base_folder()), "steps": 2, **job}) + "\n" for job in jobs))
    return file


def test_a_batch_draws_what_each_command_draws(place: Path) -> None:
    both = {"bundles": ["desk", "shelf"], "prompt": "a photo of <asset0> and <shelf.asset1>",
            "boxes": [[0, 0.1, 0.5, 0.9], [0.5, 0.1, 1, 0.9]], "output": "mine"}  # fmt: skip
    boxed = {"bundles": ["desk"], "prompt": "a photo of <asset0>", "boxes": json.loads(BOX), "num_images": 2}
    led = {**both, "bundles": ["desk"], "prompt": "a photo of <asset0> and <asset1>", "contrast_scale": 2, "output": "away"}
    file = write_jobs(place, {"bundles": ["shelf"], "prompt": "a photo of <asset1>", "seed": 4}, both, boxed, led)
    result = mifo("synthesize", "--batch-file", file, "--json")
    lines = {line["item"]: line for line in map(json.loads, result.stdout.splitlines())}
    assert {k: line["state"] for k, line in lines.items()} == dict.fromkeys(range(4), "done")
    assert lines[1]["folder"] == "mine" and len(lines[2]["images"]) == 2
    common = ["--model-path", tiny_base_folder(), "--steps", 2]
    mifo("synthesize", "shelf", "--prompt", "a photo of <asset1>", "--seed", 4, "--output-path", "one", *common)
    mifo("synthesize", "desk", "shelf", "--prompt", both["prompt"], "--boxes", json.dumps(both["boxes"]), "--output-path", "two",
         *common)  # fmt: skip
    assert Path(lines[0]["images"][0]).read_bytes() == Path("one/000004.png").read_bytes()
    mifo("synthesize", "desk", "--prompt", led["prompt"], "--boxes", json.dumps(both["boxes"]), "--contrast-scale", 2,
         "--output-path", "three", *common)  # fmt: skip
    assert Path("mine/000000.png").read_bytes() == Path("two/000000.png").read_bytes()
    assert Path("away/000000.png").read_bytes() == Path("three/000000.png").read_bytes()


def test_only_what_is_missing_or_changed_is_drawn_again(place: Path) -> None:
    jobs = [{"bundles": ["desk"], "prompt": "a photo of <asset0>", "seed": k} for k in range(2)]
    bad = {"bundles": ["lamp"], "prompt": "a photo of <asset0>"}
    result = mifo("synthesize", "--batch-file", write_jobs(place, *jobs, bad), "--json", exit_code=2)
    states = [(line["item"], line["state"]) for line in map(json.loads, result.stdout.splitlines())]
    assert sorted(states) == [(0, "done"), (1, "done"), (2, "failed")]
    assert "no learned bundle 'lamp'" in result.stderr and "2 done, 0 were there, 1 failed" in result.stderr
    changed = {**jobs[1], "seed": 9}
    result = mifo("synthesize", "--batch-file", write_jobs(place, jobs[0], changed), "--json")
    states = [(line["item"], line["state"]) for line in map(json.loads, result.stdout.splitlines())]
    assert sorted(states) == [(0, "there"), (1, "done")]


def test_an_output_of_its_own_is_believed_only_if_all_is_the_same(place: Path) -> None:
    """Whatever of a job is changed, the picture that stands there is another's: it is neither taken for this one nor replaced."""
    job = {"bundles": ["desk"], "prompt": "a photo of <asset0>", "boxes": json.loads(BOX), "output": "mine"}
    mifo("synthesize", "--batch-file", write_jobs(place, job))
    before = Path("mine/000000.png").read_bytes()
    assert '"there"' in mifo("synthesize", "--batch-file", write_jobs(place, job), "--json").stdout
    changes = ({"boxes": [[0, 0, 0.5, 0.5]]}, {"boxes": None}, {"steps": 3}, {"guidance_scale": 3.5}, {"bundles": ["shelf"]},
               {"seed": 1}, {"num_images": 2}, {"negative_prompt": "blurry"}, {"contrast_scale": 1},
               {"prompt": "a photo of <asset1>"})  # fmt: skip
    for change in changes:
        result = mifo("synthesize", "--batch-file", write_jobs(place, {**job, **change}), exit_code=2)
        assert "holds an earlier run's synthesis" in result.stderr, change
    os.utime("Model_ours/desk/bundle.json")  # as if it had been learned again
    mifo("synthesize", "--batch-file", write_jobs(place, job), exit_code=2)
    assert Path("mine/000000.png").read_bytes() == before


def test_a_bundle_that_was_learned_again_draws_again(place: Path) -> None:
    import shutil

    job = {"bundles": ["desk"], "prompt": "a photo of <asset0>"}
    mifo("synthesize", "--batch-file", write_jobs(place, job))
    shutil.rmtree("Model_ours/desk")
    mifo(*learn_arguments(write_instance(place / "cups"), place / "Model_ours", "--name", "desk", "--seed", 5))
    result = mifo("synthesize", "--batch-file", write_jobs(place, job), "--json")
    assert '"done"' in result.stdout and len(list(Path("output/jobs").glob("0000-*"))) == 2


def test_what_stands_at_a_job_s_output_is_not_replaced(place: Path) -> None:
    Path("mine").mkdir()
    Path("mine/note.txt").write_text("keep")
    job = {"bundles": ["desk"], "prompt": "a photo of <asset0>", "output": "mine"}
    result = mifo("synthesize", "--batch-file", write_jobs(place, job), exit_code=2)
    assert "other things in it (note.txt)" in result.stderr and sorted(p.name for p in Path("mine").iterdir()) == ["note.txt"]
    with pytest.raises(AssertionError, match="both write to mine"):
        mifo("synthesize", "--batch-file", write_jobs(place, job, {**job, "seed": 2}))
    others = (["desk"], ["--steps", 3], ["--seed", 1], ["--overwrite"], ["--compile"], ["--vram-gib", 12],
              ["--lora-place", "boxes"])  # fmt: skip
    for other in others:
        result = mifo("synthesize", *other, "--batch-file", write_jobs(place, job), exit_code=2)
        assert "leave other options out" in result.stderr


def test_photos_learned_together_are_those_learned_alone(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_instance(photos / "three", 3)
    write_instance(photos / "two", 2)
    write_instance(photos / "busy", 2)
    mifo(*learn_arguments(photos / "two", tmp_path / "alone"))
    with hold_lock(checkpoint_folder(tmp_path / "together" / "busy"), "learning to it", "wait"):  # as by another process
        result = mifo("learn", "--folder-path", photos, "--model-path", tiny_base_folder(), "--output-dir", tmp_path / "together",
                      *FAST, "--json", exit_code=2)  # fmt: skip
    record = json.loads(result.stdout)
    assert list(record["failed"]) == ["busy"] and len(record["bundles"]) == 2
    for file in ("assets.safetensors", "unet_lora/adapter_model.safetensors"):
        assert (tmp_path / "alone" / "two" / file).read_bytes() == (tmp_path / "together" / "two" / file).read_bytes()


def test_jobs_of_one_bundle_stand_behind_each_other() -> None:
    from mifo.jobs.batch import in_order, items_of
    from mifo.jobs.job import SynthesizeJob

    wanted = (("b", None), ("a", "m"), ("b", "m"), ("a", None), ("b", None))
    jobs = [SynthesizeJob("x", (name,), model=model) for name, model in wanted]
    assert [item.index for item in in_order(items_of(jobs, "out", "Model_ours"))] == [3, 0, 4, 1, 2]
    with pytest.raises(InputError, match=r"both write to \./here"):
        items_of([SynthesizeJob("x", output="here"), SynthesizeJob("y", output="./here")], "out", "Model_ours")
