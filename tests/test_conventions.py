"""The rules that make six folders one house: a diff of two train.py shows science only."""

import argparse
import ast
import re
from types import SimpleNamespace

import pytest
from conftest import FOLDERS, ROOT, launch, load

SECTIONS = ["setup", "model", "resume", "data", "loop", "end"]
NAMES = set("args dist log model opt amp scaler first step micro batch loss metrics norm".split())
INSERT = "sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up"
# these run code from a file, hide an unused parameter, or are the old name of torch.amp
FORBIDDEN = [
    *("torch.cuda.amp", "allow_pickle=True", "weights_only=False", "find_unused_parameters=True"),
    *("pickle.load", "Unpickler", "from pickle import", "import dill", "joblib.load"),
]
HERE = [name for name in FOLDERS if any((ROOT / name).glob("*.py"))]
FILES = [f"{name}/{file.name}" for name in HERE for file in sorted((ROOT / name).glob("*.py"))]
VERBS = [
    file for file in FILES if "__main__" in (ROOT / file).read_text() and not file.endswith(("/model.py", "/data.py"))
]
each = pytest.mark.parametrize("folder", HERE)
every_file = pytest.mark.parametrize("file", [*FILES, "common.py"])


def tree(file):
    return ast.parse((ROOT / file).read_text())


def imports(node):
    """The modules that a piece of code imports, as dotted names; a relative import starts with a dot."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            yield from (name.name for name in part.names)
        if isinstance(part, ast.ImportFrom):
            yield "." * part.level + (part.module or "")


def main_of(folder):
    found = [node for node in tree(f"{folder}/train.py").body if getattr(node, "name", None) == "main"]
    assert len(found) == 1, "train.py has no function main"
    return found[0]


class Found(Exception):
    pass


def parser_of(folder, monkeypatch):
    """The parser that a folder's train.py hands to common.parse."""
    train = load(folder).train

    def stop(parser, *rest, **more):
        raise Found(parser)

    with monkeypatch.context() as patch, pytest.raises(Found) as found:
        patch.setattr(train.common, "parse", stop)
        train.parse([])
    return found.value.args[0]


def test_there_is_a_folder():
    """Parametrised by folder: without one every test below would pass."""
    assert HERE and all(f"{folder}/train.py" in VERBS for folder in HERE)


@each
def test_files(folder):
    """A reader who knows one folder does not find the same thing in another."""
    needed = {"model.py", "data.py", "train.py", "demo.py", "demo.args", "README.md"}
    assert not needed - {file.name for file in (ROOT / folder).iterdir()}


@each
def test_sections(folder):
    """The sections of main() are renamed, missing or in another order: the loops drift apart."""
    node, lines = main_of(folder), (ROOT / folder / "train.py").read_text().splitlines()
    body = lines[node.lineno : node.end_lineno]
    assert [line.strip() for line in body if line.strip().startswith("# ---")] == [f"# --- {name}" for name in SECTIONS]


@each
def test_launch_lines(folder):
    """The first thing one reads in train.py is how to run it, alone and on many GPUs."""
    about = ast.get_docstring(tree(f"{folder}/train.py")) or ""
    assert "\nRun:\n" in about
    assert re.search(rf"^ +python {folder}/train\.py$", about, re.M), "no demo command"
    assert re.search(rf"^ +python {folder}/train\.py .*--data ", about, re.M), "no command on real data"
    assert re.search(rf"^ +torchrun --nproc_per_node \d+ {folder}/train\.py ", about, re.M), "no torchrun command"


@each
def test_functions_of_train(folder):
    """parse(argv=None) and main(argv=None) are how tests and other programs start a run."""
    functions = {node.name: node.args for node in tree(f"{folder}/train.py").body if isinstance(node, ast.FunctionDef)}
    for name in ("parse", "main"):
        assert ast.unparse(functions[name]) == "argv=None"
    assert "common.run(main)" in (ROOT / folder / "train.py").read_text()


@each
def test_local_names(folder):
    """The same thing has another name in another loop, and a fix does not carry over."""
    if folder == "vae_distill":
        pytest.skip("JAX: its state holds the optimizer")
    names = [node for node in ast.walk(main_of(folder)) if isinstance(node, ast.Name)]
    stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    assert not NAMES - stored


@every_file
def test_folders_do_not_import_one_another(file):
    """A folder that needs its sibling cannot be copied out alone."""
    tops = {name.split(".")[0] for name in imports(tree(file))}
    assert not tops & {*FOLDERS, ""}, "folders talk through files, never through imports"
    if file.endswith(("/model.py", "/data.py")):
        assert "common" not in tops


@every_file
def test_forbidden_words(file):
    """A file of data or weights could run code; or DDP hides a parameter that nothing trains."""
    code = ast.unparse(tree(file))
    assert not [word for word in FORBIDDEN if word in code]


