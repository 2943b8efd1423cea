"""What the recipes `defenses` and `interleave` share: M0, data and questions, and a model asked all of them."""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetfilter import models, processes
from forgetfilter.config import JUDGES, ForgetFilterConfig, require_run_data
from forgetfilter.data.loading import load_rows
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.decisions import what_decides
from forgetfilter.defenses import DEFENSES, Defense, Inputs, self_correction
from forgetfilter.errors import ConfigError
from forgetfilter.evaluation.ask import (
    MEASURES,
    SAFETY,
    ask,
    figures,
    leave_out,
    load_judges,
    load_questions,
    write_records,
)
from forgetfilter.evaluation.questions import Figures
from forgetfilter.files import sha256
from forgetfilter.forgetting import find_m0, load_data, named_model
from forgetfilter.runs import Run, git_sha, locked

Cell = dict[str, Any]
"""What cells/KEY.json holds: what was trained, its facts and its figures by measure."""


@dataclass(kw_only=True)
class TrialSettings:
    """Settings of the recipes that train and ask; all others are those of `filter`.

    Args:
        evaluate: Measure (bias, toxicity, harmfulness, qa, arithmetic) -> data set; docs/evaluation.md has the columns.
        notions: What the data may be unsafe about, for self_correction; by default the measures of safety.
        max_questions: Questions a measure at most, drawn by the seed.
        toxicity_model: Classifier for the toxicity measure.
        guard_model: Guard model for the harmfulness measure.
    """

    evaluate: dict[str, str]
    notions: list[str] | None = None
    max_questions: int | None = None
    toxicity_model: str = JUDGES["toxicity"]
    guard_model: str = JUDGES["harmfulness"]

    def __post_init__(self) -> None:
        """Check every setting; raises ConfigError."""
        unknown = [name for name in self.evaluate if name not in MEASURES]
        if unknown or not self.evaluate:
            raise ConfigError(f"evaluate: {', '.join(unknown) or 'nothing'}; measures are {', '.join(MEASURES)}.")
        if self.notions is None:
            self.notions = [name for name in self.evaluate if name in SAFETY]
        if not self.notions or not set(self.notions) <= set(SAFETY):
            raise ConfigError(f"notions: one or more of {', '.join(SAFETY)}, or a measure of safety to take them from.")
        if self.max_questions is not None and self.max_questions < 1:
            raise ConfigError(f"max_questions is {self.max_questions}: it must be 1 or more.")

    def require(self, defenses: list[str]) -> None:
        """Raise ConfigError unless all of them are known, and named once."""
        if len(set(defenses)) < len(defenses):
            raise ConfigError(f"defenses: {', '.join(defenses)}; name each once.")
        unknown = [name for name in defenses if name not in DEFENSES]
        if unknown or not defenses:
            raise ConfigError(f"defenses: {', '.join(unknown) or 'none named'}; there are {', '.join(DEFENSES)}.")


