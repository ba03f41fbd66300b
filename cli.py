"""Starts the command line: python cli.py COMMAND."""

from mifo.cli import main

if __name__ == "__main__":
    main()
