"""Judge any number of new rows by the probe of a decided run: `forgetfilter score`.

The run's rows have taught the probe, a linear model on M0's hidden states (filters/probe.py). So a new row costs one
pass through the lower half of M0, and no training. The rows are read, judged and written in shards, so that memory does
not grow with their number and a killed run continues after its last shard.
"""

import dataclasses
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter import processes, shards
from forgetfilter.alignment import m0_of_run
from forgetfilter.changes import changes
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.crossfit import judged_by
from forgetfilter.data.folders import TRAIN
from forgetfilter.data.formats import base_format
from forgetfilter.data.ids import ids_alone
from forgetfilter.data.loading import (
    SHOWN,
    Rows,
    complaint,
    encode,
    find_format,
    read_conversations,
    wrong_rows,
)
from forgetfilter.data.single_answers import single_answers
from forgetfilter.data.source import Source
from forgetfilter.data.sources import Stream, is_of_hub, open_stream
from forgetfilter.data.tokenization import Example
from forgetfilter.data.unreadable import unreadable
from forgetfilter.decision.choice import drops
from forgetfilter.decision.opened import REVIEWED, read_scores, require_marks_decided, scores_by
from forgetfilter.decision.rules import Threshold
from forgetfilter.errors import ConfigError, DataError, RunError
from forgetfilter.files import digest, whole_file, whole_folder, write_jsonl
from forgetfilter.m0 import M0
from forgetfilter.model.states import hidden_states
from forgetfilter.progress import progress, say
from forgetfilter.runs import JUDGED, Run, locked, refuse_foreign
from forgetfilter.scored import Scored
from forgetfilter.workshop import Workshop

PROBE = "probe"
PROBES = (PROBE, REVIEWED)
"""What has a linear model that can judge: the filter, and what a person's marks taught."""
COUNTS = ("rows", "kept", "dropped", "unscored", "unreadable", "malformed")
"""What is counted in each shard."""
SCORES, MALFORMED = "scores.parquet", "malformed.jsonl"


def score(
    run: Run,
    dataset: Any,
    output_dir: Path | str | None = None,
    *,
    trust_remote_code: bool = False,
    **reading: Any,
) -> Path:
    """Keep or drop new rows by the probe and the threshold of a run's last decision.

    What an earlier, interrupted call left in the folder is not done again.

    Args:
        run: A run that the probe's scores decided.
        dataset: The new rows: a path, Hub id, datasets.Dataset or list of dicts.
        output_dir: Where kept and dropped rows, scores and counts go; by default OUT/scored_rows/NAME.
        trust_remote_code: Run model code that comes with the model; the run's folder alone cannot ask for it.
        reading: dataset_config, dataset_train_split, format, columns and malformed, where they are not the run's
            (None: are).

    Returns:
        The folder of the results.

    Raises:
        RunError: If the run cannot judge new rows, or the folder holds something else.
        DataError: If the rows cannot be read, or are malformed.
        ConfigError: If there are several processes, and each holds the whole model.
    """
    if processes.count() > 1 and not processes.sharded():
        raise ConfigError(
            f"score works in one process, this is one of {processes.count()}: start it without launcher. A model that "
            "does not fit one GPU takes a config file of FSDP (docs/scale.md)."
        )
    with locked(run.folder):  # all the time: whoever takes the lock removes temporary files, ours as well
        run.reload()
        given = {name: value for name, value in reading.items() if value is not None}
        own = run.config()
        whole = own.dataset_train_split.partition("[")[0]  # a slice of the noisy data says nothing of new rows
        of_hub = {"dataset_config": own.dataset_config, "dataset_train_split": whole}
        here = {"dataset_config": None, "dataset_train_split": TRAIN}
        given = {**(of_hub if is_of_hub(dataset) else here), **given}
        config = dataclasses.replace(own, trust_remote_code=trust_remote_code, **given)
        probe = RunProbe.of(run, config)
        stream = open_stream(dataset, config.dataset_config, config.dataset_train_split, scratch_folder=run.folder)
        folder = Path(output_dir or run.folder / "scored_rows" / stream.stem)
        read_as = {"columns": config.columns} if config.columns else {}  # older folders know no columns
        about = {"sha256": stream.fingerprint(), "format": config.format, **read_as}
        asked = {"data": about, **probe.facts()}
        out = _open(folder, asked)
        if "rows" not in out.manifest:
            out.manifest |= _checked(stream, config, run.row_format)
        processes.wait_for_everyone()  # all have read the folder as it was left
        with locked(folder):
            if (folder / "manifest.json").exists():  # another run may have scored into it meanwhile
                out = _open(folder, asked)
            _Scoring(out, stream, probe).finish()
    return folder


