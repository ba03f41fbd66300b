"""`mifo` in processes of their own that need not import PyTorch and PEFT each: one process has imported them, and forks.

    subprocess.Popen(command_line("learn", "cups"), ...)

What is started is a small program that hands its arguments, folder, environment and streams to that process, hands on signals,
and ends as the fork ends; killed, it takes the fork with it. Where the start itself is what a test is about (what is imported,
what libraries print, threads), tests start `cli.py` itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import pkgutil
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 1 << 20  # bytes of arguments and environment
HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Not imported ahead: servers and trackers have tests of their own, and take long.
LEFT_OUT = ("mifo.web", "mifo.serve", "mifo.cluster", "mifo.__main__")


def command_line(*arguments: object) -> list[str]:
    """What starts `mifo ARGUMENTS`."""
    return python_line(ROOT / "cli.py", *arguments)


def python_line(*arguments: object) -> list[str]:
    """What starts `python ARGUMENTS`: a file, or -m and a module, and what it is given."""
    given = [str(argument) for argument in arguments]
    if not hasattr(os, "pidfd_open"):  # not Linux
        return [sys.executable, *given]
    return [sys.executable, "-S", "-E", __file__, "run", _server(), *given]


@functools.cache
def _server() -> str:
    """The socket of the process that forks: one for all test processes of a run. It ends with the run."""
    whole_run = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    folder = Path(tempfile.gettempdir()) / f"mifo-warm-{whole_run}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _answers(folder / "socket"):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen([sys.executable, __file__, "serve", str(folder), str(whole_run)], env=environment,
                                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)  # fmt: skip
            assert process.stdout and process.stdout.readline() == b"ready\n"
    return str(folder / "socket")


def _answers(place: Path) -> bool:
    """False also for what a run has left that was killed; it is removed then."""
    with socket.socket(socket.AF_UNIX) as asked:
        try:
            asked.connect(str(place))
        except OSError:
            place.unlink(missing_ok=True)
            return False
        return True


# --- what a test starts -------------------------------------------------------------------------


def run(place: str, arguments: list[str]) -> NoReturn:
    """Asks for a fork and ends as it does."""
    with socket.socket(socket.AF_UNIX) as asked:
        asked.connect(place)
        wanted = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ),
                             "ignored": [n for n in HANDED_ON if signal.getsignal(n) == signal.SIG_IGN]}).encode()  # fmt: skip
        socket.send_fds(asked, [len(wanted).to_bytes(4, "big")], [0, 1, 2])
        asked.sendall(wanted)
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)  # until it is known whom they are for
        pid = int.from_bytes(asked.recv(4), "big")
        for number in HANDED_ON:
            signal.signal(number, lambda number, _: os.kill(pid, number))  # also one that the fork is to ignore
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
        for stream in (0, 1, 2):  # a reader that goes away is the fork's to notice
            os.close(stream)
        status = int.from_bytes(asked.recv(4), "big", signed=True)
    if status < 0:  # as if the signal had come here
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# --- what forks ---------------------------------------------------------------------------------


def serve(folder: Path, whole_run: int) -> list[str]:
    """Forks for each that asks, until the process `whole_run` ends. Returns in the forks alone: what they were asked to run."""
    import importlib

    import mifo

    watched = os.pidfd_open(whole_run)

    for module in pkgutil.walk_packages(mifo.__path__, "mifo."):
        if not module.name.startswith(LEFT_OUT):
            importlib.import_module(module.name)
    with socket.socket(socket.AF_UNIX) as listening, selectors.DefaultSelector() as selector:
        listening.bind(str(folder / "socket"))
        listening.listen()
        selector.register(watched, selectors.EVENT_READ)
        selector.register(listening, selectors.EVENT_READ)
        print("ready", flush=True)
        children: dict[int, tuple[int, socket.socket]] = {}  # by the number of the file that tells of its end
        while True:
            for key, _ in selector.select():
                if key.fd == watched:
                    for pid, _ in children.values():
                        os.kill(pid, signal.SIGKILL)
                    shutil.rmtree(folder)
                    os._exit(0)
                elif key.fileobj is listening:
                    asked, _ = listening.accept()
                    wanted, streams = _receive(asked)
                    if not wanted:  # who asked only looked whether somebody answers
                        asked.close()
                        continue
                    pid = os.fork()
                    if pid == 0:
                        for opened in (watched, *children):
                            os.close(opened)
                        for asker in (asked, *(asker for _, asker in children.values())):
                            asker.close()
                        return _become(wanted, streams)
                    for stream in streams:
                        os.close(stream)
                    asked.sendall(pid.to_bytes(4, "big"))
                    end = os.pidfd_open(pid)
                    children[end] = pid, asked
                    selector.register(end, selectors.EVENT_READ)
                    selector.register(asked, selectors.EVENT_READ, pid)
                elif isinstance(key.data, int):  # who asked was killed
                    with contextlib.suppress(KeyError):
                        selector.unregister(key.fileobj)
                    if key.data in [pid for pid, _ in children.values()]:  # else it ended at the same moment
                        os.kill(key.data, signal.SIGKILL)
                elif key.fd in children:
                    pid, asked = children.pop(key.fd)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    with contextlib.suppress(KeyError):
                        selector.unregister(asked)
                    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with contextlib.suppress(OSError), asked:  # who asked may have been killed
                        asked.sendall(status.to_bytes(4, "big", signed=True))


def _receive(asked: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, streams, _, _ = socket.recv_fds(asked, 4, 3)
    if not head:
        return {}, []
    length, body = int.from_bytes(head, "big"), b""
    while len(body) < length:
        body += asked.recv(LARGEST)
    return json.loads(body), streams


def _become(wanted: dict[str, Any], streams: list[int]) -> list[str]:
    """In a fork: the streams, folder, environment and signals of a program that has just been started."""
    for stream, own in zip(streams, (0, 1, 2), strict=True):
        os.dup2(stream, own)
        os.close(stream)
    for stream, buffering in (("stdin", -1), ("stdout", 1 if os.isatty(1) else -1), ("stderr", 1)):
        opened = os.fdopen(("stdin", "stdout", "stderr").index(stream), "r" if stream == "stdin" else "w", buffering)
        setattr(sys, stream, opened)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    for number in HANDED_ON:  # not as this process has them, which nohup or a shell's & may have told to ignore some
        own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in wanted["ignored"] else own)
    os.chdir(wanted["folder"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    return list(wanted["arguments"])


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(sys.argv[2], sys.argv[3:])
    arguments = serve(Path(sys.argv[2]), int(sys.argv[3]))
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")
