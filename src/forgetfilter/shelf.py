"""A run's folder as the place of tables and models that are made once; what each of them cost."""

from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa

from forgetfilter import processes
from forgetfilter.costs import Account
from forgetfilter.files import sha256, whole_folder
from forgetfilter.progress import say
from forgetfilter.runs import Run
from forgetfilter.shards import remove_shards, write_in_shards

ON_ITS_WAY = "final on its way"
"""Key of the manifest under which the files of a final model stand until it is noted as finished."""


class Shelf:
    """Holds what a workshop makes.

    Every part of a run has a name in the manifest and a key, a hash of all that it is made of. A part that is there
    under the same key is taken as it is.

    Args:
        run: The folder that everything is kept in; None where nothing is to be kept.

    Attributes:
        account: What making the parts costs, or had cost where they were there.
    """

    def __init__(self, run: Run | None) -> None:
        """Open the account."""
        self._run = run
        self.account = Account()

    @property
    def run(self) -> Run:
        """The folder that everything is kept in."""
        assert self._run is not None, "this workshop keeps nothing"
        return self._run

    def has(self, part: str, key: str) -> bool:
        """Whether a part is there, whole and made of the same; if so, its cost is counted."""
        if not self.run.done(part, key):
            return False
        self.account.reuse(part, self.run.manifest["stages"])
        return True

    def table(
        self,
        part: str,
        key: str,
        rows: int,
        make: Callable[[slice, Any], pa.Table],
        what: str,
        load: Callable[[], object],
        about: Callable[[], Mapping[str, Any]] | None = None,
    ) -> Path:
        """The file of a table of all rows, made in shards unless it is there.

        Args:
            part: Its name.
            key: What it is made of.
            rows: How many rows it has.
            make: See `write_in_shards`.
            what: Name for the progress bar.
            load: Loads the model. Loading waits for all processes, and some may have no shard left: so all do it first.
            about: What the manifest is to say of it, asked for once it is made.
        """
        path = self.run.table_file(part)
        if not self.has(part, key):
            with self.account.measuring(part) as cost:
                load()
                write_in_shards(path, rows, make, what)
            facts = {} if about is None else {"about": dict(about())}
            self.run.finish(part, [path], made_of=key, cost=cost.facts(), **facts)
        remove_shards(path)  # not before the file is noted: hashing it takes time, too
        return path

    def place(self, name: str, key: str) -> tuple[str, Path]:
        """Name in the manifest and folder of a model; one of another name that is made of the same is taken."""
        same = (part for part in self.run.manifest["stages"] if part.endswith(f"-{key}") and "/" not in part)
        part = next(same, f"{name}-{key}")
        return part, self.run.stage(part) / "model"

    def fill(self, part: str, folder: Path, fill: Callable[[Path], object], **facts: Any) -> None:
        """The first process fills a model's folder; all note it and go on once it has."""
        if processes.is_main_process():
            if part == "final":
                self._set_aside(folder)
            with whole_folder(folder) as temporary:
                fill(temporary)
                if part == "final":  # a kill may come before it is noted
                    self.run.manifest[ON_ITS_WAY] = self._named(folder, temporary)
                    self.run.save()
        processes.wait_for_everyone()
        files = _files_in(folder)
        if part == "final":  # its card and its settings are the user's to edit: the weights are the model
            facts["beside"] = self.run.manifest.pop(ON_ITS_WAY, None) or self._named(folder, folder)
            files = [path for path in files if path.suffix == ".safetensors"]
        self.run.finish(part, files, **facts)

    def _set_aside(self, folder: Path) -> None:
        """Rename the final model's folder if the user has changed it: a new model is to take its place."""
        noted = self.run.manifest["stages"].get("final", {})
        beside = noted.get("beside", {})
        ours = dict.fromkeys(beside) if isinstance(beside, list) else dict(beside)  # a list: of an older version
        ours |= noted.get("files", {})
        half_noted = self.run.manifest.get(ON_ITS_WAY, {})

        def is_ours(name: str, sha: str) -> bool:
            return sha == half_noted.get(name) or (name in ours and ours[name] in (None, sha))

        theirs = [name for name, sha in self._named(folder, folder).items() if not is_ours(name, sha)]
        if not theirs:
            return
        places = (folder.with_name(f"{folder.name}.before-{number}") for number in count(1))
        place = next(place for place in places if not place.exists())
        folder.rename(place)
        say(f"{folder}: you have changed {', '.join(theirs[:3])}, so the folder is kept as {place.name}.")

    def _named(self, folder: Path, place: Path) -> dict[str, str]:
        """Name in the manifest -> checksum of each file of a model's folder, which may still lie in another place."""
        found = {}
        for path in _files_in(place):
            name = (folder / path.relative_to(place)).relative_to(self.run.folder)
            found[str(name)] = sha256(path)
        return found


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
