"""Experiments from a YAML file: `forgetfilter compare --config compare.yaml`, one recipe a file."""

import importlib
from pathlib import Path

import yaml

from forgetfilter.errors import ConfigError

RECIPES = ("curves",)


def run(path: Path) -> list[Path]:
    """Run the recipe a YAML file names, or what is left of it.

    Args:
        path: The file: `recipe`, the recipe's own settings, and flags of `filter`.

    Returns:
        The files that show the result.

    Raises:
        ConfigError: If the file cannot be read, or a setting is unknown, missing or impossible.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(settings, dict) or settings.get("recipe") not in RECIPES:
        raise ConfigError(f"{path}: needs a line `recipe: NAME`, with one of {', '.join(RECIPES)}.")
    recipe = importlib.import_module(f"{__name__}.{settings.pop('recipe')}")
    shown: list[Path] = recipe.run(settings)
    return shown
