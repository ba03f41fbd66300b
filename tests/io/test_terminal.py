"""What reaches a terminal: our own lines, printable; and what happens when nobody reads them any more."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _tiny import FAST, ROOT, copy_bundle, learn_arguments, mifo, tiny_base_folder, write_instance
from _warm import command_line
from typer.testing import CliRunner

from mifo.cli import app
from mifo.io.console import Bar, Job, say, waiting

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
COMMANDS = ["learn", "synthesize", "boxes", "export", "demo", "edit", "decompose", "variations", "evaluate", "check", "plan"]
#: Every line that a command may write to standard error.
OURS = re.compile(r"|".join([
    r"attention: .*", r"note: .*", r"(drawing the prior|phase \d, \w+|previews|denoising|pictures):? .*\|.*\|.*",
    r"((loading|reading|writing|looking at|counting) the [\w ]+|getting ready|working): [\d:]+", r"\s*",
]))  # fmt: skip


def lines_of(stream: str) -> list[str]:
    return re.split(r"[\r\n]", stream)


# --- nothing but our lines ----------------------------------------------------------------------


def test_only_our_own_lines_reach_the_terminal(tmp_path: Path):
    """In processes of their own, through `learn` and `evaluate` of what was learned."""
    write_instance(tmp_path / "cups")
    for command in (["learn", "cups", "--folder-path", ".", "--model-path", tiny_base_folder(), *FAST],
                    ["synthesize", "cups", "--prompt", "a photo of <asset0>", "--steps", "2"]):  # fmt: skip
        process = subprocess.run([sys.executable, str(ROOT / "cli.py"), *map(str, command)], cwd=tmp_path, env=ENVIRONMENT,
                                 text=True, capture_output=True)  # fmt: skip
        assert process.returncode == 0, process.stderr
        strange = [line for line in lines_of(process.stderr) if not OURS.fullmatch(line)]
        assert not strange and "previews" in (process.stderr if "learn" in command else "previews")


LIBRARY = """
import logging, os, sys, warnings
from mifo.io.terminal import guard_streams, quiet_libraries
from mifo.io.console import running, say
quiet_libraries()
guard_streams()
with running(False) as job:
    logging.getLogger("bitsandbytes.backends.cpu.ops").error("Failed to load CPU gemm_4bit_forward from kernels-community")
    logging.getLogger("transformers").warning("`CLIPImageProcessor` requires torchvision")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("`torch_dtype` is deprecated!", FutureWarning)
    print("Welcome to some library")
    say("note: ours \\x1b[31m")
    job.text("a result \\x9b2J\\nerror: forged")
print("by a library \\x1b[31m", file=sys.stderr)
"""


@pytest.mark.parametrize("debug", [False, True])
def test_libraries_notices_stay_away_and_escapes_are_shown(debug: bool):
    environment = {**ENVIRONMENT, **({"MIFO_DEBUG": "1"} if debug else {})}
    process = subprocess.run([sys.executable, "-c", LIBRARY], env=environment, text=True, capture_output=True)
    assert process.stdout == "a result \\x9b2J\\nerror: forged\n"
    ours = ["note: ours \\x1b[31m", "by a library \\x1b[31m"]
    assert [line for line in process.stderr.splitlines() if line in ours] == ours
    assert (len(process.stderr.splitlines()) == 2) is not debug
    assert all(("gemm_4bit" in text) == debug for text in [process.stderr])


def test_names_with_escapes_come_out_printable(tmp_path: Path):
    """In notes, warnings and results; a usage error is click's own, behind the guarded stream."""
    folder = write_instance(tmp_path / "cups\x1b]0;title\x07\nerror: forged")
    result = mifo("check", folder, "--output-path", tmp_path / "red\x1b[31m" / "check.png")
    said = result.stdout + result.stderr
    assert "red\\x1b[31m" in said and "\x1b" not in said
    process = subprocess.run([sys.executable, str(ROOT / "cli.py"), "check", "--odd\x1b[2J"], env=ENVIRONMENT, text=True,
                             capture_output=True)  # fmt: skip
    assert process.returncode == 2 and "\\x1b[2J" in process.stderr and "\x1b" not in process.stderr


def test_every_line_is_made_printable(capsys: pytest.CaptureFixture[str]):
    say("one\x1b[0m", "two\rover", "three\nforged")
    Job(False, sys.stdout).text("\u202etxt", "plain")
    out, err = capsys.readouterr()
    assert err.splitlines() == ["one\\x1b[0m", "two\\rover", "three\\nforged"] and out.splitlines() == ["\\u202etxt", "plain"]


