"""Kill -9 at many moments, signals, full and read-only disks, two at once, damaged files: nothing is lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from faults.conftest import FIGURES, check_whole, outcome

pytestmark = pytest.mark.faults
MOMENTS = 30


def finish(children, inputs, folder, expected):
    """The same commands again end where an unbroken run does."""
    child = children(inputs(folder), folder.parent / "log")
    assert child.wait() == 0, child.text()
    found = outcome(folder)
    rows = Counter(map(str, [*found[2], *found[3]]))
    FIGURES["rows lost"] = FIGURES.get("rows lost", 0) + (Counter(map(str, inputs.rows)) - rows).total()
    assert found == expected
    assert not list(folder.rglob(".*.tmp"))


@pytest.mark.parametrize("part", range(MOMENTS))
def test_a_run_killed_at_any_moment_ends_as_an_unbroken_one(part, inputs, unbroken, children, tmp_path):
    expected, moments = unbroken
    at = 2 + part * (moments - 2) // MOMENTS
    folder = tmp_path / "out"
    assert children(inputs(folder), tmp_path / "log", folder, kill_at=at).wait() == -signal.SIGKILL
    check_whole(folder)
    FIGURES["moments killed"] = FIGURES.get("moments killed", 0) + 1
    finish(children, inputs, folder, expected)
    FIGURES["runs finished"] = FIGURES.get("runs finished", 0) + 1


def test_a_run_killed_again_and_again_gets_there(inputs, unbroken, children, tmp_path):
    expected, moments = unbroken
    for at in range(7, moments, 23):
        children(inputs(tmp_path / "out"), tmp_path / "log", tmp_path / "out", kill_at=at).wait()
        check_whole(tmp_path / "out")
    finish(children, inputs, tmp_path / "out", expected)


@pytest.mark.parametrize("seconds", [0.5, 3])
def test_a_process_of_its_own_killed_whatever_it_does(inputs, unbroken, children, tmp_path, seconds):
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "forgetfilter", *map(str, inputs(folder)[0])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "manifest.json").exists():
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.wait()
    check_whole(folder)
    finish(children, inputs, folder, unbroken[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_a_run_with_a_word_on_how_to_go_on(inputs, unbroken, children, tmp_path, number, code):
    folder = tmp_path / "out"
    child = children(inputs(folder), tmp_path / "log")
    ended = child.stop(number, lambda: list(folder.glob("stages/noisy-*/checkpoints")))
    assert ended == code, child.text()
    assert "the same command continues where it was" in child.text()
    assert "Traceback" not in child.text()
    finish(children, inputs, folder, unbroken[0])


@pytest.fixture
def disk(tmp_path):
    """A small disk of one's own; root alone can mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], check=False
        ).returncode

    if os.geteuid() != 0 or mount("size=64k") != 0:
        pytest.skip("mounting a small disk takes root")
    yield folder, mount
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("size", ["48k", "200k", "400k"])
def test_a_full_disk_is_one_clear_error_and_with_room_the_run_goes_on(inputs, unbroken, children, disk, tmp_path, size):
    folder, mount = disk
    assert mount("remount", f"size={size}") == 0
    child = children(inputs(folder / "out"), tmp_path / "log")
    assert child.wait() == 2, child.text()
    assert re.search("error: .*(No space left on device|Is the disk full)", child.text())
    assert "Traceback" not in child.text()
    check_whole(folder / "out")
    assert mount("remount", "size=64m") == 0
    finish(children, inputs, folder / "out", unbroken[0])


def test_a_read_only_folder_is_one_clear_error(inputs, children, disk, tmp_path):
    folder, mount = disk
    assert mount("remount", "ro") == 0
    child = children(inputs(folder / "out"), tmp_path / "log")
    assert child.wait() == 2, child.text()
    assert re.search("error: .*Read-only file system", child.text())
    assert "Traceback" not in child.text()


