"""Bad input: every reader, on files that hypothesis damages, gives a value, or the ValueError or OSError that
common.run prints as one line; never another exception, never a hang, never code that runs.

Damage is done to bytes (flips, cuts, zeros, repeats), to values inside of json, and to arrays inside of whole
archives (other shapes, types, pickles). CI takes a fixed sample in this process; the campaign 1,000 cases per reader in
a process of its own, as a C library may crash:
  pytest -m campaign -s tests/test_bad_input.py
"""

import copy
import io
import json
import os
import pickle
import signal
import struct
import sys
import time
import traceback
import zipfile
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, load
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(1, str(ROOT))
import common

LIMIT = 20  # seconds for one file of a few kB, after which it counts as a hang
READERS = {}


def reader(kind, folder, *modules):
    """Register a function (folder's modules, scratch folder) -> (files to damage, function that reads them)."""

    def register(make):
        READERS[f"{kind}, {folder}: {make.__name__}"] = (folder, modules, make)
        return make

    return register


# --- whole files, and who reads them


def actions(T=20):
    return np.sin(np.arange(T)[:, None] * [0.1, 0.2, 0.3]).astype(np.float32)


@reader("npz", "fsq_vqvae")
def episodes_npz(this, home):
    np.savez(home / "a.npz", actions=actions(), timestamps=np.arange(20) / 10)
    return [home / "a.npz"], lambda: this.data.read_sources([f"a={home}"], ["5"])


@reader("npz", "pi05_finetune", "episodes")
def episodes_npz_with_images(this, home):
    (home / "episodes").mkdir()
    frames = np.arange(20 * 8 * 8 * 3, dtype=np.uint8).reshape(20, 8, 8, 3)
    arrays = {"actions": actions(), "timestamps": np.arange(20) / 10, "obs.joint": actions(), "obs.camera": frames}
    np.savez(home / "episodes" / "a.npz", **arrays, task=np.array("push"))
    about = dict(
        name="x", action_dim=3, control_freq_hz=10, required_obs_keys=["camera"], required_proprio_keys=["joint"]
    )
    (home / "spec.yaml").write_text(json.dumps(about))
    return [home / "episodes" / "a.npz"], lambda: this.episodes.open_data([str(home)], say=lambda text: None)


@reader("npz", "vae_distill")
def weights_npz(this, home):
    np.savez(home / "w.npz", mean=np.ones(3, np.float32), kernel=np.ones((4, 4), np.float32))
    return [home / "w.npz"], lambda: this.model.read_npz(home / "w.npz")


@reader("h5", "fsq_vqvae")
def robomimic(this, home):
    with h5py.File(home / "a.hdf5", "w") as file:
        for i in range(2):
            file[f"data/demo_{i}/actions"] = actions()
    return [home / "a.hdf5"], lambda: this.data.read_sources([f"a={home / 'a.hdf5'}"], ["5"])


@reader("h5", "vvae_lam", "recordings")
def latents(this, home):
    for name in ("a", "b"):
        with h5py.File(home / f"{name}.h5", "w") as file:
            file.create_dataset("embeddings", data=np.ones((6, 4, 1, 4, 4), np.float16), compression="gzip")

    def read():
        this.recordings.opened.cache_clear()
        found = this.recordings.read_sources([f"a={home}"])
        return [recording.read(np.arange(len(recording))) for recording in found]

    return [home / "a.h5"], read


@reader("h5", "vae_distill", "demo")
def clips(this, home):
    import mujoco

    model = mujoco.MjModel.from_xml_string(this.demo.WALKER)
    this.demo.write_clips(home / "a.h5", model, np.full((2, 10, 2), 0.1))
    return [home / "a.h5"], lambda: this.data.read_clips([f"a={home / 'a.h5'}"], model, 50.0)


def clip_sample(shards, key):
    about = dict(instruction="push", fps=5, source="a", episode=key, camera="c", length=6)
    frames = np.arange(6 * 8 * 8 * 3, dtype=np.uint8).reshape(6, 8, 8, 3)
    sample = {
        "json": json.dumps(about).encode(),
        "frames.npy": shards.npy(frames),
        "actions.npy": shards.npy(actions(6)),
    }
    return {"__key__": key, **sample}


def read_all(found, *words):
    """Every frame and array of the clips; words: what `frames` of this folder wants to know."""
    for clip in found:
        clip.frames(*words)
        for extension in set(clip.members) & {"actions.npy", "state.npy"}:
            clip.array(extension)
    return found


