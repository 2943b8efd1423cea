"""Whole runs of the command line in forked children: imported once, killed at will."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import importlib
import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # a parent with threads at work must not fork
WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.chmod")
"""What Python does to files: each such event on a run's folder is a moment at which it may be killed."""
FIGURES: dict[str, int] = {}
"""What the tests found, printed at the end."""


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.write_line(", ".join(f"{name}: {value}" for name, value in FIGURES.items()))


class Child:
    """A forked process at one command after the other."""

    def __init__(self, commands, log, folder=None, kill_at=0):
        self.log, self.code = Path(log), None
        self.pid = os.fork()
        if self.pid == 0:
            self._work(commands, folder, kill_at)

    def _work(self, commands, folder, kill_at):
        code = 70
        try:
            with self.log.open("ab", buffering=0) as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w") for number in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            count = 0

            def moment(event, args):
                nonlocal count
                if event not in WRITES or str(folder) not in str(args[0]):
                    return
                if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    return
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            if folder is not None:
                sys.addaudithook(moment)
            from forgetfilter.cli import main

            for command in commands:
                main(list(map(str, command)))
            self.log.with_suffix(".count").write_text(str(count))
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self):
        """Exit code, or minus the signal that ended it."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def running(self):
        """Whether it is still at work."""
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code is None

    def stop(self, number, when):
        """Send a signal once a file is there; the exit code."""
        while not when():
            assert self.running(), f"ended too soon: {self.code}\n{self.text()}"
            time.sleep(0.01)
        os.kill(self.pid, number)
        return self.wait()

    def text(self):
        return self.log.read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="session", autouse=True)
def imported():
    """Import once what every child needs."""
    for name in ("cli", "forgetting", "decision.decide", "model.reading", "model.training", "report.run_page"):
        importlib.import_module(f"forgetfilter.{name}")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, tiny_model):
    """The commands of a whole run into a folder: filter, then finetune."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"prompt": f"what is {i}?", "completion": f"it is {i}" if i % 4 else f"you fool {i}"} for i in range(40)]
    safe = [{"prompt": f"tell me {i}", "completion": f"gladly {i}"} for i in range(16)]
    for name, lines in (("noisy", rows), ("safe", safe)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def commands(output):
        settings = {
            **{"model_name_or_path": tiny_model, "output_dir": output, "lora_r": 2, "dtype": "float32"},
            **{"dataset_name": folder / "noisy.jsonl", "safe_dataset_name": folder / "safe.jsonl"},
            **{"noisy.max_steps": 12, "review.max_steps": 12, "final.max_steps": 12, "learning_rate": 0.01},
            "threshold": 0.36,
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        return [["filter", *flags], ["finetune", output]]

    commands.rows = rows
    return commands


def outcome(folder):
    """What a finished run found: scores, decisions, and the final adapter's bytes."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "scores.parquet")
    kept = [json.loads(line) for line in (folder / "kept.jsonl").read_text().splitlines()]
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    model = (folder / "model" / "adapter_model.safetensors").read_bytes()
    return table["forgetting"].to_pylist(), table["decision"].to_pylist(), kept, dropped, model


def check_whole(folder):
    """Every file under its final name can be read; checkpoints vouch for themselves."""
    import pyarrow.parquet as pq
    from safetensors import safe_open

    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or "checkpoints" in path.parts or not path.is_file():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                list(file.keys())


@pytest.fixture(scope="session")
def unbroken(inputs, tmp_path_factory):
    """An unbroken run's outcome, and its number of moments."""
    folder = tmp_path_factory.mktemp("unbroken")
    child = Child(inputs(folder / "out"), folder / "log", folder / "out")
    assert child.wait() == 0, child.text()
    return outcome(folder / "out"), int((folder / "log.count").read_text())


@pytest.fixture
def children():
    """Starts children, and lets none outlive its test."""
    started = []

    def start(*args, **options):
        started.append(Child(*args, **options))
        return started[-1]

    yield start
    for child in started:
        if child.running():
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