class Trial:
    """One folder of cells, all from the same M0 and data, all asked the same."""

    def __init__(self, config: ForgetFilterConfig, settings: TrialSettings, recipe: dict[str, Any]) -> None:
        """Load and check everything; nothing is written before `opened`."""
        require_run_data(config)
        if processes.count() > 1:
            raise ConfigError(f"recipe {recipe['name']} needs a single process.")
        self.config, self.settings, self.recipe = config, settings, recipe
        asked = load_questions(settings.evaluate, settings.max_questions, config.seed)
        named, self.tokenizer = named_model(config)
        self.chat = ChatTokenizer(self.tokenizer, config.max_length)
        self.noisy, self.safe = load_data(config, self.chat)
        taught = [*self.noisy.examples, *self.safe.examples]
        if config.alignment_dataset_name is not None:
            taught += load_rows(config.alignment_dataset_name, "alignment_dataset_name", self.chat, config).examples
        words = self_correction.words(settings.notions or [])
        self.questions, self.left_out = leave_out(asked, self.chat, taught, *words)
        self.folder = find_m0(config, named, self.tokenizer)

    @contextmanager
    def opened(self) -> Iterator["Trial"]:
        """Hold the folder, as a new one or as the one to continue."""
        names = {"toxicity": self.settings.toxicity_model, "harmfulness": self.settings.guard_model}
        names = {measure: name for measure, name in names.items() if measure in self.questions}
        files = self.settings.evaluate
        facts = {
            "model": {"name": self.config.model_name_or_path, "sha256": models.weights_hash(self.folder)},
            "noisy": self.noisy.facts(),
            "safe": self.safe.facts(),
            "asked": {name: sha256(Path(path)) if Path(path).is_file() else path for name, path in files.items()},
            "judges": names,
            "decision": what_decides(self.config),
            "recipe": {**self.recipe, "notions": self.settings.notions, "max_questions": self.settings.max_questions},
        }
        with locked(Path(str(self.config.output_dir))):
            self.run = Run.start(self.config, facts)
            self.judges = load_judges(names)
            self.started, self.made = time.monotonic(), 0
            yield self

    def inputs(self, seed: int) -> tuple[Inputs, ForgetFilterConfig]:
        """What a defense is given under a seed: M0 is the same under all, the adapter's start and the order are not."""
        config = dataclasses.replace(self.config, seed=seed)
        learner = models.load_learner(self.folder, self.tokenizer, config)
        return Inputs(self.run, learner, self.chat, self.noisy, self.safe, self.settings.notions or []), config

    def ahead(self, keys: Sequence[str]) -> str:
        """How long the cells that are not done will take, once one of them is."""
        left = sum(not self.run.done(f"cells/{key}") for key in keys)
        minutes = (time.monotonic() - self.started) / max(1, self.made) * left / 60
        return f", about {max(1, round(minutes))} min left" if self.made and left else ""

    def questions_asked(self) -> str:
        """The questions in words."""
        return ", ".join(f"{len(questions)} questions of {name}" for name, questions in self.questions.items())

    def cell(self, key: str, inputs: Inputs, config: ForgetFilterConfig, make: Defense, **about: Any) -> Cell:
        """Train, ask and note, unless the cell was done before; what was not judged then is judged from its answers.

        Args:
            key: Its name, for files.
            inputs: What the defense is given; its learner is asked.
            config: The settings, with the cell's seed.
            make: Makes the model.
            about: What else the cell's file should say.
        """
        paths = [self.run.folder / "cells" / f"{key}{suffix}" for suffix in (".json", ".jsonl")]
        if not self.run.done(f"cells/{key}"):
            result = make(inputs, config)
            inputs.learner.restore(result.model)
            found, records = {}, []
            for name, questions in self.questions.items():
                sentence = result.sentence if name in SAFETY else ""
                reasoning = result.reasoning if name == "bias" else ""
                answers = ask(inputs.learner, self.chat, questions, f"{key}: {name}", sentence, reasoning)
                found[name] = {**figures(name, answers, self.judges.get(name)), "left_out": self.left_out[name]}
                records += answers.records(name)
            model = None if result.model is None else str(result.model.relative_to(self.run.folder))
            cell = {**about, "git_sha": git_sha(), "model": model, "facts": result.facts, "figures": found}
            write_records(paths[1], records)
            self.run.write_json(f"cells/{key}.json", cell)
            self.run.mark(f"cells/{key}", paths)
            self.made += 1
        cell = dict(json.loads(paths[0].read_text(encoding="utf-8")))
        if self._judge(cell["figures"], paths[1]):
            self.run.write_json(f"cells/{key}.json", cell)
            self.run.mark(f"cells/{key}", paths)
        return cell

    def _judge(self, found: dict[str, Figures], answers: Path) -> bool:
        """Judge stored answers that no judge was there for; whether there was anything to do."""
        missing = [name for name in found if "not_run" in found[name] and callable(self.judges.get(name))]
        lines = answers.read_text(encoding="utf-8").split("\n") if missing else []
        records = [json.loads(line) for line in lines if line]
        for name in missing:
            texts = [record["answer"] for record in records if record["measure"] == name]
            judge = self.judges[name]
            found[name] |= judge(self.questions[name], texts) if callable(judge) else {}
            del found[name]["not_run"]
        return bool(missing)
