"""The command line: `python cli.py COMMAND`, and, installed, `mifo COMMAND`."""

from .commands import app, main

__all__ = ["app", "main"]
