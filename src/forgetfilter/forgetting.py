"""ForgetFilter itself (Zhao et al., ICML 2024, arXiv 2312.12736, algorithm 1).

A model forgets unsafe examples much more than others when it reviews safe data:

1. keep M0, the aligned model;
2. noisy = M0 finetuned on all of the noisy data;
3. reviewed = the noisy model finetuned on safe data;
4. drop every row whose forgetting, from the noisy to the reviewed model, is above the threshold;
5. the final model = M0, not the noisy model, finetuned on what is left.

`fit` scores the rows, by steps 1 to 3 (filters/forgetting.py) or by any other filter, and decides (decision/);
`finetune` is step 5.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from forgetfilter import processes
from forgetfilter.alignment import aligned, m0_of_run
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data, Rows, load_data, tokenize
from forgetfilter.data.planted import Planted, plant
from forgetfilter.data.unreadable import unreadable
from forgetfilter.decision.choice import check_marks
from forgetfilter.decision.decide import settle
from forgetfilter.decision.opened import is_decided, kept_rows, require_marks_decided
from forgetfilter.decision.outputs import last_digest
from forgetfilter.errors import ConfigError, ForgetFilterError
from forgetfilter.files import whole_file, whole_folder, write_jsonl
from forgetfilter.filters import require_filters, require_inputs, unused
from forgetfilter.filters.scoring import score
from forgetfilter.m0 import M0
from forgetfilter.model.training import require_trackers
from forgetfilter.progress import say
from forgetfilter.result import Result
from forgetfilter.runs import Run, locked, refuse_foreign
from forgetfilter.workshop import Workshop


class ForgetFilter:
    """Scores the rows of noisy data with the help of safe data, and decides which rows to keep.

    Args:
        config: All settings; without an output_dir a temporary folder is made.

    Raises:
        ConfigError: If a filter or parameter in the config does not exist, or several processes have no output_dir.
    """

    def __init__(self, config: ForgetFilterConfig | None = None) -> None:
        """Keep the settings; nothing is loaded before fit."""
        config = config or ForgetFilterConfig()
        require_filters(config)
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
        config = self.config
        require_trackers(config)
        refuse_foreign(config.folder)
        m0 = M0.named(config)
        data = load_data(config, m0.chat, noisy, safe)
        check_marks(data.noisy, config)
        _look_ahead(Workshop(m0, config), data)
        planted = _planted(data.noisy, m0, config)
        m0 = aligned(m0, config, _facts(data, planted))
        with locked(config.folder):
            run = open_run(config, m0, data, planted)
            if planted is not None and run.planted():
                data = dataclasses.replace(data, planted=planted.rows)
            workshop = Workshop(m0, config, run)
            for name in config.filters:
                score(workshop, data, name)
            return _decided(run, config)


def _planted(noisy: Rows, m0: M0, config: ForgetFilterConfig) -> Planted | None:
    """The rows to plant; those that an older version has planted in a run that goes on."""
    found = plant(noisy, m0.chat, config)
    if found is None or not (config.folder / "manifest.json").exists():
        return found
    noted = Run.open(config.folder).manifest.get("planted")
    if noted is not None and noted != found.facts():
        before = plant(noisy, m0.chat, config, as_before=True)
        return before if before is not None and before.facts() == noted else found
    return found


def _decided(run: Run, config: ForgetFilterConfig) -> Result:
    """A scored run with the decision that the settings ask for: the one that stands, or one taken now."""
    before = (run.folder / "config.yaml").read_bytes()
    if processes.is_main_process():
        run.keep_config(config)
    if processes.is_so_for_everyone(is_decided(run, config)):
        say(f"{run.folder}: finished before, nothing to do; its decision stays.")
        return Result(run)
    run.save()
    if processes.is_main_process():
        try:
            settle(run)
        except ForgetFilterError:  # the flags that it failed by must not stay: later commands would fail, too
            with whole_file(run.folder / "config.yaml") as temporary:
                temporary.write_bytes(before)
            raise
    processes.wait_for_everyone()
    return Result(Run.open(run.folder))


def _look_ahead(workshop: Workshop, data: Data) -> None:
    """Say before any work what would go wrong in the middle of it, and which settings have no effect."""
    folder = workshop.config.folder
    scored = Run.open(folder).manifest.get("filters", {}) if (folder / "manifest.json").exists() else {}
    for name in workshop.config.filters:
        if name not in scored:
            require_inputs(name, workshop, data)
    for note in unused(workshop.config):
        say(note)


def open_run(config: ForgetFilterConfig, m0: M0, data: Data, planted: Planted | None = None) -> Run:
    """The run's folder, as a new one or as the one to continue, with a copy of the noisy rows; locked by the caller.

    Raises:
        RunError: If the folder holds something else.
    """
    if processes.is_main_process():
        run = _started(config, m0, data, planted)
    processes.wait_for_everyone()
    if not processes.is_main_process():
        run = Run.open(config.folder)
    processes.wait_for_everyone()  # nobody changes the manifest before all have read it
    return run


def _facts(data: Data, planted: Planted | None) -> dict[str, Any]:
    """What a run notes of all data."""
    return {**data.facts(), "planted": None if planted is None else planted.facts()}


def _started(config: ForgetFilterConfig, m0: M0, data: Data, planted: Planted | None) -> Run:
    """What the first process does of `open_run`."""
    noisy = data.noisy
    facts = {**m0.facts(config), **_facts(data, planted)}
    notes = {
        "also_safe": noisy.shared_with(data.safe),
        "repeated": int(noisy.copies().sum()),
        "spelt_specials": sum(example.spelt_specials for example in noisy.examples),
        "unread": noisy.unread,
        "chat_template": m0.template_note(),
    }
    run = Run.start(config, facts, notes, settled=False)
    if not run.done("rows"):
        with whole_folder(run.stage("tokenizer")) as folder:  # the report splits texts into tokens with it
            m0.tokenizer.save_pretrained(folder)
        beside = (part for part in (data.safe, data.unsafe, planted) if part is not None)
        malformed = [*noisy.malformed, *(row for part in beside for row in part.malformed)]
        if malformed:
            write_jsonl(run.folder / "malformed.jsonl", malformed)
        run.keep_rows(noisy.source)
    if planted is not None and run.manifest.get("planted") and not run.done("planted"):  # none in a run of before
        hard = unreadable(planted.rows.source, planted.rows.row_format, m0.tokenizer).tolist()
        run.keep_planted([{**about, "unreadable": own} for about, own in zip(planted.about, hard, strict=True)])
    if not run.done("unreadable"):
        run.keep_unreadable(unreadable(noisy.source, noisy.row_format, m0.tokenizer))
    run.forget_damaged()
    return run


def finetune(run: Run, *, trust_remote_code: bool = False) -> Path:
    """Step 5 of the algorithm: finetune M0 on the kept rows.

    Args:
        run: A decided run.
        trust_remote_code: Run model code that comes with the model; the run's folder alone cannot ask for it.

    Returns:
        The folder of the final model: a LoRA adapter, or all weights with use_peft off.

    Raises:
        RunError: If the run has no decision yet, or rows were marked after it, or it keeps nothing, or M0's weights
            have changed.
    """
    with locked(run.folder):
        run.reload()
        config = dataclasses.replace(run.config(), trust_remote_code=trust_remote_code)
        require_trackers(config)
        digest, asked = last_digest(run), config.final_settings()
        require_marks_decided(run)
        final = run.manifest["stages"].get("final", {})
        if run.done("final") and final.get("decision") == digest and final.get("asked", asked) == asked:
            return run.folder / "model"
        kept = kept_rows(run, "finetune on")
        m0 = m0_of_run(run, config)
        examples = tokenize(run.rows().select(kept), m0.chat, row_format=run.row_format).trainable()
        settings = config.final_stage(len(examples))
        workshop = Workshop(m0, config, run)
        model = workshop.train("final", examples, settings, into=run.folder / "model")
        run.manifest["stages"]["final"] |= {"decision": digest, "asked": asked, "stale": False}
        run.save()
        return model