@reader("tar", "laq", "shards")
def laq_shards(this, home):
    this.shards.write_shard(home / "x.tar", [clip_sample(this.shards, key) for key in "ab"])
    index = this.shards.index_of(home / "x.tar")

    def read():
        for path in (index, home / "x.index.json"):
            path.unlink(missing_ok=True)
        return read_all(this.shards.read_clips(home, say=lambda text: None))

    return [home / "x.tar"], read


@reader("tar", "laq", "shards")
def laq_index(this, home):
    this.shards.write_shard(home / "x.tar", [clip_sample(this.shards, key) for key in "ab"])
    return [this.shards.index_of(home / "x.tar")], lambda: read_all(this.shards.read_clips(home, say=lambda text: None))


@reader("tar", "vla", "shards")
def vla_shards(this, home):
    this.shards.write_shard(home / "x.tar", [clip_sample(this.shards, key) for key in "ab"])
    return [home / "x.tar"], lambda: read_all(this.shards.read_clips(home), np.array([0, 3, 5]), 4)


@reader("tar", "vla", "shards")
def label_shards(this, home):
    this.shards.write_shard(home / "x.tar", [clip_sample(this.shards, key) for key in "ab"])
    packed = this.shards.npz(codes=np.zeros((5, 1), np.int64), vectors=np.zeros((5, 1, 2), np.float32), gap=np.int64(1))
    (home / "labels").mkdir()
    this.shards.write_shard(home / "labels" / "x.tar", [{"__key__": key, "latents.npz": packed} for key in "ab"])
    about = dict(vocabulary=2, codes=1, dim=2, gap=1, codebook=[[0.0, 1.0], [1.0, 0.0]])
    (home / "labels" / "labels.json").write_text(json.dumps(about))
    words = [f"a={home}"], "latents", [home / "labels"]
    return [home / "labels" / "x.tar"], lambda: this.data.read_sources(*words)


@reader("parquet", "fsq_vqvae")
def lerobot_parquet(this, home):
    import pyarrow
    import pyarrow.parquet

    (home / "meta").mkdir()
    (home / "data").mkdir()
    (home / "meta" / "info.json").write_text(json.dumps(dict(fps=10, codebase_version="v2.1")))
    table = dict(action=list(actions()), episode_index=[0] * 20, frame_index=list(range(20)))
    pyarrow.parquet.write_table(pyarrow.table(table), home / "data" / "episode_000000.parquet")
    files = [home / "data" / "episode_000000.parquet", home / "meta" / "info.json"]
    return files, lambda: this.data.read_sources([f"a={home}"], ["5"])


@reader("json", "vvae_lam", "recordings")
def manifest(this, home):
    for name in ("a", "b"):
        with h5py.File(home / f"{name}.h5", "w") as file:
            file["embeddings"] = np.ones((2, 4, 1, 4, 4), np.float16)
    (home / "manifest.json").write_text(json.dumps(dict(splits=dict(train=["a.h5"], validation=["b.h5"]), seed=0)))
    return [home / "manifest.json"], lambda: this.recordings.read_sources([f"a={home}"], home / "manifest.json")


@reader("json", "vla", "shards")
def labels_json(this, home):
    about = dict(vocabulary=2, codes=1, dim=2, gap=1, codebook=[[0.0, 1.0], [1.0, 0.0]])
    (home / "labels.json").write_text(json.dumps(about))
    return [home / "labels.json"], lambda: this.shards.read_vocabulary(home)


@reader("spec", "pi05_finetune", "spec")
def spec_yaml(this, home):
    text = (ROOT / "pi05_finetune" / "specs" / "demo.yaml").read_text()
    (home / "spec.yaml").write_text(text)
    return [home / "spec.yaml"], lambda: this.spec.load_spec(home / "spec.yaml")


@reader("spec", "pi05_finetune", "spec")
def spec_json(this, home):
    about = dict(name="x", action_dim=2, control_freq_hz=10, required_obs_keys=["c"], required_proprio_keys=["j"])
    about |= dict(action_names=["a", "b"], action_min=[-1, -1], action_max=1, max_episode_steps=9, clip_actions=True)
    (home / "spec.json").write_text(json.dumps(about))
    return [home / "spec.json"], lambda: this.spec.load_spec(home / "spec.json")


