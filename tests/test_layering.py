"""Who may import what, and who may read a label."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import forgetfilter

ROOT = Path(forgetfilter.__file__).parent


def imports(path):
    """What a file imports when it runs: not what it needs for its annotations alone."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    typing = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    tree.body = [node for node in tree.body if node not in typing]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_the_public_names():
    assert sorted(forgetfilter.__all__) == [
        "ForgetFilter",
        "ForgetFilterConfig",
        "ForgetFilterError",
        "Result",
        "StageConfig",
    ]
    for name in forgetfilter.__all__:
        assert getattr(forgetfilter, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = forgetfilter.nonsense


def test_importing_the_package_or_its_command_line_imports_nothing_heavy():
    code = "import sys, forgetfilter.cli; print([m for m in ('torch', 'numpy', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


LIGHT = ["decision", "data", "evaluation", "filters", "report", "runs.py", "old_runs.py", "scored.py", "config.py"]
MODELS = {"torch", "peft", "trl", *(f"forgetfilter.{room}" for room in ("alignment", "judge", "model", "workshop"))}


@pytest.mark.parametrize("name", LIGHT)
def test_deciding_and_data_know_no_model(name):
    files = [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).glob("*.py"))
    for path in files:
        if path.name == "ask.py":  # puts the measures' questions to a model
            continue
        known = {name for name in imports(path) if any(f"{name}.".startswith(f"{model}.") for model in MODELS)}
        assert not known, path


def test_trl_is_called_from_one_room():
    assert [path.name for path in ROOT.rglob("*.py") if "trl" in imports(path)] == ["training.py"]


def test_everything_that_trains_or_loads_goes_through_the_workshop():
    rooms = {"forgetfilter.model.training.train": [], "forgetfilter.model.learner.load_learner": []}
    for path in ROOT.rglob("*.py"):
        for name in rooms.keys() & imports(path):
            rooms[name].append(path.name)
    assert all(files == ["workshop.py"] for files in rooms.values())


def test_filters_and_defenses_know_neither_each_other_nor_a_label():
    methods = {path: f"forgetfilter.{path.parent.name}.{path.stem}" for path in ROOT.glob("[fd]e*s/*.py")}
    methods |= {path: f"forgetfilter.filters.{path.stem}" for path in ROOT.glob("filters/*.py")}
    shared = {
        "defenses.result",
        "defenses.adapters",
        "defenses.pairs",
        "defenses.keeping",
        "defenses.self_correction",
        "filters.forgetting",
        "filters.scoring",
    }
    names = {name for name in methods.values() if name.removeprefix("forgetfilter.") not in shared}
    for path in methods:
        used = {f"{name}" for name in names & imports(path)}
        assert path.stem == "__init__" or not used, path
        assert not any("evaluation" in name or name.endswith("labels") for name in imports(path)), path


def test_nothing_but_its_file_knows_the_default_filters_stages():
    knowing = [path for path in sorted(ROOT.rglob("*.py")) if "firm" in path.read_text(encoding="utf-8")]
    assert [str(path.relative_to(ROOT)) for path in knowing] == ["filters/forgetting.py", "old_runs.py"]


def test_no_rule_knows_a_filters_name():
    from forgetfilter.filters import FILTERS

    for path in (ROOT / "decision").glob("*.py"):
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not texts & FILTERS.keys(), path


def test_only_data_and_the_figures_read_labels():
    wanted = {f"forgetfilter.data.loading.{name}" for name in ("read_labels", "stored_labels")}
    wanted |= {f"forgetfilter.evaluation.filter_quality.{name}" for name in ("filter_quality", "ranking_quality")}
    readers = {str(path.relative_to(ROOT)): wanted & imports(path) for path in ROOT.rglob("*.py")}
    assert {name for name, used in readers.items() if used} == {
        "data/planted.py",  # of the planted rows alone, which are not the user's
        "decision/opened.py",  # for the figures and the page
        "decision/outputs.py",
        "experiments/filters.py",
        "experiments/trial.py",
    }
    for name in ("choice.py", "decide.py", "record.py", "rules.py"):
        assert "labels" not in (ROOT / "decision" / name).read_text(encoding="utf-8")