@dataclass(frozen=True)
class RunProbe:
    """What decides on new rows.

    Attributes:
        m0: The model whose hidden states are read.
        config: All settings.
        linear: (size + 1,) weights and bias of the probe.
        threshold: That of the run's last decision.
    """

    m0: M0
    config: ForgetFilterConfig
    linear: np.ndarray
    threshold: Threshold

    @classmethod
    def of(cls, run: Run, config: ForgetFilterConfig) -> "RunProbe":
        """The probe that decided a run, and its threshold.

        Raises:
            RunError: If the run is not decided, or not by a probe that found something, or M0's weights have changed.
        """
        read_scores(run)
        require_marks_decided(run)
        noted = run.manifest["decision"]
        name = noted.get("filter", config.filters[0])
        if name not in PROBES:
            raise RunError(
                f"{run.folder}: its last decision was not made by a probe's scores, and only a probe can judge "
                f"new rows. `forgetfilter decide {run.folder} --filter probe` decides by them if the run has them."
            )
        threshold = Threshold(noted["threshold"], noted["rule"], noted["says"])
        # alignment data are read by the run's flags, not by those for the new rows
        of_run = dataclasses.replace(run.config(), trust_remote_code=config.trust_remote_code)
        return cls(m0_of_run(run, of_run), config, _linear(run, name, config), threshold)

    @cached_property
    def workshop(self) -> Workshop:
        """M0 in memory, from its first use on."""
        return Workshop(self.m0, self.config)

    def facts(self) -> dict[str, Any]:
        """What the decisions depend on besides the rows."""
        found = {
            "probe": digest(self.linear.tolist()),
            "threshold": self.threshold.value,
            "unscored": self.config.unscored,
        }
        return {**found, "unreadable": "drop"} if self.config.unreadable == "drop" else found  # as in older folders

    def scores(self, examples: Sequence[Example], bar: Any) -> np.ndarray:
        """(rows,) log-odds, higher = more suspect; NaN = cannot be scored. The bar counts the others."""
        if not examples:
            return np.zeros(0)
        return judged_by(self.linear, hidden_states(self.workshop.become(None), examples, "scoring", bar))


def _linear(run: Run, name: str, config: ForgetFilterConfig) -> np.ndarray:
    """The run's probe.

    Raises:
        RunError: If it found nothing, so that its scores are ranks among the run's own rows.
    """
    scored = scores_by(run, name, config)
    scale = scored.scale
    if scale is not None and scale.nothing and (scored.linear is None or not scale.separates):
        raise RunError(
            f"{run.folder}: {scale.nothing}. New rows have no rank among them, so they cannot be scored. "
            f"Mark some of the run's rows (`forgetfilter review {run.folder}`): what your marks teach can judge new "
            "rows. Or a run with more rows, or with safe data that look like the harmless rows, may find a separation."
        )
    if scored.linear is None:
        raise RunError(f"{run.folder}: its probe was not kept, by an older version. Run `filter` into a new folder.")
    return scored.linear


def _open(folder: Path, asked: dict[str, Any]) -> Run:
    """The folder of the results, as a new one or as the one to continue; nothing is written.

    Raises:
        RunError: If it holds something else.
    """
    if not (folder / "manifest.json").exists():
        refuse_foreign(folder)
        return Run(folder, {"asked": asked, "stages": {}})
    out = Run.open(folder)
    if out.holds != JUDGED:
        raise RunError(f"{folder}: holds {out.holds}. Give another --output_dir.")
    changed = changes(out.manifest["asked"], asked, None)
    if changed:
        different = ", ".join(f"{key.removeprefix('.')} {words}" for key, words in changed.items())
        raise RunError(
            f"{folder}: holds other rows, or scores by another decision: {different}. Give another --output_dir, "
            "or remove this folder."
        )
    return out


