"""Writes the instance folders under example/.

    python -m scripts.toybox.make_examples
"""

from pathlib import Path

import typer

from mifo.toybox.examples import EXAMPLES, write_example


def main(output: Path = Path("example")) -> None:
    """Draws every example."""
    for name in EXAMPLES:
        write_example(name, output / name)
        print(output / name)


if __name__ == "__main__":
    typer.run(main)
