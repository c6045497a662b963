"""Every command of the READMEs runs as printed, in a copy of the repository.

A fence opened as ```bash is run, line by line and without a shell; one opened as ```bash norun is not (it
installs, needs a cluster, or names files that only the reader has).
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import FOLDERS, ROOT, SHARED, free_port

READMES = [
    name for name in ("README.md", *(f"{folder}/README.md" for folder in [*FOLDERS, "slurm"])) if (ROOT / name).exists()
]
NORUN = "use ```bash norun for it"
SHORT = "--steps 4 --eval-every 2 --save-every 2 --log-every 2".split()
MORE = {
    "fsq_vqvae/evaluate.py": ["--random-tuples", "200"],
    "vla/evaluate.py": ["--episodes", "2"],
    "vvae_lam/train.py": "--steps 24 --eval-every 24 --save-every 24 --quantize-after -1".split(),  # so there is a best
}
every = pytest.mark.parametrize("readme", READMES)


def fences(text):
    """(info string, lines) of each fenced block."""
    info, block = None, []
    for line in text.splitlines():
        fence = re.match(r"\s*```(.*)$", line)
        if fence and info is None:
            info, block = fence[1].strip(), []
        elif fence:
            yield info, block
            info = None
        elif info is not None:
            block.append(line)
    assert info is None, f"a fence is not closed: ```{info}"


def commands(block):
    """The commands of a block: continued lines joined, comments and blank lines gone."""
    for line in "\n".join(block).replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            yield line.strip()


def split(line):
    """(environment, words) of a command; what only a shell understands is refused."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    words, env = list(lexer), {}
    for word in words:
        assert not re.fullmatch(r"[|&;<>()]+", word) and not re.search(r"[$`~*]", word), (
            f"`{line}` needs a shell ({word}): {NORUN}"
        )
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, env[name] = words.pop(0).partition("=")
    return env, words


class Place:
    """A copy of the repository to run a README's commands in; `cd` moves inside it."""

    def __init__(self, folder):
        self.root = self.here = folder / "repository"
        ignore = shutil.ignore_patterns(".*", "__pycache__", "runs", "tests", "wandb")
        shutil.copytree(ROOT, self.root, ignore=ignore)
        if SHARED.exists():
            (folder / "shared").symlink_to(SHARED.parent)

    def inside(self, word):
        path = (self.here / word).resolve()
        assert path.is_relative_to(self.root.resolve()), f"{word} is outside the repository: {NORUN}"
        return path

    def program(self, line, words):
        """The command to start for `words`, or None for what is done here or not at all."""
        match words:
            case ["pytest", *_] | ["python", "-m", "pytest", *_]:
                return None
            case ["cd", folder]:
                self.here = self.inside(folder)
            case ["mkdir", *names]:
                for name in (name for name in names if name != "-p"):
                    self.inside(name).mkdir(parents="-p" in names, exist_ok="-p" in names)
            case ["cp", "-r", *names, target]:
                target = self.inside(target)
                for path in map(self.inside, names):
                    to = target / path.name if target.is_dir() else target
                    shutil.copytree(path, to) if path.is_dir() else shutil.copy(path, to)
            case ["python", *rest] if rest[:2] != ["-m", "pip"]:
                return [sys.executable, *rest]
            case ["torchrun", *rest]:
                return [sys.executable, "-m", "torch.distributed.run", "--master_port", str(free_port()), *rest]
            case _:
                pytest.fail(f"`{line}`: {words[0]} is not run by the tests: {NORUN}")

    def run(self, line, timeout=900):
        """Run one line of a README; an error shows the line and the end of what it wrote."""
        env, words = split(line)
        command = self.program(line, words)
        if command is None:
            return
        scripts = [Path(self.here, word).resolve() for word in words if word.endswith(".py")]
        scripts = [str(path.relative_to(self.root.resolve())) for path in scripts if path.exists()]
        command += SHORT if any(Path(script).name in ("train.py", "finetune.py") for script in scripts[:1]) else []
        command += [word for script in scripts[:1] for word in MORE.get(script, [])]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "WANDB_MODE": "offline", **env}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True)
        with subprocess.Popen(command, cwd=self.here, env=env, start_new_session=True, **pipes) as process:
            try:
                shown, _ = process.communicate(timeout=timeout)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        assert process.returncode == 0, f"`{line}` ended with {process.returncode}:\n{shown[-3000:]}"


@every
def test_fences(readme):
    """Each fence is of a known kind, so that its commands are tested, and the scripts that they name exist."""
    for info, block in fences((ROOT / readme).read_text()):
        assert info in ("", "bash", "bash norun", "python", "python norun", "json", "text", "mermaid"), f"```{info}"
        if not info.startswith("bash"):
            assert not [line for line in block if re.match(r"\s*(\$ |torchrun |python \S+\.py )", line) and info], info
            continue
        for line in commands(block):
            for script in re.findall(r"(?:python|torchrun)\b[^|&;]*?\s([\w./]+\.py)\b", line):
                if script.split("/")[0] in (*FOLDERS, "tests", "slurm"):
                    assert (ROOT / script).exists(), f"`{line}`: there is no {script}"