def _checked(stream: Stream, config: ForgetFilterConfig, learnt: str) -> dict[str, Any]:
    """Read every row once, before the long work: how many there are, of which format and in which kind of file.

    Args:
        stream: The new rows.
        config: All settings.
        learnt: Format of the rows that the probe has learnt from.

    Raises:
        DataError: If the rows do not fit the format, or the format does not fit the probe.
    """
    suffix, rows, count = "", 0, 0
    row_format: str | None = None
    wrong: list[str] = []
    with progress("checking", None, "rows") as bar:
        for part, _ in stream.parts(shards.SHARD_ROWS):
            if row_format is None and (len(part) > len(part.errors) or config.malformed == "error"):
                row_format = find_format(part, str(config.format), config.columns)
            if row_format is not None:
                read_conversations(part, row_format, skip=True)
            wrong += wrong_rows(part)[: SHOWN - len(wrong)]
            suffix, rows, count = part.writable().suffix, rows + len(part), count + len(part.errors)
            bar.update(len(part))
    if not rows:
        raise DataError(f"{stream.name}: has no rows.")
    if count == rows or (count and config.malformed == "error"):
        raise DataError(complaint(stream.name, wrong, count, rows))
    assert row_format is not None, "a row could be parsed"
    if (base_format(row_format) == "text") != (base_format(learnt) == "text"):
        raise DataError(
            f"{stream.name}: its rows have the format {row_format}, those of the run {learnt}, and a probe that has "
            "learnt from conversations knows nothing of plain text, nor the other way round."
        )
    return {"rows": rows, "format": row_format, "suffix": suffix}


