"""Who may import what, and who may read a label."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import forgetfilter

ROOT = Path(forgetfilter.__file__).parent


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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


LIGHT = ["thresholds.py", "data", "evaluation", "runs.py", "scores.py", "decisions.py", "config.py"]


@pytest.mark.parametrize("name", LIGHT)
def test_deciding_and_data_know_no_model(name):
    files = [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).glob("*.py"))
    for path in files:
        if path.name == "ask.py":  # puts the measures' questions to a model
            continue
        forbidden = {"torch", "peft", "trl", "forgetfilter.models", "forgetfilter.training", "forgetfilter.signals"}
        assert not forbidden & imports(path), path


def test_trl_is_called_from_one_room():
    assert [path.name for path in ROOT.rglob("*.py") if "trl" in imports(path)] == ["training.py"]


def test_defenses_know_neither_each_other_nor_a_label():
    defenses = sorted((ROOT / "defenses").glob("*.py"))
    names = {f"forgetfilter.defenses.{path.stem}" for path in defenses} - {"forgetfilter.defenses.inputs"}
    for path in defenses:
        used = names & imports(path)
        if path.stem == "forget_filter_self_correction":  # what it is made of
            used -= {"forgetfilter.defenses.forget_filter", "forgetfilter.defenses.self_correction"}
        assert path.stem == "__init__" or not used, path
        assert not any("evaluation" in name for name in imports(path)), path


def test_only_data_and_the_figures_read_labels():
    readers = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if {"forgetfilter.data.loading.read_labels", "forgetfilter.evaluation.filter_quality"} & imports(path)
    ]
    assert readers == ["decisions.py"]
    source = (ROOT / "decisions.py").read_text(encoding="utf-8")
    calls = [
        (function.name, call.func.id)
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    ]
    assert [where for where, called in calls if called in ("read_labels", "filter_quality")] == [
        "_metrics",
        "stored_labels",
    ]
