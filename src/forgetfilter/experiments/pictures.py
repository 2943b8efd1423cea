"""Pictures of recipes, with matplotlib, which is an extra."""

import importlib.util
from pathlib import Path
from typing import Any

from forgetfilter.errors import ConfigError
from forgetfilter.files import whole_file


def require_plots() -> None:
    """Raise ConfigError, before any work, if there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the picture needs matplotlib: `pip install matplotlib`.")


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write a figure as NAME.png and NAME.svg; the same figure gives the same files."""
    import matplotlib

    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        undated = {"Date": None} if path.suffix == ".svg" else None
        with whole_file(path) as temporary, matplotlib.rc_context({"svg.hashsalt": name}):
            figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=undated)
    return paths
