"""Bad input: every reader, on damaged files, gives a value or a DataError; no traceback, no hang, no code that runs.

The default tests take 20 cases per reader in this process; the campaign 1,000 in a process of its own, as a C library
may crash:
  CASES=1000 pytest -m campaign -s tests/campaign/test_bad_input.py
"""

import json
import os
import pickle
import random
import signal
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


def write_lerobot(home, **more):
    """A LeRobotDataset v2.1 of one episode without videos."""
    import pyarrow
    import pyarrow.parquet

    (home / "meta").mkdir()
    (home / "data/chunk-000").mkdir(parents=True)
    path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    (home / "meta/info.json").write_text(json.dumps(dict(fps=10, codebase_version="v2.1", data_path=path, **more)))
    table = dict(episode_index=[0] * 20, frame_index=list(range(20)), task_index=[0] * 20)
    table |= {"action": list(actions()), "observation.state": list(actions()), "timestamp": list(np.arange(20) / 10)}
    pyarrow.parquet.write_table(pyarrow.table(table), home / "data/chunk-000/episode_000000.parquet")


@reader("fsq_vqvae")
def lerobot(this, home):
    write_lerobot(home)
    files = [path for path in home.rglob("*") if path.is_file()]
    return files, lambda: this.data.read_sources([f"a={home}"], ["5"], 0.1, [])


@reader("fsq_vqvae")
def tokenizer(this, home):
    source = dict(name="a", action_dim=3, chunk=6, fps=10.0, center=[0.0] * 3, scale=[1.0] * 3)
    source |= dict(low=[0.0] * 3, high=[1.0] * 3, levels=[[4, 2], [8]])
    this.model.FSQVQVAE(this.model.Config([source], codebook_size=8, hidden_dim=8)).save_pretrained(home)
    return sorted(home.iterdir()), lambda: this.model.FSQVQVAE.from_pretrained(home)


# --- vvae_lam


@reader("vvae_lam", "recordings")
def latents(this, home):
    for name in "ab":
        with h5py.File(home / f"{name}.h5", "w") as file:
            file.create_dataset("embeddings", data=np.ones((6, 4, 1, 4, 4), np.float16), compression="gzip")
    (home / "manifest.json").write_text(json.dumps(dict(splits=dict(train=["a.h5"], validation=["b.h5"]), seed=0)))

    def read():
        this.recordings.opened.cache_clear()
        return [recording.read(np.arange(len(recording))) for recording in this.data.read_sources([f"a={home}"])]

    return sorted(home.iterdir()), read


@reader("vvae_lam")
def latent_action_model(this, home):
    small = dict(channels=2, height=8, width=8, patch_dim=8, embed_dim=16, encoder_depth=1, decoder_depth=1)
    small |= dict(num_heads=2, num_codes=2, num_embeddings=4, codebook_dim=4)
    this.model.VVAELatentActionVQVAE(this.model.Config(**small)).save_pretrained(home)
    return sorted(home.iterdir()), lambda: this.model.VVAELatentActionVQVAE.from_pretrained(home)


# --- laq and vla


def write_shard(shards, path, **more):
    """Two clips of six frames with actions, and what else a sample holds."""
    samples = []
    for key in "ab":
        meta = dict(instruction="push", fps=5, source="a", episode=key, camera="c", length=6, actions="delta")
        frames = np.arange(6 * 8 * 8 * 3, dtype=np.uint8).reshape(6, 8, 8, 3)
        sample = {"json": json.dumps(meta).encode(), "frames.npy": shards.npy(frames)}
        samples.append({"__key__": key, **sample, "actions.npy": shards.npy(actions(6)), **more})
    shards.write_shard(path, samples)


@reader("laq", "shards")
def shards(this, home):
    write_shard(this.shards, home / "x.tar")

    def read():
        for clip in this.shards.read_clips(home, say=lambda text: None):
            clip.frames(8), clip.array("actions.npy")

    return [home / "x.tar"], read


