"""Experiments from a YAML file: `forgetfilter compare --config compare.yaml`, one recipe a file."""

import importlib
from argparse import ArgumentError
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.errors import ConfigError

RECIPES = ("defenses", "filters", "interleave", "curves", "compose")
UNUSED = {
    **dict.fromkeys(("defenses", "filters", "interleave", "compose"), ("filter", "planted_rows")),
    "curves": (
        "filter",
        "planted_rows",
        "parameters",
        "threshold",
        "drop_share",
        "trusted_rows",
        "unsafe_dataset_name",
        "sample_rows",
        "safe_dataset_name",
        "label_column",
        "unscored",
        "unreadable",
        "max_clean_loss",
    ),
}
"""Settings of `filter` that one would think had an effect, by recipe. What is compared is named in the recipe's own."""


def compare(path: Path) -> list[Path]:
    """Run the recipe a YAML file names, or what is left of it.

    Args:
        path: The file: `recipe` (by default defenses), its own settings (its Settings), and flags of `filter`.

    Returns:
        The files that show the result.

    Raises:
        ConfigError: If the file cannot be read, or a setting is unknown, missing or impossible.
    """
    try:
        named = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    name = named.get("recipe", RECIPES[0]) if isinstance(named, dict) else None
    if name not in RECIPES:
        raise ConfigError(f"{path}: needs a line `recipe: NAME`, with one of {', '.join(RECIPES)}.")
    recipe = importlib.import_module(f"{__name__}.{name}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=str)
    own = parser.add_class_arguments(recipe.Settings)
    parser.add_class_arguments(ForgetFilterConfig)
    try:
        values = parser.parse_path(str(path)).as_dict()
    except ArgumentError as error:
        raise ConfigError(f"{path}: {error}") from error
    values.pop("recipe")
    settings = recipe.Settings(**{name: values.pop(name) for name in own})
    config = ForgetFilterConfig.from_flags(values)
    default = ForgetFilterConfig()
    unused = [setting for setting in UNUSED[name] if getattr(config, setting) != getattr(default, setting)]
    if unused:
        raise ConfigError(f"{path}: recipe {name} does not use {' and '.join(unused)}: leave it out.")
    shown: list[Path] = recipe.compare(config, settings)
    return shown