def tokenizer(this):
    about = dict(
        name="a", action_dim=3, chunk=6, fps=10.0, center=[0.0] * 3, scale=[1.0] * 3, low=[0.0] * 3, high=[1.0] * 3
    )
    small = dict(hidden_dim=8, latent_dim=4, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, num_tokens=2)
    return this.model.FSQVQVAE([about], **small)


@reader("config", "fsq_vqvae")
def model_config(this, home):
    tokenizer(this).save_pretrained(home)
    return [home / "config.json"], lambda: this.model.FSQVQVAE.from_pretrained(home)


@reader("config", "laq")
def laq_config(this, home):
    small = dict(image_size=16, patch=8, dim=32, stem=8, spatial_depth=1, temporal_depth=1, decoder_depth=1)
    this.model.LAQ(**small, codes=2, vocabulary=4, code_dim=4).save_pretrained(home)
    return [home / "config.json"], lambda: this.model.LAQ.from_pretrained(home)


@reader("config", "vvae_lam")
def latent_model_config(this, home):
    small = dict(channels=2, height=8, width=8, patch_dim=8, embed_dim=16, encoder_depth=1, decoder_depth=1)
    model = this.model.VVAELatentActionVQVAE
    model(**small, num_heads=2, num_codes=2, num_embeddings=4, codebook_dim=4).save_pretrained(home)
    return [home / "config.json"], lambda: model.from_pretrained(home)


@reader("config", "vla")
def vla_json(this, home):
    latent = dict(vocabulary=2, codes=1, dim=2, gap=1, codebook=[[0.0, 1.0], [1.0, 0.0]])
    about = dict(prompt="robot, {instruction}", queries=1, image_size=32, latent=latent, action=None)
    (home / "vla.json").write_text(json.dumps(about))
    return [home / "vla.json"], lambda: this.model.read_config(home)


@reader("config", "pi05_finetune", "norms")
def norms_folder(this, home):
    one = {name: np.arange(1.0, 4.0) for name in this.norms.STATS}
    this.norms.Norms(one, dict(joint=one), dict(data_hash="x", proprio_keys=["joint"])).save(home)
    return sorted(home.iterdir()), lambda: this.norms.load_norms(home)


@reader("config", "vae_distill")
def student_folder(this, home):
    import jax

    config = dict(reference_size=3, action_size=2, latent=2, encoder=[4], decoder=[4], prior=[4], teacher={})
    student = this.model.Student(config, np.zeros(5, np.float32), np.ones(5, np.float32))
    student.save_pretrained(home, student.init(jax.random.key(0)))
    return sorted(home.iterdir()), lambda: this.model.Student.from_pretrained(home)


@reader("checkpoint", "fsq_vqvae")
def model_weights(this, home):
    tokenizer(this).save_pretrained(home)
    return [home / "pytorch_model.bin"], lambda: this.model.FSQVQVAE.from_pretrained(home)


@reader("checkpoint", "fsq_vqvae")
def training_state(this, home):
    model = torch.nn.Linear(3, 2)
    opt = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    opt.step()
    torch.save(dict(step=3, best=0.5, opt=opt.state_dict(), scaler={}), home / "resume.pt")
    return [home / "resume.pt"], lambda: common.load(home / "resume.pt")


@reader("checkpoint", "fsq_vqvae")
def whole_json(this, home):
    args = SimpleNamespace(out=home, keep=2, steps=9, data=["x"], folder="f")
    dist = SimpleNamespace(main=True, world=1)
    with common.checkpoint(args, 3) as folder:
        (folder / "weights").write_bytes(b"1" * 99)

    def read():
        return common.newest(args, dist)

    return [home / "checkpoints" / "step_0000003" / "whole.json"], read


@reader("checkpoint", "vae_distill", "teacher")
def teacher(this, home):
    widths = dict(hidden_0=(5, 4), fc2_mean=(4, 2), fc2_logvar=(4, 2))
    encoder = {
        name: dict(kernel=np.ones(shape, np.float32), bias=np.ones(shape[1], np.float32))
        for name, shape in widths.items()
    }
    decoder = {"hidden_0": dict(kernel=np.ones((4, 2), np.float32), bias=np.ones(2, np.float32))}
    config = dict(network_config=dict(arch_name="intention"), env_config=dict(env_args=dict(mocap_hz=50)))
    this.teacher.write_teacher(home, 1, config, np.zeros(7), np.ones(7), dict(encoder=encoder, decoder=decoder))
    files = sorted(path for path in home.rglob("*") if path.is_file())
    return files, lambda: this.teacher.read_teacher(home)


