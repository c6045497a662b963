"""Bad input: every reader, on damaged files, gives a value or a DataError; no traceback, no hang, no code that runs.

The default tests take 30 cases per reader in this process; the campaign 1,000 in a process of its own, as a C library
may crash:
  CASES=1000 pytest -m campaign -s tests/campaign/test_bad_input.py
"""

import json
import os
import pickle
import random
import time
import traceback

import h5py
import numpy as np
import pytest
import torch
from conftest import load
from damage import Evil, common, damaged, judge

READERS = {}


def reader(folder, *modules):
    """Register a function (folder's modules, empty folder) -> (files to damage, function that reads them)."""

    def register(make):
        READERS[f"{folder}: {make.__name__}"] = (folder, modules, make)
        return make

    return register


def actions(T=20):
    return np.sin(np.arange(T)[:, None] * [0.1, 0.2, 0.3]).astype(np.float32)


# --- fsq_vqvae


@reader("fsq_vqvae")
def episodes_npz(this, home):
    np.savez(home / "a.npz", actions=actions(), timestamps=np.arange(20) / 10)
    return [home / "a.npz"], lambda: this.data.read_sources([f"a={home}"], ["5"], 0.1, [])


@reader("fsq_vqvae")
def robomimic(this, home):
    with h5py.File(home / "a.hdf5", "w") as file:
        for i in range(2):
            file[f"data/demo_{i}/actions"] = actions()
    return [home / "a.hdf5"], lambda: this.data.read_sources([f"a={home / 'a.hdf5'}"], ["5"], 0.1, [])


@reader("fsq_vqvae")
def lerobot(this, home):
    import pyarrow
    import pyarrow.parquet

    (home / "meta").mkdir()
    (home / "data").mkdir()
    (home / "meta" / "info.json").write_text(json.dumps(dict(fps=10, codebase_version="v2.1")))
    table = dict(action=list(actions()), episode_index=[0] * 20, frame_index=list(range(20)))
    pyarrow.parquet.write_table(pyarrow.table(table), home / "data" / "episode_000000.parquet")
    files = [home / "data" / "episode_000000.parquet", home / "meta" / "info.json"]
    return files, lambda: this.data.read_sources([f"a={home}"], ["5"], 0.1, [])


@reader("fsq_vqvae")
def tokenizer(this, home):
    row = dict(center=[0.0] * 3, scale=[1.0] * 3, low=[0.0] * 3, high=[1.0] * 3)
    small = dict(hidden_dim=8, latent_dim=4, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, num_tokens=2)
    this.model.FSQVQVAE([dict(name="a", action_dim=3, chunk=6, fps=10.0, **row)], **small).save_pretrained(home)
    return sorted(home.iterdir()), lambda: this.model.FSQVQVAE.from_pretrained(home)


# --- common


@reader("fsq_vqvae")
def training_state(this, home):
    model = torch.nn.Linear(3, 2)
    opt = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    opt.step()
    torch.save(dict(step=3, best=0.5, opt=opt.state_dict(), scaler={}), home / "resume.pt")
    return [home / "resume.pt"], lambda: common.load(home / "resume.pt")


@reader("fsq_vqvae")
def manifest(this, home):
    with common.checkpoint(home, 3) as folder:
        (folder / "weights").write_bytes(b"1" * 99)
    return [home / "checkpoints/step_0000003/manifest.json"], lambda: common.newest(home)


# --- tests


def fuzz(name, home, cases, note=lambda number: None):
    """What a reader did wrong on `cases` damaged files, with the first case of each place; sound files are read."""
    folder, modules, make = READERS[name]
    this, mark, found = load(folder, *modules), home / "code ran", {}
    (home / "data").mkdir(parents=True)
    files, read = make(this, home / "data")
    sound = {path: path.read_bytes() for path in files}
    read()
    for number in range(cases):
        note(number)
        draw = random.Random(f"{name} {number}")
        path = draw.choice(files)
        path.write_bytes(damaged(path, draw, mark))
        wrong = judge(read)
        if mark.exists():
            mark.rmdir()
            wrong = f"ran code: made a folder ({wrong})"
        if wrong:
            found.setdefault(
                (wrong.rpartition(" at ")[2], wrong.partition(":")[0]), f"case {number}, {path.name}: {wrong}"
            )
        for path, data in sound.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return list(found.values())


@pytest.mark.parametrize("name", READERS)
def test_sample(name, tmp_path):
    """30 damaged files per reader: each gives a value or a DataError."""
    wrong = fuzz(name, tmp_path, 30)
    assert not wrong, "\n".join(wrong)


def test_the_judge_sees(tmp_path):
    """A traceback, a hang and code from a pickle are found; a DataError is right."""

    def refuse():
        raise common.DataError("a.npz: broken")

    mark = tmp_path / "made"
    assert judge(refuse) is None
    assert "KeyError" in judge(lambda: {}["x"])
    assert "ran code" in judge(lambda: pickle.loads(pickle.dumps(Evil(mark)))) and mark.exists()
    assert "hang" in judge(lambda: time.sleep(5), limit=0.2)


@pytest.mark.campaign
@pytest.mark.parametrize("name", READERS)
def test_campaign(name, tmp_path):
    """1,000 cases in a forked process: a crash of a C library is a finding too, with its case."""
    start, last, result, cases = (
        time.monotonic(),
        tmp_path / "last",
        tmp_path / "result",
        int(os.environ.get("CASES", 1000)),
    )
    pid = os.fork()
    if pid == 0:
        try:
            result.write_text(
                json.dumps(fuzz(name, tmp_path / "x", cases, lambda number: last.write_text(str(number))))
            )
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    wrong = [f"the process ended with {status} in case {last.read_text() if last.exists() else 'none'}"]
    wrong = json.loads(result.read_text()) if result.exists() else wrong
    print(f"\n| {name} | {cases} | {len(wrong)} | {time.monotonic() - start:.0f} |", *wrong, sep="\n", flush=True)
    assert not wrong, "\n".join(wrong)