@dataclass
class _Scoring:
    """All of the work on one data set.

    Attributes:
        out: The folder of the results. Its manifest lists the finished shards with their checksums.
        stream: The new rows.
        probe: Decides on them.
    """

    out: Run
    stream: Stream
    probe: RunProbe

    def finish(self) -> None:
        """Make the shards that are missing, then the files of all rows."""
        if self.out.done("scored"):
            say(f"{self.out.folder}: finished before, nothing to do.")
        else:
            self.out.save()  # before the first shard: without a manifest, the folder would be that of somebody else
            self._score(self._finished())
            self._join(self._finished())
        if processes.is_main_process():
            shutil.rmtree(self.out.folder / "shards", ignore_errors=True)

    def _finished(self) -> list[dict[str, Any]]:
        """What the manifest says of each shard, up to the first that is missing or damaged."""
        found: list[dict[str, Any]] = []
        while self.out.done(_shard(len(found))):
            found.append(self.out.manifest["stages"][_shard(len(found))])
        return found

    def _score(self, done: list[dict[str, Any]]) -> None:
        """Make the shards after those done."""
        rows, malformed = (sum(shard[count] for shard in done) for count in ("rows", "malformed"))
        began = time.perf_counter()
        with progress("scoring", self.out.manifest["rows"], "rows", rows + malformed) as bar:
            parts = self.stream.parts(shards.SHARD_ROWS, done[-1]["end"] if done else 0)
            for number, (part, end) in enumerate(parts, len(done)):
                found = self._write(part, number, rows, bar)
                rows += found["rows"]
                now = time.perf_counter()
                files = sorted((self.out.folder / _shard(number)).iterdir())
                self.out.finish(_shard(number), files, end=end, seconds=now - began, **found)
                began = now

    def _write(self, part: Source, number: int, first: int, bar: Any) -> dict[str, Any]:
        """Judge the rows of a shard and write its files; how many of them there are of each kind.

        Args:
            part: The rows.
            number: The shard's.
            first: Number of its first row.
            bar: Counts rows.
        """
        skip = self.probe.config.malformed == "skip"
        rows = encode(part, self.probe.m0.chat, row_format=self.out.manifest["format"], skip=skip)
        bar.update(len(part) - len(rows.trainable()))
        suspicion = self._suspicion(rows, bar)
        hard = unreadable(rows.source, rows.row_format, self.probe.m0.tokenizer)
        dropped = drops(suspicion, self.probe.threshold, self.probe.config, hard)
        source = rows.source.writable()
        source = dataclasses.replace(source, header=b"") if number else source  # files are put end to end
        if processes.is_main_process():
            with whole_folder(self.out.folder / _shard(number)) as folder:
                for name, chosen in (("kept", ~dropped), ("dropped", dropped)):
                    source.select(np.flatnonzero(chosen).tolist()).write(folder / f"{name}{source.suffix}")
                pq.write_table(_table(rows, first, suspicion, dropped, hard), folder / SCORES)
                write_jsonl(folder / MALFORMED, rows.malformed)
        processes.wait_for_everyone()
        return {
            "rows": len(dropped),
            "kept": int((~dropped).sum()),
            "dropped": int(dropped.sum()),
            "unscored": int(np.isnan(suspicion).sum()),
            "unreadable": int(hard.sum()),
            "malformed": len(rows.malformed),
            "unread": {name: count for name, count in rows.unread.items() if name != self.probe.config.label_column},
        }

    def _suspicion(self, rows: Rows, bar: Any) -> np.ndarray:
        """(rows,) scores; a conversation has that of its most suspect answer."""
        answers = single_answers(rows, self.probe.m0.chat)
        if answers is None:
            return self.probe.scores(rows.examples, bar)
        single, row_of = answers
        bar.total += len(single.examples) - len(rows.examples)
        return Scored(self.probe.scores(single.examples, bar)).most_suspect(row_of).suspicion

    def _join(self, done: list[dict[str, Any]]) -> None:
        """Write the files of all rows, and note that the work is finished."""
        folder, suffix = self.out.folder, self.out.manifest["suffix"]
        found: dict[str, Any] = {count: sum(shard[count] for shard in done) for count in COUNTS}
        unread = Counter[str]()
        for shard in done:
            unread.update(shard.get("unread", {}))  # none in shards of older versions
        found["unread"] = dict(unread)
        names = [f"kept{suffix}", f"dropped{suffix}", SCORES, *([MALFORMED] if found["malformed"] else [])]
        if processes.is_main_process():
            for name in names:
                _put_together([folder / _shard(number) / name for number in range(len(done))], folder / name)
        seconds = sum(shard["seconds"] for shard in done)
        found |= {"threshold": self.probe.threshold.value, "seconds": seconds, "rows_a_second": found["rows"] / seconds}
        self.out.write_json("metrics.json", found)
        self.out.manifest["stages"] = {}
        processes.wait_for_everyone()
        self.out.finish("scored", [folder / name for name in (*names, "metrics.json")])


def _shard(number: int) -> str:
    """Name of a shard in the manifest, and its folder."""
    return f"shards/{number:06}"


def _table(rows: Rows, first: int, suspicion: np.ndarray, dropped: np.ndarray, hard: np.ndarray) -> pa.Table:
    """One row for each row: its number, id, score and decision; malformed rows have no number."""
    decisions = ["dropped" if drop else "kept" for drop in dropped]
    columns = {
        "row": pa.array(np.arange(first, first + len(dropped)), pa.int64()),
        "id": pa.array(ids_alone(rows.source), pa.string()),
        PROBE: pa.array(suspicion, pa.float64(), from_pandas=True),
        "unreadable": pa.array(hard, pa.bool_()),
        "decision": pa.array(decisions, pa.string()),
    }
    return pa.table(columns)


def _put_together(files: list[Path], path: Path) -> None:
    """One file of the files of all shards."""
    if path.suffix == ".parquet":
        shards.join(files, path)
        return
    with whole_file(path) as temporary, temporary.open("wb") as whole:
        if path.suffix == ".json":
            arrays = (file.read_bytes().removeprefix(b"[\n").removesuffix(b"\n]\n") for file in files)
            whole.write(b"[\n" + b",\n".join(filter(None, arrays)) + b"\n]\n")
            return
        ended = True
        for file in (file for file in files if file.stat().st_size):
            if not ended:  # a shard may end where one of several files does, and its last line may lack an end
                whole.write(b"\n")
            with file.open("rb") as shard:
                shutil.copyfileobj(shard, whole)
                shard.seek(-1, os.SEEK_END)
                ended = shard.read() == b"\n"
