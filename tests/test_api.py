"""The page on the Python API: its examples run as they stand, and nothing public or runnable is left out of it."""

import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys

import pytest
from tiny import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()
PUBLIC = [(package, name) for package in ("merge", "eval") for name in importlib.import_module(package)._PUBLIC]


def test_the_examples_run_in_order(tmp_path, tiny_cache):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == PAGE.count("```") // 2
    (tmp_path / "page.py").write_text("\n".join(blocks))
    for name in ("configs", "alphas"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {"XDG_CACHE_HOME": str(tiny_cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders > {"base", "drop-last", "found", "searched", "fused", "bench", "projected", "arithmetic", "study"}
    assert (tmp_path / "study" / "report.html").is_file()


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/[!_]*.py")), ids=lambda path: path.name)
def test_every_script_has_a_call(path):
    assert path.name == "demo.py" or f"`scripts/{path.name}`" in PAGE


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_public_names_are_documented(package, name):
    module = importlib.import_module(package)
    assert name in module.__all__
    with pytest.raises(ModuleNotFoundError):  # `from eval import mmlu` must stay the module
        importlib.import_module(f"{package}.{name}")
    assert re.search(rf"\b{name}\b", PAGE), f"docs/api.md does not name {name}"
    found = getattr(module, name)
    if not inspect.isroutine(found) and not inspect.isclass(found):
        return  # a registry
    assert found.__module__.startswith(f"{package}.")
    assert found.__doc__
    assert not found.__doc__.startswith(f"{name}(")  # what a dataclass has without one
    if inspect.isclass(found):
        assert issubclass(found, Exception) or dataclasses.is_dataclass(found)
    else:
        signature = inspect.signature(found)
        assert signature.return_annotation is not signature.empty
        assert all(one.annotation is not one.empty for one in signature.parameters.values())


def test_importing_the_packages_costs_nothing():
    heavy = "{'torch', 'numpy', 'transformers', 'lm_eval'}"
    code = f"import sys, merge; from eval import __all__; assert not {heavy} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=60)
