"""Files and folders are there complete, or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest

from forgetfilter import files
from forgetfilter.data import lazy
from forgetfilter.errors import DataError, RunError
from forgetfilter.files import remove_temporaries, whole_file, whole_folder
from forgetfilter.marks import Marks
from forgetfilter.runs import Run, locked


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    real = Path.rename

    def failing(path, target):
        if (path / "new").exists():
            raise OSError("no")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), whole_folder(tmp_path / "model") as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


def test_what_a_kill_has_left_is_removed_or_put_back_but_not_in_another_runs_folder(tmp_path):
    moved = tmp_path / ".model-abcdefgh.tmp" / "model"
    moved.mkdir(parents=True)
    (moved / "weights").write_text("old")
    (tmp_path / ".kept.jsonl.123.tmp").write_text("half")
    inner = tmp_path / "scored_rows" / "more"
    inner.mkdir(parents=True)
    (inner / ".lock").write_text("")
    (inner / ".kept.jsonl.124.tmp").write_text("being written")
    remove_temporaries(tmp_path)
    assert (tmp_path / "model" / "weights").read_text() == "old"
    found = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert found == [".kept.jsonl.124.tmp", ".lock", "weights"]


def test_the_longest_names_can_be_written(tmp_path):
    path = tmp_path / ("n" * 250 + ".json")
    with whole_file(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"


def test_an_array_on_disk_has_its_place_before_it_is_filled(tmp_path, monkeypatch):
    """Else a full disk ends the process by a signal in the middle of the work."""
    path = tmp_path / "array"
    monkeypatch.setattr(lazy, "scratch", lambda folder: path.open("wb+"))
    found = lazy.mapped((1000, 100), np.float16, tmp_path)
    assert path.stat().st_blocks * 512 >= found.nbytes


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_text("[1, 2"), lambda path: path.write_text("[]")]
)
@pytest.mark.parametrize("noted", ["planted", "answers", "unreadable"])
def test_what_was_noted_of_the_rows_is_not_read_if_it_is_damaged(noted, damage, tmp_path):
    run = Run(tmp_path, {"stages": {}})
    keep = getattr(run, f"keep_{noted}")
    keep([{"notion": "insults", "unsafe": True}] if noted == "planted" else np.array([True, False]))
    read = run.planted if noted == "planted" else run.answers if noted == "answers" else lambda: run.unreadable(2)
    assert len(read())
    damage(run.stage(f"{noted}.json"))
    with pytest.raises(RunError, match=rf"{noted}\.json: missing or damaged"):
        read()


def test_a_folder_that_is_not_ours_is_left_as_it_was(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "a web page"}))
    (tmp_path / ".cache-abcdefgh.tmp").write_text("theirs")
    with pytest.raises(RunError, match="no run's folder"), locked(tmp_path):
        pass
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(RunError, match="no run of ours"), locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".cache-abcdefgh.tmp"]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def none(*_, **__):
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(files.FileLock, "acquire", none)
    with pytest.raises(RunError, match="cannot lock files"), locked(tmp_path / "out"):
        pass
    marks = Marks(tmp_path / "out", ["a"], 0)
    with pytest.raises(DataError, match="cannot lock files"):
        marks.add({0: "clean"})
    assert not marks.path.exists()