@every_file
def test_the_sys_path_line(file):
    """append or insert(0) imports a host project's common.py or model.py when a folder is copied there."""
    lines, code = (ROOT / file).read_text().splitlines(), tree(file)
    uses = file != "common.py" and "common" in {name.split(".")[0] for name in imports(code)}
    calls = [node for node in ast.walk(code) if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"]
    assert [line for line in lines if "sys.path" in line] == [INSERT] * uses and len(calls) == uses
    if uses:
        at = {line.split()[1]: i for i, line in enumerate(lines) if re.match(r"(import|from) \w", line)}
        assert at["common"] > lines.index(INSERT)


def test_common_imports_torch_in_functions_only():
    """The JAX folder and every --help would wait for torch."""
    heavy = {"torch", "numpy", "wandb", "jax", "matplotlib"}
    for node in tree("common.py").body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert not heavy & {name.split(".")[0] for name in imports(node)}
    methods = [node for part in tree("common.py").body if isinstance(part, ast.ClassDef) for node in part.body]
    assert not heavy & {name for node in methods if not isinstance(node, ast.FunctionDef) for name in imports(node)}


@each
def test_flags(folder, monkeypatch):
    """A flag has no help, an underscore or a short twin, is on by default, or is accepted and ignored."""
    parser = parser_of(folder, monkeypatch)
    code = "\n".join(file.read_text() for file in [*(ROOT / folder).glob("*.py"), ROOT / "common.py"])
    for action in parser._actions:
        if action.dest == "help":
            continue
        (name,) = action.option_strings
        assert re.fullmatch(r"--[a-z][a-z0-9]*(-[a-z0-9]+)*", name), f"{name}: kebab-case, one name"
        assert action.help and action.help.strip(), f"{name} has no help"
        if action.nargs == 0:
            assert isinstance(action, argparse._StoreTrueAction) and not action.default, f"{name}: off by default"
        assert re.search(rf"\bargs\.{action.dest}\b", code), f"{name} is accepted and ignored"
    assert not parser.allow_abbrev


@each
def test_shared_flags_mean_the_same(folder, monkeypatch):
    """A flag that all folders share has another type, other choices or another meaning in this one."""
    from common import flags

    def meaning(action):
        return action.type, action.nargs, action.choices, action.help, type(action)

    shared = {action.dest: meaning(action) for action in flags("doc")._actions}
    own = {action.dest: meaning(action) for action in parser_of(folder, monkeypatch)._actions}
    assert {name: own[name] for name in shared if name in own} == {name: shared[name] for name in shared if name in own}
    assert {"data", "out", "steps", "seed", "resume", "log_every", "save_every"} <= own.keys()


@each
def test_help_of_train(folder, capsys):
    """--help fails (a lone % in a help text does that) or leaves out a flag."""
    with pytest.raises(SystemExit) as ended:
        load(folder).train.parse(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and f"python {folder}/train.py" in shown and "--resume" in shown


@each
def test_presets_parse(folder):
    """A preset names a flag that is gone."""
    parse, presets = load(folder).train.parse, sorted((ROOT / folder).glob("*.args"))
    assert presets
    for preset in presets:
        assert not parse([f"@{preset}", "--data", "x"]).demo
    assert parse([]).demo and str(parse([]).data[0]).partition("=")[2].rstrip("/").endswith(f"runs/demo/{folder}")


@each
def test_run_args_repeat_a_run(folder, tmp_path):
    """`train.py @run.args` of this folder does not parse, or is another run."""
    parse, common = load(folder).train.parse, load(folder).train.common
    first = parse(["--data", "x", "--out", str(tmp_path / "out"), "--seed", "3"])
    common.open_run(first, SimpleNamespace(main=True, world=1, rank=0))
    assert vars(parse([f"@{tmp_path / 'out' / 'run.args'}", "--out", str(tmp_path / "out")])) == vars(first)


@each
def test_two_folders_live_in_one_process(folder):
    """The tests' own loader: one folder's model.py answers for another's, or `common` is there twice."""
    import sys

    modules, path = set(sys.modules), list(sys.path)
    one, two = load(folder), load(folder)
    assert one.model is not two.model and one.train.common is two.train.common
    assert one.model.__file__ == str(ROOT / folder / "model.py")
    assert not {"model", "data", "train"} & (set(sys.modules) - modules) and sys.path == path


@pytest.mark.slow
@pytest.mark.parametrize("file", VERBS)
def test_help_of_every_script(file, tmp_path):
    """A script cannot be started from another folder, or needs data before it tells what it wants."""
    done = launch(ROOT / file, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage:" in done.stdout and not done.stderr and not list(tmp_path.iterdir())
    named = re.findall(r"^  --([a-z-]+) ([A-Z_]+)", done.stdout, re.M)
    assert not [name for name, value in named if name.replace("-", "_").upper() == value], "--x X: name what it takes"
