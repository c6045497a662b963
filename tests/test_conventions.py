"""The rules that make six folders one house: a diff of two train.py shows science only."""

import argparse
import ast
import re

import pytest
from conftest import FOLDERS, ROOT, launch, load

SECTIONS = ["setup", "model", "resume", "data", "loop", "end"]
NAMES = set("args log model opt amp scaler first step micro batch loss metrics norm".split())
INSERT = "sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up"
REPLACE = "sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]"  # in a sub-folder
BOTTOM = """
if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
"""
LIMITS = {"train.py": 340, "finetune.py": 355, "model.py": 380, "data.py": 320, "README.md": 130}
SHARED_FLAGS = dict(  # the groups of every train.py, and what they share, in this order
    data="data val_share val_episodes workers",
    model="",
    optimisation="batch_size lr lr_end warmup weight_decay clip seed",
    run="out resume init steps accum amp compile device log_every eval_every save_every keep wandb",
)
# these run code from a file, hide an unused parameter, or are the old name of torch.amp
FORBIDDEN = [
    *("torch.cuda.amp", "allow_pickle=True", "weights_only=False", "find_unused_parameters=True"),
    *("pickle.load", "Unpickler", "from pickle import", "import dill", "joblib.load", "locals()", "__class__ ="),
]
DIALECT = re.compile(
    r"\b(gauges?|whole\.json|use_of_codes|commonest|skeleton|pointing|report card|liveliest|ancestor|verdict|LowRank"
    r"|put_on|dsnr|seed 00\d|foretold|none of their own|the seed's|code words)\b"
    r"|\bcodes wait\b|\bas told\b|\bof one's own\b"
)
HERE = [name for name in FOLDERS if (ROOT / name / "train.py").exists()]
FILES = [str(file.relative_to(ROOT)) for name in HERE for file in sorted((ROOT / name).rglob("*.py"))]
VERBS = [file for file in FILES if "__main__" in (ROOT / file).read_text()]
each = pytest.mark.parametrize("folder", HERE)
every_file = pytest.mark.parametrize("file", [*FILES, "common.py"])


def text_of(file):
    return (ROOT / file).read_text()


def tree(file):
    return ast.parse(text_of(file))


def imports(node):
    """The modules that a piece of code imports, as dotted names; a relative import starts with a dot."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            yield from (name.name for name in part.names)
        if isinstance(part, ast.ImportFrom):
            yield "." * part.level + (part.module or "")


def function(file, name):
    found = [node for node in tree(file).body if getattr(node, "name", None) == name]
    assert len(found) == 1, f"{file} has no function {name}"
    return found[0]


class Found(Exception):
    pass


def parser_of(folder, monkeypatch):
    """The parser that a folder's train.py builds."""
    train = load(folder).train

    def stop(parser, *rest, **more):
        raise Found(parser)

    with monkeypatch.context() as patch, pytest.raises(Found) as found:
        patch.setattr(train.common.ArgumentParser, "parse_args", stop)
        train.parse([])
    return found.value.args[0]


def groups_of(parser):
    return {group.title: group._group_actions for group in parser._action_groups if group.title in SHARED_FLAGS}


def test_all_six_are_here():
    """Every test below is parametrised by folder."""
    assert HERE == FOLDERS


@each
def test_files(folder):
    """Each folder has the same files under the same names, at most a dozen scripts and one sub-folder of code."""
    needed = {"model.py", "data.py", "train.py", "demo.py", "demo.args", "evaluate.py", "figures.py", "README.md"}
    assert not needed - {file.name for file in (ROOT / folder).iterdir()}
    assert len(list((ROOT / folder).glob("*.py"))) <= 14
    assert len({file.parent for file in (ROOT / folder).glob("*/*.py")}) <= 1
    long = {name: len(text_of(f"{folder}/{name}").splitlines()) for name in LIMITS if (ROOT / folder / name).exists()}
    assert not {name: lines for name, lines in long.items() if lines > LIMITS[name]}, "can it be read in one sitting?"


@pytest.mark.parametrize("file", [f"{folder}/train.py" for folder in HERE] + ["vla/finetune.py"])
def test_sections(file):
    """main() has the same sections in the same order, and parse and main can be called from tests."""
    node, lines = function(file, "main"), text_of(file).splitlines()
    body = lines[node.lineno : node.end_lineno]
    assert [line.strip() for line in body if line.strip().startswith("# ---")] == [f"# --- {name}" for name in SECTIONS]
    for name in ("parse", "main"):
        assert ast.unparse(function(file, name).args) == "argv=None"