# --- damage


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def npy(array, evil=False):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=evil)
    return file.getvalue()


WEIRD = [
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "ü\n" * 5,
    "\0",
    [],
    {},
    [[]],
    [None],
    {"a": {}},
]
BYTES = ["flip", "zero", "ones", "cut out", "cut off", "repeat", "insert", "huge"]


def damage_bytes(data, changes):
    data = bytearray(data)
    for kind, where, value, length in changes:
        at = int(where * max(len(data) - 1, 0))
        part = slice(at, min(at + length, len(data)))
        if kind == "flip" and data:
            data[at] ^= value or 1
        elif kind in ("zero", "ones"):
            data[part] = (b"\0" if kind == "zero" else b"\xff") * (part.stop - part.start)
        elif kind == "cut out":
            del data[part]
        elif kind == "cut off":
            del data[at:]
        elif kind == "repeat":
            data[at:at] = data[part] * 3
        elif kind == "insert":
            data[at:at] = bytes([value]) * length
        elif kind == "huge":  # a length or an offset that leads far away
            data[at : at + 8] = struct.pack("<Q", 1 << (value % 64))
    return bytes(data)


def damage_json(data, changes):
    """One or more values of a json document replaced, removed or doubled."""
    try:
        tree = json.loads(data)
    except ValueError:
        return damage_bytes(data, changes)
    for _, where, value, _ in changes:
        places = []

        def walk(node, places=places):
            for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
                places.append((node, key))
                walk(node[key])

        walk(tree)
        if not places:
            break
        node, key = places[int(where * (len(places) - 1))]
        if value % 5 == 0:
            node.pop(key)
        else:
            node[key] = copy.deepcopy(WEIRD[value % len(WEIRD)])
    tree = tree if changes[0][2] % 23 else WEIRD[changes[0][3] % len(WEIRD)]
    return json.dumps(tree).encode()


def damage_archive(data, changes, mark):
    """An npz whose checksums are right and whose arrays are not: other shapes, types, names; a pickle."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for kind, where, value, _ in changes:
        name = sorted(members)[int(where * (len(members) - 1))]
        arrays = [
            *(
                np.zeros(0),
                np.zeros((0, 3)),
                np.array(5.0),
                np.full((20, 3), np.nan),
                np.zeros((3, 2, 2, 2)),
                np.zeros(20),
            ),
            *(
                np.array(["text"]),
                np.zeros((20, 3), complex),
                np.zeros((20, 3), bool),
                np.zeros((7, 3)),
                np.array([b"x"]),
            ),
            *(
                np.zeros(20, "M8[s]"),
                np.zeros(3, [("a", "f4"), ("b", "i8")]),
                np.arange(20.0)[::-1],
                np.full((20, 3), 1e300),
            ),
        ]
        if value % 3 == 0:
            members[name] = damage_bytes(members[name], [(kind, where * where, value, 8)])
        elif value % 16 == 1:
            members[name] = npy(np.array([Evil(mark)], object), evil=True)
        elif value % 16 == 2 and len(members) > 1:
            del members[name]
        else:
            members[name] = npy(arrays[value % len(arrays)])
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return file.getvalue()


def damage(path, data, deep, changes, mark):
    """The damaged bytes of a file: inside of its format where `deep` says so and we know how."""
    if deep and path.suffix == ".npz":
        return damage_archive(data, changes, mark)
    if deep and (path.suffix == ".json" or data[:1] == b"{"):
        return damage_json(data, changes)
    if deep and path.suffix in (".bin", ".pt"):
        made = io.BytesIO()
        torch.save(dict(step=1, opt=Evil(mark)), made, _use_new_zipfile_serialization=changes[0][2] % 2 == 0)
        return made.getvalue() if changes[0][2] % 3 else pickle.dumps(Evil(mark), protocol=2)
    return damage_bytes(data, changes)


WHERE = st.integers(0, 1000).map(lambda number: number / 1000)  # a share of the file
CHANGE = st.tuples(st.sampled_from(BYTES), WHERE, st.integers(0, 255), st.integers(1, 64))
CASE = st.tuples(WHERE, st.booleans(), st.lists(CHANGE, min_size=1, max_size=3))


# --- judging


class Hang(BaseException):
    pass


def ring(*signal):
    raise Hang


seen = []
RUNS_CODE = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn", "pickle.find_class", "os.mkdir"}
watching = [False]
sys.addaudithook(lambda event, words: seen.append(event) if watching[0] and event in RUNS_CODE else None)


def judge(read):
    """None if a reader behaved, else what it did: the exception and its place in our code."""
    signal.signal(signal.SIGALRM, ring)
    seen.clear()
    try:
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        watching[0] = True
        read()
    except (ValueError, OSError):  # common.run prints it as one line
        pass
    except Hang as error:
        return f"hang at {place(error)}"
    except Exception as error:
        return f"{type(error).__name__}: {common.brief(error)} at {place(error)}"
    finally:
        watching[0] = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    return f"ran code: {sorted(set(seen))}" if seen else None


def place(error):
    """file:line of the last frame in this repository's own code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(ROOT) in frame.filename]
    frames = [frame for frame in frames if Path(frame.filename).parent.name != "tests"] or frames
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "?"


