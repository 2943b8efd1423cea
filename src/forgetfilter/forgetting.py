"""ForgetFilter itself (Zhao et al., ICML 2024, arXiv 2312.12736, algorithm 1).

A model forgets unsafe examples much more than others when it reviews safe data:

1. keep M0, the aligned model;
2. noisy = M0 finetuned on all of the noisy data;
3. reviewed = the noisy model finetuned on safe data (for the default signal it is reviewed on, more firmly);
4. drop every row whose forgetting, signal(noisy) - signal(reviewed), is above the threshold (for the default
   signal the more telling of both reviews, measured against what the row had learnt: scores.py);
5. the final model = M0, not the noisy model, finetuned on what is left.

This file runs the steps; how a model is trained, read and loaded, how a threshold is found and what
a run's folder holds stand in files of their own.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from forgetfilter import models, processes
from forgetfilter.config import ForgetFilterConfig, StageSettings
from forgetfilter.data.loading import Rows, load_rows, require_column, tokenize, write_malformed
from forgetfilter.data.tokenization import ChatTokenizer, mean_length
from forgetfilter.decisions import Result, check_marks, decision_digest, is_decided, read_scores, settle
from forgetfilter.errors import ConfigError, RunError
from forgetfilter.files import whole_file, whole_folder
from forgetfilter.runs import Run, locked, refuse_foreign
from forgetfilter.signals import SHARDS, store
from forgetfilter.training import seconds_a_row, train

_NOT_OF_M0 = ("alignment_dataset_name", "noisy", "review", "final", "signal", "per_device_eval_batch_size")
"""Settings that leave an M0 made by finetuning as it is; of the alignment data its rows count, not where they lie."""


class ForgetFilter:
    """The filter: give it noisy and safe data, get kept rows, scores, and a model.

    Args:
        config: All settings; without an output_dir a temporary folder is made.
        learner: M0 with its adapter, if it is loaded already (by these settings); it is loaded otherwise.
    """

    def __init__(self, config: ForgetFilterConfig | None = None, learner: models.Learner | None = None) -> None:
        """Keep the settings; nothing is loaded before fit."""
        config = config or ForgetFilterConfig()
        self.learner = learner
        if processes.count() > 1 and config.output_dir is None:
            raise ConfigError("output_dir is missing: several processes need a folder they share.")
        folder = config.output_dir or tempfile.mkdtemp(prefix="forgetfilter-")
        marks = config.trusted_rows and str(Path(config.trusted_rows).absolute())
        self.config = dataclasses.replace(config, output_dir=folder, trusted_rows=marks)

    def fit(self, noisy: Any = None, safe: Any = None) -> Result:
        """Steps 1 to 4 of the algorithm: score every row of the noisy data and decide.

        What an earlier, interrupted fit left in the run's folder is not done again.

        Args:
            noisy: A path, Hub id, datasets.Dataset or list of dicts; by default config.dataset_name.
            safe: The safe data to review, likewise; by default config.safe_dataset_name.

        Raises:
            ForgetFilterError: One of its children, for bad settings, data, models or folders.
        """
        self._load_data(noisy, safe)
        with locked(Path(str(self.config.output_dir))):
            self._open_run()
            looks = self.config.looks
            if not all(self.run.done(part) for part in (*looks[1:], *(f"{look}/signals" for look in looks))):
                self._measure_forgetting()
            elif is_decided(self.run):
                if processes.first():
                    print(f"{self.run.folder}: finished before, nothing to do; its decision stays.")
                return Result(self.run)
            if processes.first():
                settle(self.run)
            processes.together()
            return Result(Run.open(self.run.folder))

    def _measure_forgetting(self) -> None:
        model = self.learner or models.load_learner(self.folder, self.tokenizer, self.config)
        stages = [(self.stage(name), self.noisy if name == "noisy" else self.safe) for name in self.config.looks[1:]]
        model.prepare(sum(settings.rows() * mean_length(rows.trainable()) for settings, rows in stages))
        self._announce(model)

        m0 = None
        self._measure(model, m0, "base")

        noisy_model = self._train(model, m0, self.noisy, "noisy")
        self._measure(model, noisy_model, "noisy")

        reviewed_model = self._train(model, noisy_model, self.safe, "review")
        self._measure(model, reviewed_model, "review")

        if "firm" in self.config.looks:
            firmly_reviewed_model = self._train(model, reviewed_model, self.safe, "firm")
            self._measure(model, firmly_reviewed_model, "firm")

    def _announce(self, model: models.Learner) -> None:
        """Say how long it will take, from a measurement on this machine."""
        rows = self.noisy.trainable()
        noisy, final = self.stage("noisy"), self.config.stage("final", len(rows))
        reviews = [self.stage(name) for name in self.config.looks[2:]]
        minutes = seconds_a_row(model, rows) / 60 / processes.count()
        if not processes.first():
            return
        passes = len(self.config.looks) * len(rows) / 3  # a pass costs a third of training
        scoring = minutes * (noisy.rows() + sum(review.rows() for review in reviews) + passes)
        steps = f"{noisy.max_steps} noisy and {sum(review.max_steps for review in reviews)} review steps"
        answers = " and the answers for rouge1" if "rouge1" in self.config.signals else ""
        print(
            f"about {max(1, round(scoring))} min ({steps}, {len(self.config.looks)} scoring passes{answers}), "
            f"then {max(1, round(minutes * final.rows()))} min at most to finetune",
            flush=True,
        )

    def _load_data(self, noisy: Any, safe: Any) -> None:
        """Find M0, read both data sets and check every row; writes nothing."""
        config = self.config
        named, self.tokenizer = named_model(config)
        self.noisy, self.safe = load_data(config, ChatTokenizer(self.tokenizer, config.max_length), noisy, safe)
        self.folder = find_m0(config, named, self.tokenizer)

    def _open_run(self) -> None:
        if not processes.first():
            processes.together()
            self.run = Run.open(str(self.config.output_dir))
            processes.together()  # or the first one may have decided before all have looked
            return
        self.run = Run.start(
            self.config,
            {
                "model": {"name": self.config.model_name_or_path, "sha256": models.weights_hash(self.folder)},
                "noisy": self.noisy.facts(),
                "safe": self.safe.facts(),
            },
            {
                "also_safe": self.noisy.shared_with(self.safe),
                "repeated": self.noisy.repeated(),
                "spelt_specials": sum(example.spelt_specials for example in self.noisy.examples),
            },
        )
        if not self.run.done("rows"):
            with whole_folder(self.run.stage("tokenizer")) as folder:  # the report tells tokens apart by it
                self.tokenizer.save_pretrained(folder)
            malformed = [*self.noisy.malformed, *self.safe.malformed]
            if malformed:
                with whole_file(self.run.folder / "malformed.jsonl") as path:
                    write_malformed(path, malformed)
            self.run.keep_rows(self.noisy.source)
        processes.together()
        processes.together()

    def stage(self, name: str) -> StageSettings:
        """Settings and length of the noisy or the review stage."""
        noisy = self.config.stage("noisy", len(self.noisy.trainable()))
        return noisy if name == "noisy" else self.config.stage(name, len(self.safe.trainable()), noisy.max_steps)

    def _train(self, model: models.Learner, start: Path | None, rows: Rows, name: str) -> Path:
        """Train a stage from another stage's weights (None: from M0); returns where its own are."""
        folder = self.run.stage(name)
        if not self.run.done(name):
            self.run.begin(name)
            shutil.rmtree(folder / SHARDS, ignore_errors=True)
            model.restore(start)
            facts = train(model, rows.trainable(), self.stage(name), folder / "checkpoints", f"{name} stage")
            _save(model, folder / "model")
            model.stage = folder / "model"
            self.run.mark(name, sorted((folder / "model").iterdir()), **facts)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return folder / "model"

    def _measure(self, model: models.Learner, stage: Path | None, name: str) -> None:
        """Store every signal of the model as it is after a stage, for every noisy row."""
        if self.run.done(f"{name}/signals"):
            return
        model.restore(stage)
        what = {"base": "M0", "noisy": "noisy model", "review": "reviewed model", "firm": "firmly reviewed model"}[name]
        path = self.run.stage(name) / "signals.parquet"
        store(model, self.noisy.examples, ["log_likelihood"] if name == "firm" else self.config.signals, what, path)
        self.run.mark(f"{name}/signals", [path])


