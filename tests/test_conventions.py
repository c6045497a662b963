"""The house rules, for every folder that exists: six train.py that read alike, folders that stand alone."""

import argparse
import ast
import re

import pytest
from conftest import ROOT, launch, load

FOLDERS = ["fsq_vqvae", "vvae_lam", "laq", "vla", "pi05_finetune", "vae_distill"]
HERE = [name for name in FOLDERS if (ROOT / name / "train.py").exists()]
SCRIPTS = [file for name in HERE for file in sorted((ROOT / name).glob("*.py"))]
SECTIONS = ["setup", "model", "resume", "data", "loop", "end"]
LOCALS = set("args dist log model opt amp scaler first step micro batch loss metrics norm".split())
INSERT = "sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up"
FORBIDDEN = (
    r"torch\.cuda\.amp|allow_pickle\s*=\s*True|weights_only\s*=\s*False|find_unused_parameters\s*=\s*True|yaml\.load\("
)


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def test_there_is_a_folder():
    assert HERE


@pytest.mark.parametrize("name", HERE)
def test_folder_is_complete(name):
    for file in ("model.py", "data.py", "train.py", "demo.py", "demo.args", "README.md"):
        assert (ROOT / name / file).is_file(), f"{name}/{file} is missing"


@pytest.mark.parametrize("name", HERE)
def test_sections_of_train_come_in_order(name):
    text = (ROOT / name / "train.py").read_text()
    assert re.findall(r"^    # --- (\w+)$", text, re.M) == SECTIONS


@pytest.mark.parametrize("name", HERE)
def test_docstring_says_how_to_run(name):
    doc = ast.get_docstring(ast.parse((ROOT / name / "train.py").read_text()))
    assert f"\n  python {name}/train.py\n" in doc and "torchrun --nproc_per_node" in doc


@pytest.mark.parametrize("name", [name for name in HERE if name != "vae_distill"])
def test_main_uses_the_same_names(name):
    tree = ast.parse((ROOT / name / "train.py").read_text())
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert {node.id for node in ast.walk(main) if isinstance(node, ast.Name)} >= LOCALS


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_imports_and_forbidden_calls(file):
    text = file.read_text()
    found = set(imports(ast.parse(text)))
    assert not found & set(FOLDERS), "folders talk through files, never through imports"
    assert not re.search(FORBIDDEN, text)
    if file.name in ("model.py", "data.py"):
        assert "common" not in found
    if "common" in found:
        assert INSERT in text


@pytest.mark.parametrize("name", HERE)
def test_every_flag_has_help_and_no_underscore(name, monkeypatch):
    module, seen = load(name), {}
    add = argparse._ActionsContainer.add_argument

    def watched(self, *names, **kwargs):
        seen.update({flag: kwargs.get("help") for flag in names if flag.startswith("--")})
        return add(self, *names, **kwargs)

    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", watched)
    with pytest.raises(SystemExit) as done:
        module.train.parse(["--help"])
    assert done.value.code == 0 and len(seen) > 20
    assert all(seen.values()) and not [flag for flag in seen if "_" in flag]


def test_common_needs_no_torch_and_names_no_folder():
    """The JAX folder uses it without torch; a copied folder may have another name."""
    tree = ast.parse((ROOT / "common.py").read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not {"torch", "jax", "wandb"} & set(imports(ast.Module(top, [])))
    assert not [name for name in FOLDERS if re.search(rf"\b{name}\b", (ROOT / "common.py").read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_help_of_every_script(file):
    if "argparse" in file.read_text() or "common.flags" in file.read_text() or "common.Parser" in file.read_text():
        done = launch(file, "--help")
        assert done.returncode == 0 and "Run:" in done.stdout, done.stderr
