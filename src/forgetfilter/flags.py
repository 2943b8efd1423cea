"""The commands and their flags."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from forgetfilter.command_parser import Parser
from forgetfilter.config import STAGE_FIELDS, STAGES, ForgetFilterConfig
from forgetfilter.evaluation.judges import GUARD_MODEL, TOXICITY_MODEL

Handler = Callable[[Namespace], None]
READING = ("dataset_config", "dataset_train_split", "format", "columns", "malformed")
"""Flags of `filter` that say how data are read."""
EXPORTS = ("trl", "axolotl", "llamafactory", "alpaca", "sharegpt")
GROUPS = {
    "What most people set": ("dataset_name", "safe_dataset_name", "output_dir", "model_name_or_path", "label_column"),
    "Data": (
        "unsafe_dataset_name",
        "planted_rows",
        "dataset_config",
        "dataset_train_split",
        "format",
        "columns",
        "malformed",
        "alignment_dataset_name",
        "max_length",
    ),
    "Scoring and deciding": (
        "filter",
        "parameters",
        "sample_rows",
        "threshold",
        "drop_share",
        "trusted_rows",
        "max_clean_loss",
        "unscored",
        "unreadable",
    ),
    "Training, for all stages": STAGE_FIELDS,
    "Training, by stage": STAGES,
}
"""Flags of `filter`, in the order of its help. Flags that are in none of these groups come last."""


def build_parser(handlers: Mapping[str, Handler]) -> ArgumentParser:
    """The parser of all commands; unknown flags and unknown keys of a YAML file are errors.

    Args:
        handlers: Command -> what it does; its docstring is the command's help.
    """
    parser = Parser(
        allow_abbrev=False,
        prog="forgetfilter",
        description="Clean finetuning data of unsafe rows before a model learns them.",
        version=None,
    )
    parser.add_argument("--version", action="store_true", help="Print the version and exit.")
    commands = parser.add_subcommands(required=False, dest="command")

    def command(name: str) -> ArgumentParser:
        does = handlers[name].__doc__
        sub = Parser(description=does, allow_abbrev=False)
        commands.add_subcommand(name, sub, help=does)
        return sub

    sub = command("demo")
    sub.add_argument("--output_dir", type=str, default="demo-run", help="The run's folder.")
    sub = command("filter")
    sub.usage = "forgetfilter filter --dataset_name FILE --output_dir OUT [--safe_dataset_name FILE] [FLAGS]"
    _add_settings(sub)
    sub = command("finetune")
    _add_run(sub)
    _add_trust(sub)
    sub = command("decide")
    _add_run(sub)
    sub.add_argument("--threshold", type=Literal["auto"] | float | None, help="Drop rows that score above it.")
    sub.add_argument(
        "--filter",
        type=str | None,
        help="Decide by this filter's scores. Default: by your review's marks, or the first filter.",
    )
    sub.add_argument("--drop_share", type=float | None, help="Drop this share of the rows, the most suspect ones.")
    sub.add_argument("--trusted_rows", type=str | None, help="JSONL of rows marked clean or not, from `sample`.")
    sub.add_argument("--max_clean_loss", type=float | None, help="Largest share of clean rows to drop; default 0.02.")
    sub.add_argument("--decisions", type=str | None, help="JSONL of rows decided by hand: id, decision.")
    sub = command("review")
    _add_run(sub)
    sub.add_argument(
        "--marks", type=str | None, help="JSONL of rows marked elsewhere: id, and mark, clean or decision."
    )
    sub.add_argument("--port", type=int, default=0, help="Port to listen on; 0 for a free one.")
    sub.add_argument("--no_browser", "--no-browser", action="store_true", help="Do not open the page in the browser.")
    sub.add_argument("--host", type=str, default="127.0.0.1", help="Address to listen on.")
    sub.add_argument("--allow_other_machines", action="store_true", help="Allow a --host that others can reach.")
    _add_trust(sub)
    sub = command("score")
    _add_run(sub, "The folder of a run that the probe has decided.")
    sub.add_argument("--dataset_name", type=str, required=True, help="The new rows.")
    sub.add_argument("--output_dir", type=str | None, help="Folder to write to; default OUT/scored_rows/NAME.")
    for name in READING:
        kind: Any = ForgetFilterConfig.__dataclass_fields__[name].type
        sub.add_argument(f"--{name}", type=kind | None, help="As for `filter`; default the run's.")
    _add_trust(sub)
    sub = command("report")
    _add_run(sub)
    sub.add_argument("--group_column", type=str | None, help="Column of the data that groups rows.")
    sub = command("sample")
    sub.add_argument("dataset_name", type=str, help="The noisy data.")
    sub.add_argument("--rows", type=int, default=150, help="How many rows to draw.")
    _add_reading(sub, READING, "As for `filter`.")
    sub.add_argument("--output", type=str, default="sample.jsonl", help="File to write.")
    sub.add_argument("--seed", type=int, default=42, help="Seed of the draw.")
    sub = command("safe_data")
    sub.add_argument("--output", type=str, required=True, help="File to write, ending in .jsonl.")
    sub.add_argument("--like", type=str | None, help="Your data: the rows take its format, system message and length.")
    _add_reading(sub, READING[:-1], "As for `filter`, of --like.")  # what is malformed in it gives no shape
    sub.add_argument("--notions", type=str | None, help="Notions to write, comma-separated; default all.")
    sub.add_argument("--base_url", type=str | None, help="Server that speaks the OpenAI API: it answers your prompts.")
    sub.add_argument("--model", type=str | None, help="What the server calls its model.")
    sub.add_argument("--rows", type=int | None, help="Prompts that the server answers; default 200.")
    sub = command("evaluate")
    sub.add_argument("model", type=str, help="A Hub id, a folder of weights, an adapter, or a run with a final model.")
    sub.add_argument("--on", type=str, required=True, help="Measures and data: bias=FILE,qa=FILE,...")
    sub.add_argument("--max_questions", type=int | None, help="Largest number of questions per measure.")
    sub.add_argument("--toxicity_model", type=str, default=TOXICITY_MODEL, help="Classifier of answers.")
    sub.add_argument("--guard_model", type=str, default=GUARD_MODEL, help="Model that judges answers in `harmfulness`.")
    sub.add_argument("--output", type=str, default="evaluation.json", help="File of the figures; answers beside it.")
    _add_trust(sub)
    sub = command("compare")
    sub.add_argument("--config", type=str, required=True, help="The YAML file (docs/experiments.md).")
    sub = command("export")
    _add_run(sub)
    sub.add_argument("--format", type=Literal[EXPORTS], default="trl", help="The trainer's format.")
    sub.add_argument("--output_dir", type=str | None, help="Folder to write to; default OUT/export/FORMAT.")
    return parser


def _add_run(parser: ArgumentParser, help: str = "A run's folder.") -> None:
    parser.add_argument("run", type=str, help=help)


def _add_trust(parser: ArgumentParser) -> None:
    parser.add_argument("--trust_remote_code", action="store_true", help="Run model code that comes with the model.")


def _add_reading(parser: ArgumentParser, names: Sequence[str], help: str) -> None:
    """Add flags that say how data are read, with the defaults that they have in `filter`."""
    for name in names:
        setting: Any = ForgetFilterConfig.__dataclass_fields__[name]
        parser.add_argument(f"--{name}", type=setting.type, default=setting.default, help=help)


def _add_settings(parser: ArgumentParser) -> None:
    """Add the flags of `filter`: those that most people need first, the others in groups."""
    fields = set(ForgetFilterConfig.__dataclass_fields__)
    last = fields.difference(*GROUPS.values())
    for title, names in {**GROUPS, "Model, adapter and machine": last}.items():
        group = parser.add_argument_group(title)
        group.add_class_arguments(ForgetFilterConfig, as_group=False, skip=fields.difference(names))
        if title == next(iter(GROUPS)):
            group.add_argument("--config", action="config", help="A YAML file of flags; flags given here win.")
