"""The three cars of example/toy_car, learned by the preset once in a run of the tests, whichever of its processes asks first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from mifo.data.instance import load_instance
from mifo.learning.learn import learn
from mifo.model.load_base import load_base_model
from mifo.presets import learn_preset

EXAMPLE = Path(__file__).parents[1] / "example" / "toy_car"


def learned_cars(factory: pytest.TempPathFactory) -> Path:
    """The folder of the bundle, beside which `.prior` has what the base model drew for it. Nobody changes either."""
    base_temp = factory.getbasetemp()
    place = (base_temp.parent if base_temp.name.startswith("popen-") else base_temp) / "learned_cars"
    place.mkdir(exist_ok=True)
    with FileLock(place / "lock"):
        if not (place / "cars" / "bundle.json").is_file():
            base = load_base_model("toybox")
            learn(load_instance(EXAMPLE), base, learn_preset(base.family), place / "cars")
    return place / "cars"


def put_cars(factory: pytest.TempPathFactory, shelf: Path) -> None:
    """A copy in `shelf`, in place of a bundle of that name, and of what the base model drew."""
    cars = learned_cars(factory)
    shutil.rmtree(shelf / "cars", ignore_errors=True)
    shutil.copytree(cars, shelf / "cars")
    shutil.copytree(cars.parent / ".prior", shelf / ".prior", dirs_exist_ok=True)
