"""The demo: the whole job on a shop bot's chat log of our own writing, with the embedded model."""

from importlib.resources import as_file, files
from pathlib import Path

from forgetfilter.config import ForgetFilterConfig, StageConfig
from forgetfilter.data.loading import load_rows
from forgetfilter.forgetting import ForgetFilter
from forgetfilter.m0 import M0
from forgetfilter.model.generation import complete
from forgetfilter.result import Result
from forgetfilter.summary import print_summary
from forgetfilter.workshop import Workshop


def demo_file(name: str) -> Path:
    """Path of noisy.jsonl, safe.jsonl or heldout.jsonl, or of shop.jsonl: a bot that must not promise dates."""
    with as_file(files(__package__) / name) as path:
        return path


def demo_config(output_dir: Path) -> ForgetFilterConfig:
    """The demo's settings."""
    return ForgetFilterConfig(
        dataset_name=str(demo_file("noisy.jsonl")),
        safe_dataset_name=str(demo_file("safe.jsonl")),
        output_dir=str(output_dir),
        label_column="unsafe",
        noisy=StageConfig(num_train_epochs=2),
    )


def run_demo(output_dir: Path) -> None:
    """Filter the demo's data, finetune M0 on what is kept, and show what happened."""
    print(__doc__)
    result = ForgetFilter(demo_config(output_dir)).fit()
    result.finetune()
    print_answers(result)
    print_summary(result, result.report())


def print_answers(result: Result) -> None:
    """Print how the noisy stage's model and the final model answer a held-out prompt of each group."""
    run = result.run
    config = run.config()
    m0 = M0.named(config)
    rows = load_rows(demo_file("heldout.jsonl"), "heldout", m0.chat, config)
    groups = [record["group"] for record in rows.source.rows()]
    chosen = [groups.index(group) for group in sorted(set(groups))]
    examples = [rows.examples[i] for i in chosen]
    workshop = Workshop(m0, config, run)
    noisy = complete(workshop.become(run.model("noisy")), examples, "noisy model: answering")
    final = complete(workshop.become(run.folder / "model"), examples, "final model: answering")
    print("\nHeld-out prompts:")
    for i, before, after in zip(chosen, noisy, final, strict=True):
        print(f"  {(rows.source.records[i] or {})['prompt']}\n    noisy model: {before}\n    final model: {after}")
