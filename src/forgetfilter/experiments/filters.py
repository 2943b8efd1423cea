"""Recipe filters: score the same rows with several filters, and compare each one with the labels."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from forgetfilter import config as config_module
from forgetfilter import processes
from forgetfilter.config import ForgetFilterConfig, require_run_data
from forgetfilter.data.loading import Data, load_data, stored_labels
from forgetfilter.decision import rules
from forgetfilter.decision.decide import check_marks, decide_by_config
from forgetfilter.decision.opened import decision_settings
from forgetfilter.decision.outputs import decision_figures
from forgetfilter.errors import ConfigError
from forgetfilter.evaluation.filter_quality import ranking_quality
from forgetfilter.experiments.cells import Cell, Cells
from forgetfilter.files import whole_file
from forgetfilter.filters import arguments_of, filter_constants, require_filters, score
from forgetfilter.methods import constants
from forgetfilter.model.memory import free_dropped_models
from forgetfilter.report.compare_page import write_compare_page
from forgetfilter.runs import Run, git_sha, locked
from forgetfilter.summary import show
from forgetfilter.workshop import M0, Workshop

SHOWN = (
    *("average_precision", "auroc", "recall_at_1", "recall_at_2"),
    *("f1", "best_f1", "flag_all_f1", "clean_dropped", "seconds"),
)
"""Figures for the table."""


@dataclass(kw_only=True)
class Settings:
    """The recipe's own settings; all others are those of `filter`, which needs label_column here.

    Args:
        filters: Which to compare.
        seeds: Seeds to score with; by default the run's seed.
    """

    filters: list[str] = field(default_factory=lambda: ["forgetting", "m0_loss", "words", "random"])
    seeds: list[int] | None = None

    def __post_init__(self) -> None:
        """Check every setting; raises ConfigError."""
        if not self.filters or len(set(self.filters)) < len(self.filters):
            raise ConfigError(f"filters: {', '.join(self.filters) or 'none named'}; name each once.")
        seeds = self.seeds
        if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
            raise ConfigError(f"seeds are {seeds}: name different ones, or leave it out.")


def compare(config: ForgetFilterConfig, settings: Settings) -> list[Path]:
    """Score and decide, filter by filter; what is done is not done again.

    Returns:
        compare.json, compare.md and compare.html.
    """
    require_run_data(config)
    config = dataclasses.replace(config, filter=",".join(settings.filters))
    require_filters(config)
    if config.label_column is None or processes.count() > 1:
        raise ConfigError("recipe filters needs label_column, to compare the filters with, and a single process.")
    m0 = M0.named(config)
    data = load_data(config, m0.chat)
    check_marks(data.noisy, config)
    m0 = m0.aligned(config)
    seeds = settings.seeds or [config.seed]
    with locked(Path(str(config.output_dir))):
        facts = {"model": {"name": config.model_name_or_path, "sha256": m0.sha256}, **data.facts()}
        run = Run.start(config, {**facts, "recipe": {"name": "filters"}})
        found: dict[str, list[Cell]] = {name: [] for name in settings.filters}
        for seed in seeds:
            workshop = Workshop(m0, dataclasses.replace(config, seed=seed), run)
            for name in settings.filters:
                found[name].append(_cell(workshop, data, name))
            del workshop  # and its model, before the next seed's is loaded
            free_dropped_models()
        run.write_json("compare.json", {"cells": found})
        text = table(found)
        print(f"\n{text}\n")
        with whole_file(run.folder / "compare.md") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        about = f"{len(found)} filters on the same {len(data.noisy.examples)} rows, {len(seeds)} seeds each."
        page = write_compare_page(run.folder, "Filters side by side", about, text, [])
        return [run.folder / "compare.json", run.folder / "compare.md", page]


def _cell(workshop: Workshop, data: Data, name: str) -> Cell:
    """One filter under one seed: every row's score and decision, and the figures."""
    config, run = workshop.config, workshop.run
    parameters = arguments_of(name, config)
    shared = {part: run.manifest[part] for part in ("model", "noisy", "safe")}
    own = {"filter": name, "parameters": parameters, "constants": all_constants(name)}
    made_of = {**shared, **own, "settings": config.identity(), "decision": decision_settings(config)}

    def make() -> Cell:
        started = time.monotonic()
        scored = score(workshop, data, name)
        seconds = time.monotonic() - started
        made = decide_by_config(name, scored, data.noisy.source, config)
        labels = stored_labels(data.noisy.source, config)
        assert labels is not None, "run asks for a label column"
        quality = {**decision_figures({name: scored}, made, labels), **ranking_quality(labels, scored.suspicion)}
        return {
            "filter": name,
            "seed": config.seed,
            "git_sha": git_sha(),
            "figures": {**quality, "seconds": round(seconds, 1)},
            "suspicion": [None if np.isnan(value) else round(float(value), 6) for value in scored.suspicion],
            "decision": made.words,
        }

    return Cells(run.folder / "cells").once(f"{name}-{config.seed}", made_of, make)


def all_constants(name: str) -> dict[str, Any]:
    """Every constant that a filter's scores and decisions depend on: of its own file, of the rules and of config.py."""
    return {**constants(config_module, rules), **filter_constants(name)}


def table(found: dict[str, list[Cell]]) -> str:
    """A Markdown table with one line for each filter: means over the seeds ± sample standard deviation."""
    lines = ["| filter | " + " | ".join(name.replace("_", " ") for name in SHOWN) + " |"]
    lines.append("|---" * (len(SHOWN) + 1) + "|")
    for name, cells in found.items():
        shown = [_mean([cell["figures"].get(figure) for cell in cells]) for figure in SHOWN]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _mean(values: Sequence[Any]) -> str:
    numbers = [float(value) for value in values if value is not None]
    if len(numbers) < len(values):
        return show(None)
    spread = f" ± {show(statistics.stdev(numbers))}" if len(numbers) > 1 else ""
    return show(statistics.mean(numbers)) + spread
