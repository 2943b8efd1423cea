"""What recipes of defenses share (`defenses`, `compose`, `interleave`): M0, data, and a model asked its questions."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from forgetfilter import processes
from forgetfilter.alignment import aligned
from forgetfilter.config import ForgetFilterConfig, refuse_marked, require_run_data
from forgetfilter.data.loading import Data, load_data, load_rows, stored_labels
from forgetfilter.decision.choice import check_marks
from forgetfilter.decision.opened import decision_settings
from forgetfilter.decision.outputs import decision_figures
from forgetfilter.defenses import constants_of, exists, files_of, names, needs_unsafe, parameters_of, require_inputs
from forgetfilter.defenses.result import Defended
from forgetfilter.defenses.self_correction import SENTENCES, sentence_and_reasoning
from forgetfilter.errors import ConfigError
from forgetfilter.evaluation.ask import (
    MEASURES,
    ask_all,
    leave_out,
    load_judges,
    load_questions,
    name_judges,
    questions_file,
)
from forgetfilter.evaluation.judges import GUARD_MODEL, TOXICITY_MODEL
from forgetfilter.evaluation.questions import Figures
from forgetfilter.experiments.cells import Cell, Cells
from forgetfilter.files import digest, sha256, write_jsonl
from forgetfilter.m0 import M0
from forgetfilter.methods import require_known
from forgetfilter.model.training import require_trackers
from forgetfilter.runs import Run, git_sha, locked
from forgetfilter.workshop import Workshop


@dataclass(kw_only=True)
class TrialSettings:
    """Settings of the recipes that train and ask; all others are those of `filter`.

    Args:
        defenses: Defenses to compare.
        evaluate: Measure -> data set; docs/evaluation.md names the measures and their columns.
        notions: Safety measures that the sentence of self_correction is about; by default those of `evaluate`.
        max_questions: Largest number of questions per measure, drawn with the run's seed; by default all.
        toxicity_model: Classifier for the toxicity measure.
        guard_model: Guard model for the harmfulness measure.
    """

    defenses: list[str] = field(default_factory=list)
    evaluate: dict[str, str]
    notions: list[str] | None = None
    max_questions: int | None = None
    toxicity_model: str = TOXICITY_MODEL
    guard_model: str = GUARD_MODEL

    def __post_init__(self) -> None:
        """Check every setting; raises ConfigError."""
        unknown = [name for name in self.evaluate if name not in MEASURES]
        if unknown or not self.evaluate:
            raise ConfigError(f"evaluate: {', '.join(unknown) or 'nothing'}; measures are {', '.join(MEASURES)}.")
        if self.notions is None:
            self.notions = [name for name in self.evaluate if name in SENTENCES]
        if not self.notions or not set(self.notions) <= set(SENTENCES):
            raise ConfigError(f"notions: name one or more of {', '.join(SENTENCES)}, or evaluate one of them.")
        if self.max_questions is not None and self.max_questions < 1:
            raise ConfigError(f"max_questions is {self.max_questions}: it must be 1 or more.")
        if len(set(self.defenses)) < len(self.defenses):
            raise ConfigError(f"defenses: {', '.join(self.defenses)}; name each once.")
        unknown = [name for name in self.defenses if not exists(name)]
        if unknown or not self.defenses:
            raise ConfigError(f"defenses: {', '.join(unknown) or 'none named'}; there are {', '.join(names())}.")


class Trial:
    """A folder of cells, all made with the same M0, data and questions."""

    def __init__(
        self, config: ForgetFilterConfig, settings: TrialSettings, recipe: dict[str, Any], defenses: Sequence[str]
    ) -> None:
        """Load and check everything; nothing is written before `opened`.

        Args:
            config: All settings of `filter`.
            settings: Those of the recipe.
            recipe: Its name, and what else all cells depend on.
            defenses: All that will be asked for.
        """
        for name in defenses:
            parameters_of(name, config)  # a wrong parameter is found before any work
        require_trackers(config)
        require_run_data(config)
        refuse_marked(config)
        processes.require_one(f"recipe {recipe['name']}")
        require_known(config.parameters, names())
        self.config, self.settings = config, settings
        asked = load_questions(settings.evaluate, settings.max_questions, config.seed)
        m0 = M0.named(config)
        self.data = load_data(config, m0.chat)
        self.data.notions = settings.notions or []
        noisy = self.data.noisy
        check_marks(noisy, config)
        unaligned = Workshop(m0, config)
        for name in defenses:
            require_inputs(name, unaligned, self.data)
        taught = [noisy.examples, self.data.safe.examples]
        if self.data.unsafe is not None and any(needs_unsafe(name, config) for name in defenses):
            taught.append(self.data.unsafe.examples)
        if config.alignment_dataset_name is not None:
            own = load_rows(config.alignment_dataset_name, "alignment_dataset_name", m0.chat, config)
            taught.append(own.examples)
        sentence, reasoning = sentence_and_reasoning(self.data.notions)
        self.questions, self.left_out = leave_out(asked, m0.chat, chain(*taught), sentence, reasoning)
        about = {"notions": settings.notions, "max_questions": settings.max_questions}
        self.known = {**self.data.facts(), "recipe": {**recipe, **about}}
        self.m0 = aligned(m0, config, self.known)

    @contextmanager
    def opened(self) -> Iterator["Trial"]:
        """Lock the folder and open it, as a new run or as the one to continue."""
        judges = {measure: name for measure, name in name_judges(self.settings).items() if measure in self.questions}
        files = {name: questions_file(name, file) for name, file in self.settings.evaluate.items()}
        facts = {
            **self.m0.facts(self.config),
            **self.known,
            "asked": {name: sha256(Path(path)) if Path(path).is_file() else path for name, path in files.items()},
            "judges": judges,
            "decision": decision_settings(self.config),
        }
        with locked(self.config.folder):
            self.run = Run.start(self.config, facts)
            self.cells = Cells(self.run.folder / "cells")
            self.judges = load_judges(judges)
            self.started, self.made = time.monotonic(), 0
            yield self

    def workshop(self, seed: int) -> Workshop:
        """A workshop with this seed, which sets the adapter's first weights and the order of rows, but not M0."""
        return Workshop(self.m0, dataclasses.replace(self.config, seed=seed), self.run)

    def ahead(self, left: int) -> str:
        """A text with the time that `left` cells will take; empty before the first cell is made."""
        minutes = (time.monotonic() - self.started) / max(1, self.made) * left / 60
        return f", about {max(1, round(minutes))} min left" if self.made and left else ""

    def questions_asked(self) -> str:
        """The questions in words."""
        return ", ".join(f"{len(questions)} questions of {name}" for name, questions in self.questions.items())

    def made_of(self, name: str, workshop: Workshop, **about: Any) -> Cell:
        """The inputs of a cell: data, M0 and questions, which all cells of the folder share, and its own ones.

        Args:
            name: The defense.
            workshop: Where its model is made.
            about: What else distinguishes it from other cells.
        """
        shared = {part: self.run.manifest[part] for part in ("settings", "model", "noisy", "safe", "asked", "recipe")}
        config = workshop.config
        shared["questions"] = self._asked
        own = {"decision": decision_settings(config), "final": config.final_settings()}
        own["constants"] = constants_of(name, config)
        if files := files_of(name, config):
            own["files"] = files
        if self.data.unsafe is not None and needs_unsafe(name, config):
            own["unsafe"] = self.data.unsafe.facts()
        return {
            **shared,
            **own,
            "defense": name,
            "parameters": parameters_of(name, config),
            "seed": config.seed,
            **about,
        }

    @cached_property
    def _asked(self) -> str:
        """A hash of the questions, of which those that the training data hold are left out."""
        return digest({name: [*map(dataclasses.asdict, own)] for name, own in self.questions.items()})

    def cell(
        self, key: str, workshop: Workshop, data: Data, made_of: Cell, make: Callable[[], Defended], **about: Any
    ) -> Cell:
        """Train and measure, unless the cell was made before. If a judge was missing then, judge its answers now.

        Args:
            key: Its name, for files.
            workshop: Where its model is made; it is asked there.
            data: What the defense is given.
            made_of: Its inputs.
            make: Makes the model.
            about: What else the cell's file should say.
        """
        answers_file = self.cells.folder / f"{key}.jsonl"

        def train_and_ask() -> Cell:
            with workshop.account.measuring() as cost:
                result = make()
            learner = workshop.on(result.m0).become(result.model)
            found, records = ask_all(
                learner,
                self.m0.chat,
                self.questions,
                self.left_out,
                self.judges,
                what=f"{key}: ",
                sentence=result.sentence,
                reasoning=result.reasoning,
            )
            model = None if result.model is None else str(result.model.relative_to(self.run.folder))
            facts = {**result.facts, **_kept_figures(result, data, workshop.config)}
            write_jsonl(answers_file, records)
            self.made += 1
            if result.m0 is not None:
                facts["m0"] = result.m0.sha256
            made = {"git_sha": git_sha(), "model": model, "facts": facts, "cost": cost.facts()}
            return {**about, **made, "figures": found}

        cell = self.cells.once(key, made_of, train_and_ask, ".jsonl")
        if self._judge(cell["figures"], answers_file):
            self.cells.store(key, made_of, cell, ".jsonl")
        return cell

    def _judge(self, found: dict[str, Figures], answers: Path) -> bool:
        """Judge stored answers for which there was no judge before; return whether there were any."""
        missing = [name for name in found if "not_run" in found[name] and callable(self.judges.get(name))]
        lines = answers.read_text(encoding="utf-8").split("\n") if missing else []
        records = [json.loads(line) for line in lines if line]
        for name in missing:
            texts = [record["answer"] for record in records if record["measure"] == name]
            judge = self.judges[name]
            found[name] |= judge(self.questions[name], texts) if callable(judge) else {}
            del found[name]["not_run"]
        return bool(missing)


def _kept_figures(result: Defended, data: Data, config: ForgetFilterConfig) -> dict[str, Any]:
    """Figures of the decision of a defense's filter; empty for a defense without a filter."""
    if result.kept is None:
        return {}
    decision, labels = result.kept.decision, stored_labels(data.noisy.source, config)
    return decision_figures({decision.filter: result.kept.scored}, decision, labels)