def test_of_two_processes_on_one_folder_the_second_is_refused(inputs, unbroken, children, tmp_path):
    folder = tmp_path / "out"
    first = children(inputs(folder), tmp_path / "first")
    while not (folder / "manifest.json").exists():
        time.sleep(0.01)
    second = children(inputs(folder), tmp_path / "second")
    assert second.wait() == 2
    assert "another process is at work" in second.text()
    assert first.wait() == 0
    assert outcome(folder) == unbroken[0]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    from faults.conftest import Child

    folder = tmp_path_factory.mktemp("finished")
    assert Child(inputs(folder / "out"), folder / "log").wait() == 0
    return folder / "out"


def test_a_decision_by_hand_outlives_a_kill_at_any_moment_of_the_next(finished, inputs, children, tmp_path):
    said = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    said[0].write_text("".join(f'{{"row": {row}, "decision": "dropped"}}\n' for row in range(5)))
    said[1].write_text("".join(f'{{"row": {row}, "decision": "kept"}}\n' for row in range(5)))
    shutil.copytree(finished, tmp_path / "once")
    assert children([["decide", tmp_path / "once", "--decisions", said[0]]], tmp_path / "log").wait() == 0
    seen = set()
    for at in range(1, 200):
        folder = tmp_path / f"out-{at}"
        shutil.copytree(tmp_path / "once", folder)
        second = children([["decide", folder, "--decisions", said[1]]], tmp_path / "log", folder, kill_at=at)
        if second.wait() == 0:
            break
        assert second.wait() == -signal.SIGKILL
        check_whole(folder)
        again = children(inputs(folder)[:1], tmp_path / "log")
        assert again.wait() == 0, again.text()
        kept, dropped = ((folder / f"{name}.jsonl").read_text().splitlines() for name in ("kept", "dropped"))
        assert Counter(kept + dropped) == Counter(map(json.dumps, inputs.rows))
        first_five = [json.dumps(row) in kept for row in inputs.rows[:5]]
        assert len(set(first_five)) == 1  # one of both decisions, whole
        seen.add(first_five[0])
        shutil.rmtree(folder)
    assert second.wait() == 0
    assert seen == {True, False}


@pytest.mark.parametrize(
    "name",
    [
        *("stages/noisy-*/model/adapter_model.safetensors", "readings/noisy-log_probs-*.parquet", "stages/rows.jsonl"),
        *("stages/review-*/model/adapter_model.safetensors", "readings/firm-log_probs-*.parquet", "scores.parquet"),
        *("scored/forgetting-*.parquet", "kept.jsonl", "model/adapter_model.safetensors"),
    ],
)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_found_and_made_anew(name, damage, finished, inputs, unbroken, children, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    (path,) = folder.glob(name)
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        middle = len(data) // 2
        path.write_bytes(
            data[:middle] + (bytes([data[middle] ^ 1]) + data[middle + 1 :] if damage == "flipped" else b"")
        )
    finish(children, inputs, folder, unbroken[0])
    if name != "scores.parquet":  # written anew, with the same content
        assert path.read_bytes() == data


def test_a_damaged_checkpoint_is_not_trained_on_from(inputs, unbroken, children, tmp_path):
    folder = tmp_path / "out"
    checkpoints = "stages/noisy-*/checkpoints"
    child = children(inputs(folder), tmp_path / "log")
    child.stop(signal.SIGKILL, lambda: list(folder.glob(f"{checkpoints}/*/whole.json")))
    (weights,) = folder.glob(f"{checkpoints}/checkpoint-10/adapter_model.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 64]))
    finish(children, inputs, folder, unbroken[0])


def test_secrets_of_the_environment_never_reach_the_folder(inputs, children, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesamsesamsesam")
    folder = tmp_path / "out"
    child = children(inputs(folder), tmp_path / "log")
    seen = set()
    while child.running():
        for path in (Path(where) / name for where, _, names in os.walk(folder) for name in names):
            try:
                data = path.read_bytes()
            except OSError:  # gone since; os.walk passes over folders that are
                continue
            seen.add(path.name)
            assert b"secretsecret" not in data, path
            assert b"sesamsesam" not in data, path
        time.sleep(0.05)
    assert child.wait() == 0
    assert {"manifest.json", "config.yaml"} <= seen
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"secretsecret" not in path.read_bytes(), path
