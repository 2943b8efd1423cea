"""M0 after a finetuning on alignment data, and the M0 of a run."""

import dataclasses
from contextlib import suppress
from typing import Any

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import load_rows
from forgetfilter.errors import RunError
from forgetfilter.m0 import M0
from forgetfilter.runs import Run
from forgetfilter.workshop import Workshop


def aligned(m0: M0, config: ForgetFilterConfig, facts: dict[str, Any] | None = None) -> M0:
    """M0 after a finetuning on the alignment data, if the config names any (the paper's BaseFT).

    Args:
        m0: The model as it is.
        config: All settings.
        facts: What the run's manifest will say besides M0 (Run.start): a folder that holds something else is then
            refused before the training. None if the folder is known to hold the right run.

    Raises:
        RunError: If the config's output_dir holds something else.
    """
    if config.alignment_dataset_name is None:
        return m0
    rows = load_rows(config.alignment_dataset_name, "alignment_dataset_name", m0.chat, config).trainable()
    found = None if facts is None else Run.continued(config, facts)
    final = config.final
    if found is not None:
        with suppress(RunError):  # a damaged config.yaml is written anew
            final = found.config().final
    if final != config.final:
        raise RunError(
            f"{config.output_dir}: `final` also says how M0 is finetuned on alignment_dataset_name: another one "
            "makes another M0. Give another --output_dir."
        )
    workshop = Workshop(m0, dataclasses.replace(config, dtype="float32"))
    return workshop.base("aligned", rows, config.final_stage(len(rows)))


def m0_of_run(run: Run, config: ForgetFilterConfig) -> M0:
    """The M0 that a run's rows were scored with.

    Raises:
        RunError: If its weights have changed since.
    """
    m0 = aligned(M0.named(config), config)
    if m0.sha256 != run.manifest["model"]["sha256"]:
        raise RunError(f"{config.model_name_or_path}: its weights are not those the rows were scored with.")
    if run.manifest.get("chat_template", {}).get("sha256", m0.template_sha256) != m0.template_sha256:
        raise RunError(f"{config.model_name_or_path}: its chat template is not that the rows were scored with.")
    return m0
