"""Check that this machine can run the six folders: packages, device, memory, and whether Pi05 builds and predicts.

Run:
  python pi05_finetune/check_env.py

Prints one line per finding; each problem with its cure. Exit code 1 if there is a problem.
"""

import contextlib
import importlib
import importlib.metadata
import io
import platform
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import common

# import name of each line of requirements.txt, where it is another
IMPORTS = {"pyyaml": "yaml", "pillow": "PIL", "mujoco-mjx": "mujoco.mjx"}
TESTS = ("pytest", "scipy")
NEEDS = dict(inference=8, lora=22, expert=24, all=70)  # GiB of a GPU; train.py --dry-run counts it for your flags


def packages(file):
    """(good lines, problems) of each package that requirements.txt names: installed, in range, importable."""
    from packaging.requirements import Requirement

    good, problems = [], []
    if not Path(file).exists():
        return ["no requirements.txt beside this folder: packages are not compared; see README.md"], []
    for line in Path(file).read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        need = Requirement(text)
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            (good if need.name in TESTS else problems).append(f"{need.name} is missing: pip install '{text}'")
            continue
        if version not in need.specifier:
            problems.append(f"{need.name} {version} is outside {need.specifier}: pip install '{text}'")
            continue
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # mujoco prints what it lacks
                warnings.simplefilter("ignore")
                importlib.import_module(IMPORTS.get(need.name, need.name))
        except Exception as error:  # a broken binary raises anything at all
            problems.append(f"{need.name} {version} cannot be imported ({str(error)[:150]}): install it again")
            continue
        good.append(f"{need.name} {version}")
    return good, problems


def device():
    """(good lines, problems) of the accelerator."""
    import torch

    kind = "ROCm" if torch.version.hip else "CUDA" if torch.version.cuda else "CPU"
    good, problems = [f"torch {torch.__version__} is built for {kind}"], []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            memory = properties.total_memory / 2**30
            fits = ", ".join(name for name, need in NEEDS.items() if memory >= need) or "nothing but the tiny size"
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            good.append(f"{properties.name}: {memory:.0f} GiB, {bf16}; Pi05 fits {fits}")
    elif torch.backends.mps.is_available():
        good.append("Apple MPS: enough for the tiny size and for reading checkpoints")
    elif shutil.which("nvidia-smi") or Path("/dev/kfd").exists():
        cure = "reinstall torch from the wheel index that matches the driver (pytorch.org/get-started/locally)"
        problems.append(f"there is a GPU, but torch {torch.__version__} does not see it: {cure}")
    else:
        good.append("no accelerator: the demos and tests run on the CPU, a full Pi05 does not")
    return good, problems


def pi05():
    """(good lines, problems): build the tiny Pi05 and predict."""
    import numpy as np
    from checkpoint import golden_prediction
    from lerobot_patch import version_of
    from model import Pi05, Pi05Config
    from processor import write_toy_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_toy_tokenizer(folder)
        stats = dict(q01=[-1.0] * 2, q99=[1.0] * 2)
        stats = {"observation.state": stats, "action": stats}
        config = Pi05Config(["camera"], 2, 2, stats, size="tiny", chunk=4, image_size=28, prompt_tokens=64)
        actions = golden_prediction(Pi05(config, folder))
    if not np.isfinite(actions).all():
        return [], ["Pi05 gives NaN on this machine: another torch build?"]
    lerobot, transformers = map(version_of, ("lerobot", "transformers"))
    return [f"Pi05 of lerobot {lerobot} builds on transformers {transformers} and predicts"], []


def main(argv=None):
    parser, root = common.ArgumentParser(__doc__), Path(__file__).resolve().parents[1]
    parser.add_argument("--requirements", default=root / "requirements.txt", metavar="FILE", help="list of packages")
    args, problems = parser.parse_args(argv), []
    print(f"ok: Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for check in (lambda: packages(args.requirements), device, pi05):
        try:
            good, bad = check()
        except Exception as error:  # a check that fails is itself a finding
            good, bad = [], [str(error)[:200]]
        for line in good:
            print(f"ok: {line}", flush=True)
        problems += bad
    for line in problems:
        print(f"problem: {line}")
    print(f"{len(problems)} problems" if problems else "all is well")
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