def finetune(run: Run, *, trust_remote_code: bool = False) -> Path:
    """Step 5 of the algorithm: finetune M0 on the kept rows.

    Args:
        run: A decided run.
        trust_remote_code: Run model code that comes with the model; the run's folder alone cannot ask for it.

    Returns:
        The folder of the final model: a LoRA adapter, or all weights with use_peft off.

    Raises:
        RunError: If the run has no decision yet, keeps nothing, or M0's weights have changed.
    """
    with locked(run.folder):
        run.reload()
        config = dataclasses.replace(run.config(), trust_remote_code=trust_remote_code)
        scores = read_scores(run)
        digest = decision_digest(scores)
        if run.done("final") and run.manifest["stages"]["final"]["decision"] == digest:
            return run.folder / "model"
        kept = [row for row, decision in enumerate(scores["decision"].to_pylist()) if decision == "kept"]
        if not kept:
            raise RunError(f"{run.folder}: no row was kept, so there is nothing to finetune on.")
        named, tokenizer = named_model(config)
        folder = find_m0(config, named, tokenizer)
        if models.weights_hash(folder) != run.manifest["model"]["sha256"]:
            raise RunError(f"{config.model_name_or_path}: its weights are not those the rows were scored with.")
        chat = ChatTokenizer(tokenizer, config.max_length)
        examples = tokenize(run.rows().select(kept), chat, row_format=run.manifest["noisy"]["format"]).trainable()
        model = models.load_learner(folder, tokenizer, config)
        checkpoints = run.stage("final") / digest[:12]
        settings = config.stage("final", len(examples))
        model.prepare(settings.rows() * mean_length(examples))
        facts = train(model, examples, settings, checkpoints, "final stage")
        run.manifest["stages"].pop("final", None)
        run.save()
        _save(model, run.folder / "model", tokenizer)
        run.mark("final", sorted((run.folder / "model").iterdir()), decision=digest, **facts)
        shutil.rmtree(run.stage("final"), ignore_errors=True)
        return run.folder / "model"