def test_a_wait_is_shown_once_it_is_long(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    with waiting("loading"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("mifo.io.console.SHOW_AFTER", 0.01)
    with waiting("loading"):
        time.sleep(0.3)
    assert "loading: 00:00" in capsys.readouterr().err


def test_what_cannot_be_counted_shows_its_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Before the first step, and after the last: decoding, measuring, saving."""
    monkeypatch.setattr("mifo.io.console.SHOW_AFTER", 0.01)
    with Bar() as bar:
        time.sleep(0.2)
        bar.denoising(1, 2)
        bar.denoising(2, 2)
        time.sleep(0.2)
        say("note: beside it")
    ready, _, rest = capsys.readouterr().err.partition("denoising: ")
    assert "getting ready: 00:00" in ready and "2/2" in rest and "working: 00:00" in rest and "\rnote: beside it\n" in rest


# --- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("width", [60, 80, 200])
def test_help_shows_whole_option_names_and_square_brackets(command: str, width: int):
    import typer

    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": str(width), "TERMINAL_WIDTH": str(width)}).stdout
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    names = [name for p in parameters for name in (*p.opts, *p.secondary_opts) if name.startswith("--")]
    assert len(names) >= 3
    assert not [name for name in names if not re.search(rf"{re.escape(name)}[\s,]", shown)]
    assert "…" not in shown
    if command == "synthesize":
        assert "[x0, y0, x1, y1]" in re.sub(r"\s+", " ", shown)


# --- nobody reads any more ----------------------------------------------------------------------


def start(*arguments: object, folder: Path) -> subprocess.Popen[bytes]:
    """Both streams into one pipe, as `2>&1 |` does."""
    return subprocess.Popen(command_line(*arguments), cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, bufsize=0,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip


def read_until(process: subprocess.Popen[bytes], word: bytes) -> None:
    seen = b""
    while word not in seen:
        found = process.stdout.read(1)  # type: ignore[union-attr]
        assert found, seen
        seen += found


@pytest.mark.parametrize("and_ctrl_c", [False, True], ids=["head", "Ctrl-C with tee"])
def test_a_reader_that_goes_away_ends_learn_with_its_state_kept(tmp_path: Path, and_ctrl_c: bool):
    """Ctrl-C reaches all of `learn 2>&1 | tee log`; that tee is gone then must not count as a second Ctrl-C."""
    arguments = learn_arguments(write_instance(tmp_path / "cups"), tmp_path / "out", "--no-prior-preservation",
                                "--phase1-train-steps", "100000")  # fmt: skip
    process = start(*arguments, folder=tmp_path)
    read_until(process, b"diffusion=")
    if and_ctrl_c:
        process.send_signal(signal.SIGINT)
    process.stdout.close()  # type: ignore[union-attr]
    assert process.wait(timeout=120) == (130 if and_ctrl_c else 141)
    assert list((tmp_path / "out" / ".checkpoints" / "cups").glob("*.safetensors"))
    assert not (tmp_path / "out" / "cups").exists() and not list((tmp_path / "out").glob(".*partial"))


def test_a_reader_that_goes_away_early_brings_no_traceback(tmp_path: Path):
    """`mifo ... | head -0`: standard output alone is closed, so standard error can be read."""
    for command in (["--help"], ["learn", "--help"], ["boxes", "[[0, 0, 1, 1]]", "--json"]):
        read, write = os.pipe()
        os.close(read)
        process = subprocess.run([sys.executable, str(ROOT / "cli.py"), *command], cwd=tmp_path, env=ENVIRONMENT, stdout=write,
                                 stderr=subprocess.PIPE, text=True)  # fmt: skip
        os.close(write)
        assert process.returncode == 141, process.stderr
        assert "Traceback" not in process.stderr and "Exception" not in process.stderr and "Errno" not in process.stderr


def test_json_is_whole_for_a_reader_that_stays(tmp_path: Path):
    process = start("boxes", "[[0, 0, 1, 1]]", "--json", folder=tmp_path)
    out, _ = process.communicate()
    assert process.returncode == 0 and json.loads(out)["boxes"] == {"<asset0>": [0.0, 0.0, 1.0, 1.0]}


# --- finding one's way --------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_sections_an_example_that_is_a_command_and_no_option_twice(command: str):
    import typer

    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).stdout
    example = shown.partition("Example:\n")[2]
    words = shlex.split(example.replace("\\\n", " "))
    assert words[:2] == ["mifo", command]
    known = {name for p in typer.main.get_command(app).commands[command].params for name in p.opts}  # type: ignore[attr-defined]
    assert {word for word in words if word.startswith("--")} <= known
    assert re.search(r"^Other:$", shown, re.MULTILINE) and shown.count("--json") == 1
    assert command in ("plan", "boxes", "export", "demo", "check") or re.search(r"^Memory and device:$", shown, re.MULTILINE)


def test_a_mistyped_bundle_or_asset_is_answered_with_the_nearest_one(tmp_path: Path):
    copy_bundle(tmp_path, "cups")
    said = mifo("decompose", "cupss", "--output-dir", tmp_path, exit_code=2).output
    assert "there are cups; did you mean 'cups'?" in said
    said = mifo("synthesize", "cups", "--output-dir", tmp_path, "--prompt", "a photo of <asset7>", exit_code=2).output
    assert "did you mean '<asset" in said


def test_the_shell_completes_bundles_and_instances(tmp_path: Path):
    copy_bundle(tmp_path / "bundles", "cups")
    write_instance(tmp_path / "photos" / "shelf")
    (tmp_path / "photos" / "empty").mkdir()
    for words, expected in ((f"mifo export --output-dir {tmp_path}/bundles ", "cups"),
                            (f"mifo learn --folder-path {tmp_path}/photos ", "shelf")):  # fmt: skip
        typed = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()))}
        environment = {**ENVIRONMENT, "_MIFO_COMPLETE": "complete_bash", **typed}
        code = "from mifo.cli import app; app(prog_name='mifo')"
        found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert found.stdout.split() == [expected], found
