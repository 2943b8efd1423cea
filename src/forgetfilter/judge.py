"""A model other than M0 that judges texts: what kind of guard it is, and what a text classifier says."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter import processes
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.costs import Cost
from forgetfilter.files import digest
from forgetfilter.model import folders
from forgetfilter.model.classifier import Classified, Classifier, guard_kind, labels_of
from forgetfilter.shelf import Shelf


class Judge:
    """A model that judges texts.

    Args:
        model: Hub id or folder of the model.
        config: Batch size and dtype.
        shelf: Where its verdicts are kept.
    """

    def __init__(self, model: str, config: ForgetFilterConfig, shelf: Shelf) -> None:
        """Load nothing yet."""
        self.model, self.config, self.shelf = model, config, shelf

    def kind(self, named: str = "auto") -> str:
        """What kind of guard it is (filters/guard.py); see `model.classifier.guard_kind`."""
        return guard_kind(self.model, self.config, named)

    def labels(self) -> tuple[list[str], bool]:
        """The labels of a text classification model; see `model.classifier.labels_of`."""
        return labels_of(self.model, self.config)

    def classify(self, exchanges: Sequence[tuple[str, str]]) -> Classified:
        """What a text classification model says of prompts and answers; read once, in shards, and kept."""
        classifier = cache(lambda: Classifier(self.model, self.config))

        def make(rows: slice, bar: Any) -> pa.Table:
            logits, passes = classifier().logits(exchanges[rows], bar)
            self.shelf.account.add(Cost(passes=passes))
            return pa.table({"logits": pa.FixedSizeListArray.from_arrays(logits.reshape(-1), logits.shape[1])})

        key = self._key(exchanges)
        part, about = f"readings/guard-logits-{key}", lambda: classifier().about
        path = self.shelf.table(part, key, len(exchanges), make, "guard: classifying", classifier, about)
        logits = pq.read_table(path)["logits"].combine_chunks().flatten().to_numpy()
        return Classified(logits.reshape(len(exchanges), -1), **self.shelf.run.manifest["stages"][part]["about"])

    def _key(self, exchanges: Sequence[tuple[str, str]]) -> str:
        """A hash of all that the verdicts depend on: texts, weights, and the names of the labels."""
        folder = folders.find_weights(self.model)
        described = (folder / "config.json").read_text(encoding="utf-8")
        texts = [f"{prompt}\n\n{answer}" if prompt else answer for prompt, answer in exchanges]
        together = ["shortened together"] if any(prompt for prompt, _ in exchanges) else []
        made_of = ["classify", texts, *together, folders.model_hash(folder), described]
        return digest([*made_of, self.config.dtype, processes.count()])