@each
def test_launch_lines(folder):
    """train.py begins with how to run it: the demo, on real data, on many GPUs."""
    about = ast.get_docstring(tree(f"{folder}/train.py")) or ""
    assert "\nRun:\n" in about
    assert re.search(rf"^ +python {folder}/train\.py$", about, re.M), "no demo command"
    assert re.search(rf"^ +python {folder}/train\.py .*--data ", about, re.M), "no command on real data"
    assert re.search(rf"^ +torchrun --nproc_per_node \d+ {folder}/train\.py ", about, re.M), "no torchrun command"


@each
def test_local_names(folder):
    """The same thing has the same name in every loop."""
    if folder == "vae_distill":
        pytest.skip("JAX: its state holds the optimizer")
    names = [node for node in ast.walk(function(f"{folder}/train.py", "main")) if isinstance(node, ast.Name)]
    assert not NAMES - {node.id for node in names if isinstance(node.ctx, ast.Store)}


@pytest.mark.parametrize("file", [f"{folder}/train.py" for folder in HERE] + ["vla/finetune.py"])
@pytest.mark.parametrize("name", ["setup", "learning_rate"])
def test_the_same_function_reads_the_same(file, name):
    """Process group, device and schedule are written out in each train.py, in the same words."""
    if file == "vae_distill/train.py" and name == "setup":
        pytest.skip("JAX finds its devices otherwise")

    def source(file):
        return ast.get_source_segment(text_of(file), function(file, name))

    assert source(file) == source("fsq_vqvae/train.py")


@each
def test_flag_groups(folder, monkeypatch):
    """All flags stand in the four groups; shared ones in the same order, with the same type and words; at most 40."""
    own, reference = (groups_of(parser_of(name, monkeypatch)) for name in (folder, "fsq_vqvae"))
    assert list(own) == list(SHARED_FLAGS)
    assert sum(map(len, own.values())) <= 40
    absent = {"accum", "amp", "compile", "workers"} if folder == "vae_distill" else set()

    def meaning(action):
        return action.type, action.nargs, action.choices, action.metavar, type(action)

    for title, names in SHARED_FLAGS.items():
        wanted = [name for name in names.split() if name not in absent]
        found = {action.dest: action for action in own[title]}
        assert [name for name in found if name in wanted] == wanted
        for name in wanted:
            pattern = next(action for action in reference[title] if action.dest == name)
            assert meaning(found[name]) == meaning(pattern), f"--{name}"
            if (folder, name) != ("vae_distill", "device"):  # JAX knows fewer
                assert found[name].help.replace(folder, "fsq_vqvae") == pattern.help


@each
def test_flags(folder, monkeypatch):
    """A flag has help, is in kebab-case, has one name, is off by default if it is a switch, and is used."""
    parser = parser_of(folder, monkeypatch)
    code = "\n".join(file.read_text() for file in (ROOT / folder).rglob("*.py")) + text_of("common.py")
    code = re.sub(r'^ *add\(\s*"--.*', "", code, flags=re.M)
    for action in parser._actions:
        if action.dest == "help":
            continue
        (name,) = action.option_strings
        assert re.fullmatch(r"--[a-z][a-z0-9]*(-[a-z0-9]+)*", name), f"{name}: kebab-case, one name"
        assert action.help and action.help.strip(), f"{name} has no help"
        if action.nargs == 0:
            assert isinstance(action, argparse._StoreTrueAction) and not action.default, f"{name}: off by default"
        assert re.search(rf"\b{action.dest}\b", code), f"{name} is accepted and ignored"
    assert not parser.allow_abbrev