def load_data(
    config: ForgetFilterConfig, chat: ChatTokenizer, noisy: Any = None, safe: Any = None
) -> tuple[Rows, Rows]:
    """The noisy and the safe rows, by default those the config names, read and checked."""
    noisy_rows = load_rows(config.dataset_name if noisy is None else noisy, "dataset_name", chat, config)
    require_column(noisy_rows.source, config.label_column)
    check_marks(noisy_rows.source, [example.scorable for example in noisy_rows.examples], config)
    return noisy_rows, load_rows(config.safe_dataset_name if safe is None else safe, "safe_dataset_name", chat, config)


def named_model(config: ForgetFilterConfig) -> tuple[Path, PreTrainedTokenizerBase]:
    """Weights and tokenizer of the model named."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = models.find_weights(config.model_name_or_path)
    return folder, models.load_tokenizer(folder, config)


def find_m0(config: ForgetFilterConfig, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """M0's weights: those of the model named, first finetuned on the alignment data if there is any."""
    if config.alignment_dataset_name is None:
        return folder
    rows = load_rows(
        config.alignment_dataset_name, "alignment_dataset_name", ChatTokenizer(tokenizer, config.max_length), config
    )
    settings = config.stage("final", len(rows.trainable()))
    identity = {name: value for name, value in config.identity().items() if name not in _NOT_OF_M0}
    parts = [models.weights_hash(folder), rows.facts(), dataclasses.asdict(settings), identity]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    name = f"aligned-{digest[:16]}"
    aligned = models.cache_folder() / name
    if not aligned.exists():
        refuse_foreign(Path(str(config.output_dir)))  # as the run would, after the training
        model = models.load_learner(folder, tokenizer, dataclasses.replace(config, dtype="float32"))
        with tempfile.TemporaryDirectory() as checkpoints:
            model.prepare(settings.rows() * mean_length(rows.trainable()))
            train(model, rows.trainable(), settings, Path(checkpoints), "alignment")
        if processes.first():
            models.cached(name, model.save_merged)
        processes.together()
    return aligned


def _save(model: models.Learner, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """The first process saves the learner as it is now; all go on once it has."""
    if processes.first():
        with whole_folder(folder) as temporary:
            model.save(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
    processes.together()