@reader("laq", "readers", "readers.recording")
def videos(this, home):
    import av

    with av.open(str(home / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=5)
        stream.width = stream.height = 16
        for i in range(6):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 16, 3), 40 * i, np.uint8))))
        file.mux(stream.encode())
    (home / "a.json").write_text(json.dumps(dict(instruction="push", fps=5, actions="delta")))
    np.savez(home / "a.npz", actions=actions(6))

    def read():
        try:
            for entry in this.readers.entries("a", home)[0]:
                this.readers.describe(entry)
                for recording in this.readers.opened(entry):
                    list(recording.frames)
        except getattr(this, "readers.recording").DAMAGED as error:  # videos_to_shards.py names it and goes on
            raise common.DataError(str(error)) from None

    return sorted(home.iterdir()), read


@reader("laq")
def latent_action_quantizer(this, home):
    small = dict(image_size=16, patch=8, dim=32, depth=1, code_seq_len=2, codebook_size=4, code_dim=4)
    this.model.LAQ(this.model.LAQConfig(**small)).save_pretrained(home)
    return sorted(home.iterdir()), lambda: this.model.LAQ.from_pretrained(home)


@reader("vla", "shards", "sources")
def labels(this, home):
    write_shard(this.shards, home / "x.tar")
    (home / "labels").mkdir()
    arrays = dict(codes=np.zeros((5, 1), np.int64), vectors=np.zeros((5, 1, 2), np.float32), gap=np.int64(1))
    packed = this.shards.npz(**arrays)
    this.shards.write_shard(home / "labels/x.tar", [{"__key__": key, "latents.npz": packed} for key in "ab"])
    meta = dict(codebook_size=2, code_seq_len=1, code_dim=2, gap=1, codebook=[[[0.0, 1.0], [1.0, 0.0]]])
    (home / "labels/labels.json").write_text(json.dumps(meta))
    words = [f"a={home}"], "latents", [str(home / "labels")]
    return sorted((home / "labels").iterdir()), lambda: this.sources.read_sources(*words, say=lambda text: None)


@reader("vla")
def vla_config(this, home):
    latent = dict(codebook_size=2, code_seq_len=1, code_dim=2, codebook=[[[0.0, 1.0], [1.0, 0.0]]])
    latent |= dict(mean=[[0.0, 0.0]], std=[[1.0, 1.0]], weight=[[0.5, 0.5]])
    this.model.VLAConfig(latent=this.model.LatentConfig(**latent)).save_pretrained(home)
    return [home / "vla.json"], lambda: this.model.VLAConfig.from_pretrained(home)


# --- pi05_finetune


@reader("pi05_finetune", "readers.dataset")
def episodes_with_images(this, home):
    (home / "episodes").mkdir()
    frames = np.arange(20 * 8 * 8 * 3, dtype=np.uint8).reshape(20, 8, 8, 3)
    arrays = {"actions": actions(), "timestamps": np.arange(20) / 10, "obs.joint": actions(), "obs.camera": frames}
    np.savez(home / "episodes/a.npz", **arrays, task=np.array("push"))
    spec = dict(name="x", action_dim=3, control_freq_hz=10, required_obs_keys=["camera"])
    (home / "spec.yaml").write_text(json.dumps(spec | dict(required_proprio_keys=["joint"], max_episode_steps=99)))
    files = [home / "episodes/a.npz", home / "spec.yaml"]
    return files, lambda: getattr(this, "readers.dataset").open_data([str(home)], say=lambda text: None)


@reader("pi05_finetune", "readers.hdf5")
def robomimic_with_images(this, home):
    with h5py.File(home / "a.hdf5", "w") as file:
        file["data/demo_0/actions"], file["data/demo_0/obs/joint"] = actions(), actions()
        file["data/demo_0/obs/camera"] = np.zeros((20, 8, 8, 3), np.uint8)
        file["data"].attrs["env_args"] = json.dumps(dict(env_kwargs=dict(control_freq=10)))
    read = getattr(this, "readers.hdf5").list_hdf5
    return [home / "a.hdf5"], lambda: [ref.load(None) for ref in read("a", [home / "a.hdf5"], None)]


@reader("pi05_finetune", "readers.dataset")
def lerobot_with_tasks(this, home):
    feature = dict(dtype="float32", shape=[3], names=["x", "y", "gripper"])
    write_lerobot(home, features={"action": feature, "observation.state": feature})
    (home / "meta/tasks.jsonl").write_text(json.dumps(dict(task_index=0, task="push")))
    (home / "meta/episodes.jsonl").write_text(json.dumps(dict(episode_index=0, tasks=["push"], length=20)))
    files = [path for path in home.rglob("*") if path.is_file()]
    return files, lambda: getattr(this, "readers.dataset").open_data([str(home)], say=lambda text: None)


