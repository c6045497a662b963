"""pi05_finetune on the oldest and the newest LeRobot that requirements.txt allows. Needs a package index.

Run:
  pytest -m campaign -s tests/campaign/test_lerobot_versions.py
"""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.campaign
@pytest.mark.parametrize("version", ["0.4.2", "0.4.4"])
def test_pi05_on_lerobot(version, tmp_path):
    """All quick tests of the folder pass on this LeRobot, installed beside the environment's own."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, f"lerobot=={version}"]
    subprocess.run(pip, check=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = "import lerobot, importlib.metadata as m; print(m.version('lerobot'), lerobot.__file__)"
    printed = subprocess.run([sys.executable, "-c", found], env=env, check=True, capture_output=True, text=True).stdout
    assert printed.startswith(f"{version} {tmp_path}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests" / "test_pi05_finetune.py"]
    assert subprocess.run(command, env=env, cwd=ROOT).returncode == 0
