"""The command line: `python cli.py COMMAND`, and, installed, `mifo COMMAND`. Importing the command modules registers them."""

from . import segment, learn, draw, edit, measure, library, files, web, serve, cluster  # noqa: F401, I001  # in the order in which the help lists them
from .app import app, main

__all__ = ["app", "main"]
