"""A decided run, as Python programs have it: its rows and scores, and everything that can follow from them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from forgetfilter import processes
from forgetfilter.decision.decide import decide
from forgetfilter.decision.opened import REVIEWED, decided_rows, kept_rows, read_scores, require_marks_decided
from forgetfilter.decision.outputs import last_digest
from forgetfilter.errors import DataError
from forgetfilter.runs import Run, locked

if TYPE_CHECKING:
    from datasets import Dataset

    from forgetfilter.review.session import Review


@dataclass
class Result:
    """A decided run.

    Attributes:
        run: Its folder.
    """

    run: Run

    @classmethod
    def open(cls, folder: Path | str) -> "Result":
        """The run in a folder that `fit` or `forgetfilter filter` has filled.

        Raises:
            RunError: If the folder holds no run, or one without a decision.
        """
        run = Run.filtered(folder)
        read_scores(run, ["decision"])
        return cls(run)

    @cached_property
    def review(self) -> "Review":
        """The run's review: marks, and the ranking they give; see forgetfilter.review.session."""
        from forgetfilter.review.session import Review

        return Review(self.run)

    def ask(self, count: int = 1) -> list[int]:
        """The rows to mark next."""
        return [question.row for question in self.review.ask(count)]

    def mark(self, said: Mapping[int, str | None]) -> str:
        """Mark rows "clean" or "unsafe", or None to take a mark back; returns what the marks tell so far, in a line.

        All that `forgetfilter review` does: a mark is on disk at once, and everything is ranked anew. `decide` takes
        the decision.

        Raises:
            DataError: If there is no such row, or no such mark.
            RunError: If the hidden states of the run's rows cannot be had.
        """
        self.review.mark(said)
        return self.review.status().line()

    @property
    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds."""
        return dict(json.loads((self.run.folder / "metrics.json").read_text(encoding="utf-8")))

    @property
    def scores(self) -> "Dataset":
        """One row for each input row, in order: id, every filter's score (higher = more suspect), decision, reason.

        Like `kept` and `dropped` it is read from disk, and checked against its checksum, each time.
        """
        from datasets import Dataset

        self.run.reload()  # another process may have decided
        return Dataset(read_scores(self.run))

    @property
    def kept(self) -> "Dataset":
        """The kept rows as they came in, with all columns that any row has; see `Source.as_table`."""
        return self._rows("kept")

    @property
    def dropped(self) -> "Dataset":
        """The dropped rows as they came in."""
        return self._rows("dropped")

    def _rows(self, decision: str) -> "Dataset":
        from datasets import Dataset

        self.run.reload()
        return Dataset(self.run.rows().as_table().take(pa.array(decided_rows(self.run, decision), pa.int64())))

    def decide(
        self,
        threshold: float | str | None = None,
        *,
        filter: str | None = None,
        drop_share: float | None = None,
        decisions: Path | str | None = None,
        trusted_rows: Path | str | None = None,
        max_clean_loss: float | None = None,
    ) -> "Result":
        """Decide again, in seconds and without a model; arguments and errors as those of `decision.decide.decide`.

        Where rows were marked or asked for here, what the marks taught decides, unless a filter is named.
        """
        processes.require_first("decide")
        reviewed = REVIEWED if "review" in vars(self) else None
        with locked(self.run.folder):
            self.run.reload()
            decide(
                self.run,
                threshold,
                filter=filter or reviewed,
                drop_share=drop_share,
                decisions=decisions,
                trusted_rows=trusted_rows,
                max_clean_loss=max_clean_loss,
            )
        return self

    def finetune(self, *, trust_remote_code: bool = False) -> Path:
        """Finetune M0 on the kept rows; arguments, result and errors as those of `forgetting.finetune`."""
        from forgetfilter.forgetting import finetune

        return finetune(self.run, trust_remote_code=trust_remote_code)

    def score(self, dataset: Any, output_dir: Path | str | None = None, **reading: Any) -> Path:
        """Keep or drop new rows by this run's probe; arguments, result and errors as those of `new_rows.score`."""
        from forgetfilter.new_rows import score

        return score(self.run, dataset, output_dir, **reading)

    def report(self, group_column: str | None = None) -> Path:
        """Write OUT/report.html, which a new decision takes away; arguments and errors as those of `write_report`."""
        from forgetfilter.report.run_page import write_report

        processes.require_first("report")
        with locked(self.run.folder):
            self.run.reload()
            return write_report(self.run, group_column)

    def export(self, trainer: str, output_dir: Path | str | None = None) -> list[Path]:
        """Write the kept rows in the format of a trainer.

        Args:
            trainer: trl, axolotl, llamafactory, alpaca or sharegpt.
            output_dir: Where to; by default OUT/export/TRAINER, whose files are replaced.

        Returns:
            The files written.

        Raises:
            RunError: If the run has no decision, rows were marked after it, or it keeps nothing.
            DataError: If a row does not fit the format, or a file of another folder would be replaced.
        """
        from forgetfilter.data.export import export

        processes.require_first("export")
        run, ours = self.run, output_dir is None
        folder = Path(output_dir or run.folder / "export" / trainer)
        with locked(run.folder):
            run.reload()
            require_marks_decided(run)
            kept = run.rows().select(kept_rows(run, "export"))
            template = run.stage("tokenizer") / "chat_template.jinja"
            shows = not template.exists() or "tool_calls" in template.read_text(encoding="utf-8")
            before = run.manifest.get("exports", {}).get(trainer) if ours else None
            if before is not None:  # until all of it is written
                run.manifest["exports"][trainer] = {"decision": None, "stale": True}
                run.save()
            try:
                written = export(kept, run.row_format, trainer, folder, replace=ours, shows_calls=shows)
            except DataError:  # nothing was written
                if before is not None:
                    run.manifest["exports"][trainer] = before
                    run.save()
                raise
            if ours:
                run.manifest.setdefault("exports", {})[trainer] = {"decision": last_digest(run), "stale": False}
                run.save()
        return written
