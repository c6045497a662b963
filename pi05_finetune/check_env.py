"""Check that this machine can run the six folders: packages, device, memory, and whether Pi05 builds and learns.

Run:
  python pi05_finetune/check_env.py

Prints one line per finding; each problem with its cure. Exit code 1 if there is a problem.
"""

import importlib
import importlib.metadata
import platform
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import common

# import name of each line of requirements.txt, where it is another
IMPORTS = {"pyyaml": "yaml", "mujoco-mjx": "mujoco.mjx"}
TESTS = ("pytest", "hypothesis", "scipy")


def parse(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--requirements", default=Path(__file__).resolve().parents[1] / "requirements.txt", metavar="FILE", help="list")
    return parser.parse_args(argv)


def packages(file):
    """(good lines, problems) of each package that requirements.txt names: installed, in range, importable."""
    from packaging.requirements import Requirement

    good, problems = [], []
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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(IMPORTS.get(need.name, need.name))
        except Exception as error:  # a broken binary raises anything at all
            problems.append(f"{need.name} {version} cannot be imported ({common.brief(error)}): install it again")
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
            about = torch.cuda.get_device_properties(i)
            memory = about.total_memory / 2**30
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            good.append(f"{about.name}: {memory:.0f} GiB, {bf16}; Pi05 fits {fits(memory)}")
    elif torch.backends.mps.is_available():
        good.append("Apple MPS: enough for the tiny size and for reading checkpoints")
    elif shutil.which("nvidia-smi") or Path("/dev/kfd").exists():
        cure = "reinstall torch from the wheel index that matches the driver (pytorch.org/get-started/locally)"
        problems.append(f"there is a GPU, but torch {torch.__version__} does not see it: {cure}")
    else:
        good.append("no accelerator: the demos and tests run on the CPU, a full Pi05 does not")
    return good, problems


def fits(memory):
    """What a GPU with `memory` GiB can do with the 3.6 billion parameters; the arithmetic is in README.md."""
    needs = dict(inference=8, lora=22, expert=24, all=70)
    return ", ".join(name for name, need in needs.items() if memory >= need) or "nothing but the tiny size"


def pi05():
    """(good lines, problems): build the tiny Pi05, take one step of its loss, predict."""
    import compat
    import torch
    from inputs import write_toy_tokenizer
    from model import Pi05

    with tempfile.TemporaryDirectory() as folder:
        write_toy_tokenizer(folder)
        stats = dict(q01=[-1.0] * 2, q99=[1.0] * 2)
        stats = {"observation.state": stats, "action": stats}
        sizes = dict(size="tiny", chunk=4, image_size=28, prompt_tokens=64)
        model = Pi05(["camera"], 2, 2, stats, tokenizer=folder, **sizes)
        batch = {
            "observation.images.camera": torch.rand(1, 3, 28, 28),
            "observation.state": torch.zeros(1, 2),
            "task": ["move"],
            "action": torch.zeros(1, 4, 2),
            "mask": torch.ones(1, 4, dtype=torch.bool),
            "noise": torch.randn(1, 4, 32),
            "time": torch.full((1,), 0.5),
        }
        loss, _ = model(model.prepare(batch))
        loss.backward()
        predicted = model.predict(batch)
    if not (loss.isfinite() and predicted.isfinite().all()):
        return [], ["Pi05 gives NaN on this machine: another torch build?"]
    lerobot, transformers = map(compat.dotted, compat.versions())
    return [f"Pi05 of lerobot {lerobot} builds on transformers {transformers}, learns and predicts"], []


def main(argv=None):
    args = parse(argv)
    problems = []
    print(f"ok: Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for check in (lambda: packages(args.requirements), device, pi05):
        try:
            good, bad = check()
        except Exception as error:  # a check that fails is itself a finding
            good, bad = [], [f"{common.brief(error)}"]
        for line in good:
            print(f"ok: {line}", flush=True)
        problems += bad
    for line in problems:
        print(f"problem: {line}")
    print(f"{len(problems)} problems" if problems else "all is well")
    return 1 if problems else 0


if __name__ == "__main__":
    common.run(main)