def scripts_and_flags(line):
    """(script, flags) of a command: of `python a/b.py --x`, torchrun, or `sbatch slurm/train.sbatch a --x`."""
    line = line.split("&&")[-1].split(" # ")[0]
    match = re.search(r"([\w/]+\.py)(.*)", line) or re.search(r"train\.sbatch (\w+)(.*)", line)
    script, rest = match.groups() if match else ("", "")
    flags = re.findall(r"(?<=\s)--([a-z][\w-]*)", rest)
    return (script if script.endswith(".py") or not script else f"{script}/train.py"), flags


@every
def test_flags(readme):
    """The scripts know the flags of every command, also of those that the tests cannot run."""
    for info, block in fences((ROOT / readme).read_text()):
        for line in commands(block) if info.startswith("bash") else []:
            script, flags = scripts_and_flags(line)
            if (ROOT / script).is_file():
                text = (ROOT / script).read_text()
                assert not [flag for flag in flags if f'"--{flag}"' not in text], f"`{line}`: {script} has no such flag"


@pytest.mark.parametrize("folder", FOLDERS)
def test_script_header(folder):
    """`uv run FOLDER/train.py` installs what the folder's README names (PEP 723), as requirements.txt pins it."""
    header = (ROOT / folder / "train.py").read_text().split('"""')[0]
    assert header.startswith("# /// script\n") and header.endswith("# ///\n")
    script = tomllib.loads("".join(line[2:] for line in header.splitlines(keepends=True)[1:-1]))
    requirements = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert set(script["dependencies"]) <= {*requirements, "torchvision"}  # lerobot brings it there
    (line,) = re.findall(r"^pip install (.*?) +# all that", (ROOT / folder / "README.md").read_text(), re.M)
    names = [[re.match(r"[\w-]+", word)[0] for word in words] for words in (script["dependencies"], shlex.split(line))]
    assert sorted(names[0]) == sorted(names[1])


@every
@pytest.mark.slow
def test_commands(readme, tmp_path):
    """Every command of the README that needs nothing of the reader's runs as printed."""
    blocks = [block for info, block in fences((ROOT / readme).read_text()) if info == "bash"]
    lines = [line for block in blocks for line in commands(block)]
    place, left_out = Place(tmp_path), []
    for line in lines:
        if "../shared/data" in line and not SHARED.exists():
            left_out.append(line)
        else:
            place.run(line)
    if left_out or not lines:
        pytest.skip(f"real data (../shared/data) is absent: not run: {left_out}" if left_out else "no command to run")


# --- the tests' own reading of a README


def test_reading_of_a_readme(tmp_path, monkeypatch):
    """The tests read fences, continued lines, environments and flags, run commands and see a failing one."""
    text = "a\n```bash\n# x\npython a.py --x 1 \\\n  --y 2  # two\n\ncd b\n```\n```bash norun\npip\n```\n```\nx\n```\n"
    (one, block), (two, _), (three, _) = fences(text)
    assert (one, two, three) == ("bash", "bash norun", "")
    lines = list(commands(block))
    assert [split(line) for line in lines] == [({}, "python a.py --x 1 --y 2".split()), ({}, ["cd", "b"])]
    assert split("A_B=1 python 'x y.py'") == ({"A_B": "1"}, ["python", "x y.py"])
    assert scripts_and_flags("torchrun --n 8 a/b.py --data w=x/y --lr 1 # --no") == ("a/b.py", ["data", "lr"])
    assert scripts_and_flags("sbatch --nodes 2 slurm/train.sbatch laq --data x") == ("laq/train.py", ["data"])
    for line in ("a && b", "a | b", "a > b", "a; b", "ls *.py", "cp -r a ~/b", "echo $HOME"):
        with pytest.raises(AssertionError, match="norun"):
            split(line)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path / "r")
    (tmp_path / "r" / "a").mkdir(parents=True)
    (tmp_path / "r" / "a" / "train.py").write_text("import sys\nopen('seen', 'w').write(' '.join(sys.argv[1:]))\n")
    place = Place(tmp_path)
    place.run("python a/train.py --lr 1")
    assert (place.root / "seen").read_text() == "--lr 1 " + " ".join(SHORT)
    for line in ("mkdir -p b/c", "cp -r a b/c", "cd b/c/a", "python train.py"):
        place.run(line)
    assert (place.root / "b/c/a/seen").read_text() == " ".join(SHORT)
    with pytest.raises(AssertionError, match="ended with 3"):
        place.run('python -c "import sys; sys.exit(3)"')
    for line in ("pip install x", "sbatch a", "git clone x", "python -m pip list", "cp -r train.py /tmp"):
        with pytest.raises((AssertionError, pytest.fail.Exception), match="norun"):
            place.run(line)