@reader("pi05_finetune", "compute_norms")
def norms(this, home):
    row = {name: np.arange(1.0, 4.0) for name in this.compute_norms.STATS}
    this.compute_norms.Norms(row, dict(joint=row), dict(data_hash="x", proprio_keys=["joint"])).save(home)
    return sorted(home.iterdir()), lambda: this.compute_norms.load_norms(home)


# --- vae_distill


@reader("vae_distill", "demo")
def clips(this, home):
    import mujoco

    model = mujoco.MjModel.from_xml_string(this.demo.WALKER)
    this.demo.write_clips(home / "a.h5", model, np.full((2, 10, 2), 0.1))
    return [home / "a.h5"], lambda: this.data.read_clips([f"a={home / 'a.h5'}"], model, 50.0)


@reader("vae_distill", "teacher.checkpoint")
def teacher(this, home):
    shapes = dict(hidden_0=(5, 4), fc2_mean=(4, 2), fc2_logvar=(4, 2))
    layers = {name: dict(kernel=np.ones(x, np.float32), bias=np.ones(x[1], np.float32)) for name, x in shapes.items()}
    decoder = {"hidden_0": dict(kernel=np.ones((4, 2), np.float32), bias=np.ones(2, np.float32))}
    config = dict(network_config=dict(arch_name="intention"), env_config=dict(env_args=dict(mocap_hz=50)))
    checkpoint = getattr(this, "teacher.checkpoint")
    checkpoint.write_teacher(home, 1, config, np.zeros(7), np.ones(7), dict(encoder=layers, decoder=decoder))
    return sorted(path for path in home.rglob("*") if path.is_file()), lambda: checkpoint.read_teacher(home)


@reader("vae_distill")
def student(this, home):
    import jax

    sizes = dict(latent_dim=2, encoder_hidden_sizes=(4,), decoder_hidden_sizes=(4,), prior_hidden_sizes=(4,))
    config = this.model.StudentConfig(reference_size=3, proprioception_size=2, action_size=2, **sizes)
    made = this.model.Student(config, np.zeros(5, np.float32), np.ones(5, np.float32))
    made.save_pretrained(home, made.init(jax.random.key(0)))
    return sorted(home.iterdir()), lambda: this.model.Student.from_pretrained(home)


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


def fuzz(name, home, cases, note=lambda *told: None):
    """What a reader did wrong on `cases` damaged files, with the first case of each place; sound files are read."""
    folder, modules, make = READERS[name]
    this, mark, found = load(folder, *modules), home / "code ran", {}
    (home / "data").mkdir(parents=True)
    files, read = make(this, home / "data")
    sound = {path: path.read_bytes() for path in files}
    read()
    for number in cases:
        note(number, list(found.values()))
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
    """20 damaged files per reader: each gives a value or a DataError."""
    wrong = fuzz(name, tmp_path, range(20))
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
    """1,000 cases in forked processes: a crash or an endless loop of a C library is a finding too, with its case."""
    start, cases, first, wrong = time.monotonic(), int(os.environ.get("CASES", 1000)), 0, []
    while first < cases:
        told = tmp_path / f"from_{first}.json"
        told.write_text(json.dumps([first, []]))
        if (pid := os.fork()) == 0:
            try:
                home = tmp_path / str(first)
                found = fuzz(name, home, range(first, cases), lambda *now: told.write_text(json.dumps(now)))  # noqa: B023
                told.write_text(json.dumps([cases, found]))
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.time() - told.stat().st_mtime > 120:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        number, found = json.loads(told.read_text())
        wrong += found
        if number < cases:
            wrong.append(f"case {number}: the process ended with {os.waitstatus_to_exitcode(ended[1])} (-9: it hung)")
        first = number + 1
    print(f"\n| {name} | {cases} | {len(wrong)} | {time.monotonic() - start:.0f} |", *wrong, sep="\n", flush=True)
    assert not wrong, "\n".join(wrong)
