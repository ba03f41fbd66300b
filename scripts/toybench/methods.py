"""The methods that toybench compares, as `methods.json` describes them: changes of this project's own configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mifo.config import LearnConfig, SynthesisConfig
from mifo.presets import ASSETS, learn_preset, scale_steps


@dataclass(frozen=True)
class Training:
    """`kind`: 'product' (learn and a bundle), 'pairs' or 'full' (trained in memory: no bundle holds them)."""

    kind: str
    config: LearnConfig


@dataclass(frozen=True)
class Method:
    """A row of the table, as `methods.json` describes it.

    `change` and `drawing`: settings by dotted name, of `LearnConfig` and of `SynthesisConfig`; `*.` stands for both phases.
    `steps`: 'as they are' (more for more than three things), 'all in embedding' and 'all in lora' (the same total in one phase),
    or 'of three' (however many things there are). `training`: the method whose learned assets are drawn. `boxes`: false where
    nothing keeps assets to boxes.
    """

    training: str
    group: str
    recipe: str = "mifo"
    kind: str = "product"
    steps: str = "as they are"
    change: Mapping[str, Any] = field(default_factory=dict)
    drawing: Mapping[str, Any] = field(default_factory=dict)
    boxes: bool = True

    @property
    def only_boxes(self) -> bool:
        """An ablation of drawing in boxes: assets alone are the same as its training's own method draws."""
        return self.group == "drawing"

    def synthesis(self, config: SynthesisConfig) -> SynthesisConfig:
        changed: SynthesisConfig = _changed(config, self.drawing)
        return changed


def _read_methods(path: Path) -> dict[str, Method]:
    """`like` takes over another entry's settings; raises TypeError for a field that does not exist."""
    entries = json.loads(path.read_text())
    methods = {}
    for name, entry in entries.items():
        whole = {**entries[entry["like"]], **entry} if "like" in entry else entry
        methods[name] = Method(**{"training": name, **{k: v for k, v in whole.items() if k != "like"}})
    return methods


METHODS = _read_methods(Path(__file__).with_name("methods.json"))


def choose_methods(text: str) -> list[str]:
    """Names with commas, or groups: 'tuned' (each after a search of its own), 'published' (steps and rates as papers or usual
    scripts have them), 'main' (both), 'our-rates' (baselines at this project's steps and rates), 'study' (what the attention
    losses are worth), 'ablations', 'all'. All but 'study' hold this project's own. Raises KeyError for an unknown name."""

    def of(*wanted: str) -> list[str]:
        return [name for name, method in METHODS.items() if method.group in wanted]

    groups = {name: ["mifo", *of(name)] for name in ("tuned", "published", "our-rates")}
    groups |= {"main": ["mifo", *of("tuned", "published")], "study": of("study"),
               "ablations": ["mifo", *of("ablation", "drawing")], "all": list(METHODS)}  # fmt: skip
    names = [name for part in text.split(",") for name in groups.get(part.strip(), (part.strip(),))]
    for name in names:
        METHODS[name]
    return list(dict.fromkeys(names))


# --- configurations -----------------------------------------------------------------------------


def training(name: str, seed: int, share: float = 1.0, count: int = 3) -> Training:
    """What a method trains with, for `count` things; `share` of the steps, for quick runs."""
    method = METHODS[name]
    config = _changed(learn_preset("toybox", method.recipe, ASSETS if method.steps == "of three" else count), method.change)
    both = config.embedding.train_steps + config.lora.train_steps
    first, second = {"all in embedding": (both, 0), "all in lora": (0, both)}.get(
        method.steps, (config.embedding.train_steps, config.lora.train_steps)
    )
    config = _changed(config, {"embedding.train_steps": first, "lora.train_steps": second, "seed": seed})
    return Training(method.kind, scale_steps(config, share) if share != 1 else config)


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The configuration with other values at these dotted names; raises AttributeError or TypeError for a name it has not."""
    for name, value in changes.items():
        for phase in ("embedding.", "lora.") if name.startswith("*.") else ("",):
            config = _set(config, (phase + name.removeprefix("*.")).split("."), value)
    return config


def _set(config: Any, names: list[str], value: Any) -> Any:
    inner = value if len(names) == 1 else _set(getattr(config, names[0]), names[1:], value)
    return replace(config, **{names[0]: inner})