@each
def test_help_of_train(folder, capsys):
    """--help works and names the command and the flags."""
    with pytest.raises(SystemExit) as ended:
        load(folder).train.parse(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and f"python {folder}/train.py" in shown and "--resume" in shown


@each
def test_presets_parse(folder):
    """Every preset parses; without --data the demo's preset is used."""
    parse, presets = load(folder).train.parse, sorted((ROOT / folder).glob("*.args"))
    assert presets
    for preset in presets:
        own = load(folder, "finetune").finetune.parse if "finetune" in preset.name else parse
        assert not own([f"@{preset}", "--data", "x"]).demo
    assert parse([]).demo and str(parse([]).data[0]).partition("=")[2].rstrip("/").endswith(f"runs/demo/{folder}")


@each
def test_flags_are_checked_before_the_run_begins(folder, capsys):
    """An impossible value ends in parse() with one line that names the flag: --out is not touched."""
    parse = load(folder).train.parse
    for words in (["--steps", "0"], ["--lr", "-1"], ["--save-every", "0"], ["--resume"], ["--lr", "nan"]):
        with pytest.raises(SystemExit) as ended:
            parse(["--data", "x", *words])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and words[0] in error and error.count("\n") == 1


@every_file
def test_folders_do_not_import_one_another(file):
    """A folder can be copied out alone with common.py; its modules take no more of common than they need."""
    found = list(imports(tree(file)))
    assert not {name.split(".")[0] for name in found} & set(FOLDERS), (
        "folders talk through files, never through imports"
    )
    assert not [name for name in found if name.startswith(".." if file.count("/") == 2 else ".")]
    if file.endswith(("/model.py", "/data.py")):
        assert "import common" not in text_of(file).splitlines(), "from common import DataError is enough"


@every_file
def test_forbidden_words(file):
    """No file of data or weights can run code; no trick that a reader must decode."""
    code = ast.unparse(tree(file))
    assert not [word for word in FORBIDDEN if word in code]


@pytest.mark.parametrize("file", [*FILES, *(f"{folder}/README.md" for folder in HERE), "common.py", "README.md"])
def test_the_words_of_the_field(file):
    """The house's old dialect is gone."""
    assert not DIALECT.findall(text_of(file))


@every_file
def test_the_sys_path_line(file):
    """common.py is found one folder up, behind the folder itself: a host project's model.py is not imported."""
    lines = text_of(file).splitlines()
    deep = file.count("/") == 2
    uses = "import common" in lines
    found = [line.strip() for line in lines if "sys.path" in line]
    assert found in ([[], [REPLACE]] if deep else [[INSERT]] if uses else [[], [INSERT]])


@pytest.mark.parametrize("file", VERBS)
def test_a_script_ends_in_one_way(file):
    """A DataError is caught once, at the bottom; everything else keeps its traceback."""
    if "import common" in text_of(file).splitlines():
        assert text_of(file).endswith(BOTTOM)


def test_common_imports_torch_in_functions_only():
    """The JAX folder and every --help need not wait for torch."""
    heavy = {"torch", "numpy", "wandb", "jax", "matplotlib"}
    for node in tree("common.py").body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert not heavy & {name.split(".")[0] for name in imports(node)}


def test_the_shard_reader_is_one_file():
    """What laq writes vla reads: their shards.py is the same, byte for byte."""
    copies = [ROOT / folder / "shards.py" for folder in HERE if (ROOT / folder / "shards.py").exists()]
    assert len(copies) >= 2 and len({file.read_bytes() for file in copies}) == 1


@each
def test_two_folders_live_in_one_process(folder):
    """The tests' own loader keeps folders apart, and `common` is there once."""
    import sys

    modules, path = set(sys.modules), list(sys.path)
    one, two = load(folder), load(folder)
    assert one.model is not two.model and one.train.common is two.train.common
    assert one.model.__file__ == str(ROOT / folder / "model.py")
    assert not {"model", "data", "train"} & (set(sys.modules) - modules) and sys.path == path


@pytest.mark.slow
@pytest.mark.parametrize("file", VERBS)
def test_help_of_every_script(file, tmp_path):
    """Every script shows its help from any folder, and every value has a name of its own in it."""
    done = launch(ROOT / file, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage:" in done.stdout and not done.stderr and not list(tmp_path.iterdir())
    named = re.findall(r"^  --([a-z-]+) ([A-Z_]+)", done.stdout, re.M)
    assert not [name for name, value in named if name.replace("-", "_").upper() == value], "--x X: name what it takes"


BENCHES = dict(
    fsq_vqvae="",
    laq="--loader --repeats 1 --threads 1",
    loaders="vvae_lam",
    pi05_finetune="--repeats 1",
    pi05_videos="--episodes 4 --frames 10",
    vae_distill="--envs 8 --repeats 1 --only physics iteration",
    vla="--repeats 1",
    vvae_lam="--parts loader",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHES)
def test_benchmarks_run(name, tmp_path):
    """Each benchmark that tests/bench/all.py runs still fits the code that it times."""
    done = launch(ROOT / "tests" / "bench" / f"{name}.py", *BENCHES[name].split(), cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\d(\.\d+)?( |x|$)", done.stdout, re.M), done.stdout


def test_every_benchmark_is_run_by_a_test():
    experiments = {"all", "timing", "fsq_policy", "pi05_mistakes"}
    assert {file.stem for file in (ROOT / "tests" / "bench").glob("*.py")} - experiments == set(BENCHES)