def fuzz(name, home, cases, note=lambda *words: None):
    """(what a reader did wrong, with the first case of each place; cases) over damaged files. Whole ones are read."""
    folder, modules, make = READERS[name]
    this, mark = load(folder, *modules), home / "code ran"
    (home / "data").mkdir()
    files, read = make(this, home / "data")
    whole = {path: path.read_bytes() for path in files}
    read()  # the undamaged files
    found, count = {}, [0]

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(CASE)
    def one(case):
        which, deep, changes = case
        path = files[int(which * (len(files) - 1))]
        count[0] += 1
        note(count[0], repr(case))
        path.write_bytes(damage(path, whole[path], deep, changes, mark))
        wrong = judge(read)
        if mark.exists():
            mark.rmdir()
            wrong = f"ran code: made a folder ({wrong})"
        if wrong:
            found.setdefault((wrong.rpartition(" at ")[2], wrong.partition(":")[0]), (wrong, path.name, case))
        for path, data in whole.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    one()
    return [f"{name}: {wrong}; {file} damaged by {case}" for wrong, file, case in found.values()], count[0]


def ready(name):
    folder, modules, _ = READERS[name]
    files = [ROOT / folder / f"{part}.py" for part in ("model", "data", "train", *modules)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        pytest.skip(f"{folder} has no {', '.join(missing)}")


@pytest.mark.parametrize("name", READERS)
def test_sample(name, tmp_path):
    """A file that is damaged in one of 40 fixed ways ends in a traceback, a hang, or runs code."""
    ready(name)
    wrong, count = fuzz(name, tmp_path, 40)
    assert not wrong, "\n".join(wrong)
    assert count >= 30


def test_the_judge_sees(tmp_path):
    """The fuzzer's own eyes: a traceback, a hang, code from a pickle pass unseen."""
    global LIMIT
    mark = tmp_path / "made"
    cases = {"KeyError": lambda: {}["x"], "ran code": lambda: pickle.loads(pickle.dumps(Evil(mark)))}
    for text, read in cases.items():
        assert text in judge(read), text
    assert mark.exists()
    assert judge(lambda: int("x")) is None and judge(lambda: open("/nowhere")) is None
    LIMIT, before = 0.2, LIMIT
    try:
        assert "hang" in judge(lambda: time.sleep(5))
    finally:
        LIMIT = before


@pytest.mark.campaign
@pytest.mark.parametrize("name", READERS)
def test_campaign(name, tmp_path):
    """1,000 cases, in a forked process: a crash of a C library is a finding too, with its case."""
    ready(name)
    start, last, result = time.monotonic(), tmp_path / "last", tmp_path / "result"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            wrong, count = fuzz(name, tmp_path, 1000, note=lambda *words: last.write_text(str(words)))
            result.write_text(json.dumps([wrong, count]))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    wrong, count = json.loads(result.read_text()) if result.exists() else (
        [f"{name}: ended with {status} in case {last.read_text() if last.exists() else 'none'}"], 0
    )  # fmt: skip
    print(f"\n| {name} | {count} | {len(wrong)} | {time.monotonic() - start:.0f} |", *wrong, sep="\n", flush=True)
    assert not wrong, "\n".join(wrong)
