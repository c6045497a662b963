"""Every command in a README's ```bash fence runs, in an empty folder; ```bash norun fences are for reading."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

READMES = sorted([ROOT / "README.md", *ROOT.glob("*/README.md")])
SHORT = {
    "train.py": "--steps 4 --eval-every 2 --save-every 2 --log-every 2".split(),
    "evaluate.py": ["--random-tuples", "200"],
}


def commands(readme):
    for fence in re.findall(r"^```bash\n(.*?)^```", readme.read_text(), re.M | re.S):
        yield from (line.split("  #")[0].strip() for line in fence.splitlines() if line.strip())


def test_fences_are_either_run_or_marked():
    """A fence in another spelling of bash would be skipped in silence."""
    for readme in READMES:
        for opening in re.findall(r"^```(\S.*)$", readme.read_text(), re.M):
            assert opening in ("bash", "bash norun", "python", "json", "yaml", "text"), f"{readme}: ```{opening}"


@pytest.mark.slow
@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_run_in_an_empty_folder(readme, tmp_path):
    for source in [*ROOT.glob("*.py"), *(path.parent for path in ROOT.glob("*/train.py"))]:
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / source.name)
    for line in commands(readme):
        words = shlex.split(line)
        assert words[0] in ("python", "torchrun"), f"{readme.name}: `{line}` cannot be run here: fence it ```bash norun"
        start = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "torch.distributed.run"]
        more = SHORT.get(os.path.basename(next(word for word in words if word.endswith(".py"))), [])
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*start, *words[1:], *more], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
