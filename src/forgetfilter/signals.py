"""Signals: how well a model still holds each row. Higher = better held."""

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn.functional import cross_entropy

from forgetfilter import processes
from forgetfilter.batches import label_logits
from forgetfilter.data.tokenization import IGNORED, Example
from forgetfilter.errors import ConfigError, TrainingError
from forgetfilter.files import whole_file
from forgetfilter.generation import complete
from forgetfilter.memory import RELEASE_EVERY, one_memory_error, release_freed_memory
from forgetfilter.models import Learner
from forgetfilter.progress import progress

SHARDS, SHARD_ROWS = "shards", 4096
"""Folder of a stage's scores while they are made, and rows a file there."""
BATCH_TOKENS, LOGITS = 4096, 256
"""Tokens a scoring pass holds at once, and rows of logits it turns to float32 at once: bounds on its memory."""
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


def words(text: str) -> list[str]:
    """Words of any script, case folded; where a script has no spaces, its characters."""
    return _WORD.findall(text.casefold())


def rouge1(answer: str, reference: str) -> float:
    """ROUGE-1 F-measure over words, in [0, 1] (Lin 2004); 0 if either side has no word.

    rouge-score's definition without stemming, except that it drops all non-ASCII text and this doesn't.
    """
    ours, theirs = Counter(words(answer)), Counter(words(reference))
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


def mean_log_probability(log_probs: np.ndarray | None) -> float | None:
    """The log_likelihood signal: mean log-probability of a row's trained tokens, in nats; at most 0."""
    return None if log_probs is None else float(np.mean(log_probs, dtype=np.float64))


@dataclass
class Reading:
    """What a model makes of a row, teacher-forced.

    Attributes:
        log_probs: (trained tokens,) float32, the log-probability of each, in nats.
        favourites: (trained tokens,) the token the model held likeliest in each one's place.
    """

    log_probs: np.ndarray
    favourites: list[int]


@torch.no_grad()
def read(learner: Learner, examples: Sequence[Example], what: str) -> list[Reading | None]:
    """One forward pass over every row; logits are made where something is trained alone.

    Returns:
        One for each example; None for rows that cannot be scored.
    """
    learner.model.eval()
    found: list[Reading | None] = [None] * len(examples)
    scorable = [i for i, example in enumerate(examples) if example.scorable]
    with progress(what, len(scorable), "rows") as bar:
        for number, batch in enumerate(_batches(scorable, examples, learner.config.per_device_eval_batch_size)):
            if number % RELEASE_EVERY == 0:
                release_freed_memory()
            for i, reading in zip(batch, _read_batch(learner, [examples[i] for i in batch]), strict=True):
                if np.isnan(reading.log_probs).any():
                    raise TrainingError(f"{what}: the model gives no numbers any more. Take a lower learning rate.")
                found[i] = reading
            bar.update(len(batch))
    return found


def _read_batch(learner: Learner, rows: Sequence[Example]) -> list[Reading]:
    """One forward pass over some rows; in halves where the memory does not hold them."""
    try:
        inputs = learner.collate([row.input_ids for row in rows], [row.labels for row in rows])
        with learner.mixed, one_memory_error():
            logits, targets = label_logits(learner.model, inputs)
            parts = list(zip(logits.split(LOGITS), targets.split(LOGITS), strict=True))
            log_probs = torch.cat([-cross_entropy(part.float(), target, reduction="none") for part, target in parts])
        counts = [sum(label != IGNORED for label in row.labels[1:]) for row in rows]
        scores, favourites = log_probs.cpu().split(counts), logits.argmax(-1).cpu().split(counts)
        return [Reading(s.numpy(), f.tolist()) for s, f in zip(scores, favourites, strict=True)]
    except torch.OutOfMemoryError as error:
        if len(rows) == 1:
            raise TrainingError(
                f"the memory does not hold a row of {len(rows[0].input_ids)} tokens. Take a shorter --max_length."
            ) from error
    half = len(rows) // 2
    return [*_read_batch(learner, rows[:half]), *_read_batch(learner, rows[half:])]


def _batches(rows: Sequence[int], examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Rows of like length together, at most `size` of them and about BATCH_TOKENS tokens; longest first.

    So a batch too large for the memory shows at once, and later ones fit where earlier ones were.
    """
    batch: list[int] = []
    for row in sorted(rows, key=lambda i: -len(examples[i].input_ids)):
        if batch and (len(batch) == size or (len(batch) + 1) * len(examples[batch[0]].input_ids) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def store(learner: Learner, examples: Sequence[Example], signals: Sequence[str], what: str, path: Path) -> None:
    """Measure all rows into a Parquet file, shard by shard; each process measures its share of the shards.

    Shards found beside the file were measured before an interruption, and are taken as they are.
    """
    shards = path.parent / SHARDS
    size = max(1, min(SHARD_ROWS, -(-len(examples) // processes.count())))
    files = {start: shards / f"{start:09}-{size:06}.parquet" for start in range(0, len(examples), size)}
    for start, file in list(files.items())[processes.rank() :: processes.count()]:
        if not _readable(file):
            part = f", rows from {start} of {len(examples)}" if len(files) > 1 else ""
            table = measure(learner, examples[start : start + size], signals, what + part)
            with whole_file(file) as temporary:
                pq.write_table(table, temporary, write_page_checksum=True)
    processes.together()
    if processes.first():
        tables = (pq.read_table(file) for file in files.values())
        with whole_file(path) as temporary:
            table = next(tables)
            with pq.ParquetWriter(temporary, table.schema) as writer:
                writer.write_table(table)
                for table in tables:
                    writer.write_table(table)
        shutil.rmtree(shards)
    processes.together()


def _readable(shard: Path) -> bool:
    """Whether a shard is there and as it was written."""
    try:
        pq.read_table(shard, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        return False
    return True


def measure(learner: Learner, examples: Sequence[Example], signals: Sequence[str], what: str) -> pa.Table:
    """All signals of a model on every row.

    Returns:
        Columns token_log_probs (list of float32) and log_likelihood, and for rouge1 also completion
        (the model's greedy answer) and rouge1; null where a row cannot be scored.
    """
    readings = read(learner, examples, f"{what}: scoring")
    log_probs = [None if reading is None else reading.log_probs for reading in readings]
    columns = {
        "token_log_probs": pa.array(log_probs, pa.list_(pa.float32())),
        "log_likelihood": pa.array([mean_log_probability(row) for row in log_probs], pa.float64()),
    }
    if "rouge1" in signals:
        scorable = {i: reading for i, reading in enumerate(readings) if reading}
        if any(examples[i].prompt_length == 0 for i in scorable):
            raise ConfigError("signal rouge1 needs prompts, and rows of format text have none: use log_likelihood.")
        favourites = [reading.favourites for reading in scorable.values()]
        answers = complete(learner, [examples[i] for i in scorable], f"{what}: answering", favourites)
        texts = dict(zip(scorable, answers, strict=True))
        values = {i: rouge1(text, examples[i].reference) for i, text in texts.items()}
        columns["completion"] = pa.array([texts.get(i) for i in range(len(examples))], pa.string())
        columns["rouge1"] = pa.array([values.get(i) for i in range(len(examples))], pa.float64())
    return pa.table(columns)
