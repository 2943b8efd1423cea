"""A run's folder: its settings, which parts are done, whether their files are intact, and the last decision."""

import errno
import json
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import Timeout

from forgetfilter import processes
from forgetfilter.changes import as_json, differences
from forgetfilter.config import MARKED, ForgetFilterConfig
from forgetfilter.data.builtin import is_builtin
from forgetfilter.data.card import CARD
from forgetfilter.data.source import Source
from forgetfilter.data.sources import load_source
from forgetfilter.errors import ConfigError, RunError
from forgetfilter.files import (
    LOCK,
    at_home,
    lock,
    make_folder,
    remove_temporaries,
    sha256,
    whole_file,
    write_text,
)

DEFAULT_FILTER = "forgetting"
"""The filter of a run whose config.yaml names none: the default until version 0.2."""
FILTER_OF = {"log_likelihood": "forgetting", "rouge1": "forgetting_rouge1"}
"""Value of `signal`, which named the filter in version 0.1.0 -> name of the filter today."""
NAMING = frozenset(
    {"model_name_or_path", "dataset_name", "safe_dataset_name", "unsafe_dataset_name", "alignment_dataset_name"}
    | {"planted_rows"}
)
"""Settings that may name a file or a folder."""
FILTERED, COMPARISON, JUDGED = "a run of `filter`", "a comparison (`compare`)", "rows that `score` has judged"
"""What a folder of ours holds."""
PACKAGES = ("forgetfilter", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


class Run:
    """A run's folder and its manifest.

    A stage counts as done once the manifest lists it with the checksums of its files. It is listed only after its files
    are written. So if the process is killed, every stage is either done or will be done again.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Wrap a folder and what its manifest.json holds."""
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def start(
        cls,
        config: ForgetFilterConfig,
        facts: dict[str, Any],
        notes: dict[str, Any] | None = None,
        *,
        settled: bool = True,
    ) -> "Run":
        """Open the config's output_dir as a new run, or as the one to continue.

        Args:
            config: All settings.
            facts: What the scores depend on besides the settings: fingerprints of data and weights.
            notes: What else was noted: counts of rows, and where the chat template comes from.
            settled: Replace an existing config.yaml now. Without, the caller does so (`keep_config`) after the work, so
                that a command that fails leaves the old one.

        Raises:
            RunError: If the folder holds something else: other files, other data or other settings.
        """
        folder = config.folder
        asked = _asked(config, facts)
        run = cls.continued(config, facts)
        if run is None:
            about = {"versions": _versions(), "git_sha": git_sha(), "processes": processes.count(), "started": _now()}
            run = cls(folder, {**about, **asked, "notes": notes or {}, "stages": {}})
            run.save()
            remove_temporaries(folder)
        if settled or not (folder / "config.yaml").exists():
            run.keep_config(config)
        return run

    @classmethod
    def continued(cls, config: ForgetFilterConfig, facts: dict[str, Any]) -> "Run | None":
        """The run in the config's output_dir, if it is the one asked for; None where nothing is there yet.

        Args:
            config: See `start`.
            facts: See there; what is not known yet may be left out.

        Raises:
            RunError: If the folder holds something else.
        """
        folder = config.folder
        if not (folder / "manifest.json").exists():
            refuse_foreign(folder)
            return None
        run = cls.open(folder)
        if run.holds != (COMPARISON if "recipe" in facts else FILTERED):
            raise RunError(f"{folder}: holds {run.holds}. Give another --output_dir.")
        for part, value in _asked(config, facts).items():
            if part not in run.manifest:  # of a later version
                continue
            changed = differences(part, run.manifest.get(part), value)
            if changed:
                raise RunError(
                    f"{folder}: holds a run with other data or settings: "
                    f"{', '.join(part + change for change in changed)}. "
                    "Give another --output_dir, or the same settings to continue."
                )
        return run

    def keep_config(self, config: ForgetFilterConfig) -> None:
        """Write config.yaml: the flags that replay the run."""
        flags = {key: value for key, value in config.non_default().items() if key != "output_dir"}
        for name in NAMING.intersection(flags):  # later commands may run in another folder
            if flags[name] is None:  # rows given by a program
                continue
            path = Path(at_home(flags[name]))
            if flags[name] != MARKED and not is_builtin(flags[name]) and path.exists():
                flags[name] = str(path.absolute())
        write_text(self.folder / "config.yaml", yaml.safe_dump(flags, sort_keys=False, allow_unicode=True))

    @classmethod
    def open(cls, folder: Path | str) -> "Run":
        """Open the folder of a run that was started before.

        Raises:
            RunError: If the folder holds no run.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            stages = manifest.get("stages") if isinstance(manifest, dict) else None
            if not isinstance(stages, dict) or not all(_lists_files(*item) for item in stages.items()):
                raise ValueError("not one of ours")
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(
                f"{folder}: no run's folder (manifest.json: {error}). `filter` makes one in a new or empty folder."
            ) from error
        return cls(folder, manifest)

    @classmethod
    def filtered(cls, folder: Path | str) -> "Run":
        """Open the folder of a run of `filter`.

        Raises:
            RunError: If it holds none, but something else of ours.
        """
        run = cls.open(folder)
        if run.holds != FILTERED:
            raise RunError(f"{folder}: holds {run.holds}, no {FILTERED.removeprefix('a ')}.")
        return run

    @property
    def holds(self) -> str:
        """What has made the folder."""
        if "asked" in self.manifest and "settings" not in self.manifest:
            return JUDGED
        return COMPARISON if "recipe" in self.manifest else FILTERED

    @property
    def row_format(self) -> str:
        """Format of the noisy rows, as `read_row` takes it."""
        return str(self.manifest["noisy"]["format"])

    def reload(self) -> None:
        """Read the manifest anew: another process may have changed it before the folder was locked."""
        self.manifest = Run.open(self.folder).manifest

    def config(self) -> ForgetFilterConfig:
        """The settings in config.yaml.

        Raises:
            RunError: If it cannot be read, or has other settings than those in the manifest.
        """
        try:
            flags = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8")) or {}
            flags = self._with_a_model_that_moved_along(todays_flags(flags))
            config = ForgetFilterConfig.from_flags({**flags, "output_dir": str(self.folder)})
        except (ConfigError, OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
            raise RunError(
                f"{self.folder}: its config.yaml is missing or damaged: {error}. Run `filter` again."
            ) from error
        asked = as_json(config.identity())
        changed = differences("settings", self.manifest.get("settings"), asked)
        if changed:
            different = ", ".join(change.removeprefix(".") for change in changed)
            raise RunError(
                f"{self.folder}: its config.yaml isn't the one this run was made by: {different}. "
                "The run's own `filter` command writes it anew."
            )
        return config

    def _with_a_model_that_moved_along(self, flags: dict[str, Any]) -> dict[str, Any]:
        """The flags, with the model's name as it was given where its absolute place has none any more."""
        name, given = flags.get("model_name_or_path"), self.manifest.get("settings", {}).get("model_name_or_path")
        moved = isinstance(name, str) and Path(name).is_absolute() and not Path(name).exists()
        return {**flags, "model_name_or_path": given} if moved and given else flags

    @property
    def template_note(self) -> str | None:
        """Where the chat template comes from, if a trainer would not find it with the model."""
        found: str | None = self.manifest.get("notes", {}).get("chat_template")
        return found

    def stage(self, name: str) -> Path:
        """Folder of a stage, or of what belongs to the stages."""
        return self.folder / "stages" / name

    def model(self, name: str) -> Path:
        """Folder of the model that a stage of this name ended with; of several the one trained last.

        Raises:
            RunError: If there is none.
        """
        parts = [part for part in self.manifest["stages"] if part == name or part.rpartition("-")[0] == name]
        if not parts:
            raise RunError(f"{self.folder}: has no {name} stage.")
        return self.stage(parts[-1]) / "model"

    def table_file(self, part: str) -> Path:
        """File of a part that is a table."""
        return self.folder / f"{part}.parquet"

    def done(self, part: str, made_of: str | None = None) -> bool:
        """Whether a part is finished and its files are unchanged and, if `made_of` is given, it has the same inputs."""
        entry = self.manifest["stages"].get(part)
        if entry is None or (made_of is not None and entry.get("made_of") != made_of):
            return False
        files: dict[str, str] = entry["files"]
        wanted = [*files, *(name for name in entry.get("beside", []) if not name.endswith(CARD))]
        there = all((self.folder / name).is_file() for name in wanted)
        return there and all(sha256(self.folder / name) == digest for name, digest in files.items())

    def forget(self, part: str) -> None:
        """Before a part is made anew: it no longer counts as done."""
        self.manifest["stages"].pop(part, None)
        self.save()

    def forget_damaged(self) -> None:
        """Forget damaged models and readings, to make them anew; if there are any, forget all scores, too."""
        parts = [part for part in self.manifest["stages"] if part not in ("decision", "final")]
        damaged = [part for part in parts if not self.done(part)]
        scored = [part for part in parts if part.startswith("scored/")] if damaged else []
        for part in {*damaged, *scored}:
            self.forget(part)

    def finish(self, part: str, files: list[Path], **facts: Any) -> None:
        """Note a part as finished, with its files' checksums and whatever should be kept about it."""
        digests = {str(file.relative_to(self.folder)): sha256(file) for file in files}
        self.manifest["stages"][part] = {**facts, "files": digests}
        self.save()

    def save(self) -> None:
        """Write manifest.json."""
        self.write_json("manifest.json", self.manifest)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file in the folder (the first process does)."""
        if processes.is_main_process():
            write_text(self.folder / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def keep_rows(self, source: Source) -> None:
        """Copy the noisy data into the run, so that any decision can be taken again later."""
        source = source.writable()
        path = self.stage(f"rows{source.suffix}")
        with whole_file(path) as temporary:
            source.write(temporary)
        self.finish("rows", [path])

    def rows(self) -> Source:
        """The noisy data as it came in, malformed rows taken out."""
        if not self.done("rows"):
            raise RunError(f"{self.folder}: its copy of the noisy data is missing or damaged. Run `filter` again.")
        (name,) = self.manifest["stages"]["rows"]["files"]
        rows = load_source(self.folder / name, scratch_folder=self.folder)
        rows.errors.clear()  # each was well formed when the run was made, by the rules of then
        return rows

    def keep_planted(self, about: list[dict[str, Any]]) -> None:
        """Note what the planted rows are; see `planted`. The first process does."""
        self._keep_noted("planted", about)

    def planted(self) -> list[dict[str, Any]]:
        """Of each planted row its notion, and whether it is unsafe and unreadable; empty where none are planted.

        See data/planted.py.
        """
        return list(self._noted("planted") or [])

    def keep_answers(self, counts: np.ndarray) -> None:
        """Note how many answers each row has; see `answers`. All processes do."""
        self._keep_noted("answers", counts.tolist(), by_all=True)

    def answers(self) -> np.ndarray | None:
        """(rows that filters see,) how many answers each has; None where none has several (data/single_answers.py)."""
        counts = self._noted("answers")
        return None if counts is None else np.array(counts)

    def keep_unreadable(self, rows: np.ndarray) -> None:
        """Note the rows, (rows,) bool, that the model can hardly read. The first process does."""
        self._keep_noted("unreadable", np.flatnonzero(rows).tolist())

    def unreadable(self, rows: int) -> np.ndarray:
        """(rows,) bool, the rows that the model can hardly read; none in runs of versions that looked for none."""
        found = np.zeros(rows, bool)
        found[self._noted("unreadable") or []] = True
        return found

    def _keep_noted(self, part: str, value: list[Any], *, by_all: bool = False) -> None:
        path = self.stage(f"{part}.json")
        self.write_json(str(path.relative_to(self.folder)), value)
        if by_all:  # the first process writes it, and all look at it
            processes.wait_for_everyone()
        self.finish(part, [path])

    def _noted(self, part: str) -> Any:
        """What was noted as a part of the run; None where nothing was.

        Raises:
            RunError: If its file is damaged.
        """
        path = self.stage(f"{part}.json")
        damaged = part in self.manifest["stages"] and not self.done(part)
        try:
            if not damaged:
                return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError:  # of an older version, which kept no checksum of it
            pass
        raise RunError(f"{path}: missing or damaged. Run `filter` again.")


def _asked(config: ForgetFilterConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything that a run's manifest must say for the run to be the one asked for."""
    asked: dict[str, Any] = as_json({"settings": config.identity(), **facts})
    return asked


def todays_flags(found: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a config.yaml of any version, under today's names."""
    today = dict(found)
    if "signal" in today:
        names = str(today.pop("signal")).replace(",", " ").split()
        today["filter"] = ",".join(FILTER_OF.get(name, name) for name in names)
    return {"filter": DEFAULT_FILTER, **today}


def refuse_foreign(folder: Path) -> None:
    """Raise RunError if a folder holds something, but no run."""
    ours = re.compile(
        r"\.lock|\.manifest\.json\.\d+\.tmp"  # the second: of a process killed at its start
        r"|\.nfs\w+|\.scratch-.*\.tmp"  # files without a name, as network file systems list them
    )
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--output_dir: {folder}: a file stands where a folder is to be.")
    files = list(folder.iterdir()) if folder.is_dir() else []
    if not (folder / "manifest.json").exists() and any(not ours.fullmatch(file.name) for file in files):
        raise RunError(f"{folder}: not empty, and no run of ours. Give another --output_dir.")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes off a run's folder.

    Raises:
        RunError: If one is at work on it, or it is no run of ours, or a file is where it is to be.
    """
    if not processes.is_main_process():
        yield
        return
    try:
        make_folder(folder)
    except ConfigError as error:
        raise RunError(f"--output_dir: {error}") from error
    if (folder / "manifest.json").exists():
        Run.open(folder)  # refuses another program's
    else:
        refuse_foreign(folder)
    try:
        held = lock(folder / LOCK, RunError, timeout=0)
    except Timeout as error:
        raise RunError(f"{folder}: another process is at work on this run ({LOCK}). Wait for it or stop it.") from error
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        why = "you may not write there, and every command locks the folder of the run that it reads"
        raise RunError(f"{folder}: {why}. Copy the folder to a place of yours.") from error
    with held:
        remove_temporaries(folder)
        yield


def _lists_files(part: str, entry: Any) -> bool:
    """Whether a part of the manifest names files by checksum, and lies with them inside the run's folder."""
    files = entry.get("files") if isinstance(entry, dict) else None
    return isinstance(files, dict) and not any(
        Path(name).is_absolute() or ".." in Path(name).parts for name in (part, *files)
    )


@cache
def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


@cache
def git_sha() -> str | None:
    """Commit of the package's own checkout; None for an installed package."""
    here = Path(__file__)
    git = partial(subprocess.run, cwd=here.parent, capture_output=True, text=True, check=True)
    try:
        git(["git", "ls-files", "--error-unmatch", here.name])  # the checkout around may be someone else's
        return str(git(["git", "rev-parse", "HEAD"]).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return None


def first_day(folder: str | None) -> date:
    """The day that the run in a folder takes for today: its first; today where there is no run yet."""
    if folder is None:
        return date.today()
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
        if "today" in manifest:
            return date.fromisoformat(manifest["today"])
        return datetime.fromisoformat(manifest["started"]).astimezone().date()  # an older run
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return date.today()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
