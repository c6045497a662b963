"""Reference clips for a walker, from stac-mjx and track-mjx h5 files, and their split into training and test clips.

stac-mjx: datasets `qpos` (T nq), `xpos` (T nb 3), `qvel` (T nv, often empty or saturated), names and a YAML
`config` that tells the frames per clip; clips lie one after another. ReferenceClip: a group with `position`,
`quaternion`, `joints`, `body_positions` (clips T ...) and velocities. Both become one `Clips`.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import h5py
import mujoco
import numpy as np

REFERENCE_CLIP = ("position", "quaternion", "joints")


@dataclass
class Clips:
    """C clips of up to T frames; a shorter clip repeats its last frame. Angles in rad, lengths in the walker's unit.

    qpos (C T nq), qvel (C T nv) per second, xpos (C T nb 3) world positions of `bodies` (names, in the file's order),
    length (C,) in frames, ids one name per clip, source (C,) name of the data set, validation (C,) bool.
    """

    ids: list
    source: np.ndarray
    qpos: np.ndarray
    qvel: np.ndarray
    xpos: np.ndarray
    bodies: list
    length: np.ndarray
    validation: np.ndarray
    recomputed: int  # files whose qvel was of no use


# --- one file


def names_of(h5, key):
    return [word.decode() if isinstance(word, bytes) else str(word) for word in h5[key][()]] if key in h5 else []


def read_stac(h5, clip_frames):
    """(clips, T, ...) arrays of a stac-mjx file, names of its bodies and of its qpos entries."""
    qpos, config = h5["qpos"][()], h5["config"][()] if "config" in h5 else b""
    text = config.decode() if isinstance(config, bytes) else str(config)
    told = re.search(r"n_frames_per_clip:\s*(\d+)", text)
    frames = clip_frames or (int(told[1]) if told else len(qpos))
    if len(qpos) == 0:
        raise ValueError("`qpos` is empty")
    if frames < 2:
        raise ValueError(f"clips of {frames} frame: say how long they are with --clip-frames")
    arrays = dict(qpos=qpos)
    for key in ("xpos", "qvel"):
        if key in h5 and h5[key].shape[0] == len(qpos):
            arrays[key] = h5[key][()]
    starts = range(0, len(qpos), frames)
    clips = [{key: value[i : i + frames] for key, value in arrays.items()} for i in starts]
    return clips, names_of(h5, "names_xpos"), names_of(h5, "names_qpos")


def read_reference_clip(group):
    """The same of a ReferenceClip group; it holds no names."""
    missing = [key for key in REFERENCE_CLIP if key not in group]
    if missing:
        raise ValueError(f"its ReferenceClip has no `{missing[0]}`")
    arrays = dict(qpos=np.concatenate([group[key][()] for key in REFERENCE_CLIP], -1))
    if "body_positions" in group:
        arrays["xpos"] = group["body_positions"][()]
    velocity = ("velocity", "angular_velocity", "joints_velocity")
    if all(key in group for key in velocity):
        arrays["qvel"] = np.concatenate([group[key][()] for key in velocity], -1)
    return [{key: value[i] for key, value in arrays.items()} for i in range(len(arrays["qpos"]))], [], []


def read_file(file, model, mocap_hz, clip_frames=0):
    """(clips, names of their bodies, was qvel recomputed) of a file, checked; a clip is dict(qpos, qvel, xpos)."""
    try:
        with h5py.File(file, "r") as h5:
            group = next((h5[key] for key in ("all_clips", "clips") if key in h5), h5)
            if "qpos" in h5:
                clips, bodies, joints = read_stac(h5, clip_frames)
            elif "position" in group:
                clips, bodies, joints = read_reference_clip(group)
            else:
                raise ValueError("neither stac-mjx (`qpos`) nor ReferenceClip (`position`, `quaternion`, `joints`)")
    except Exception as error:  # for a damaged file h5py raises a dozen kinds
        raise ValueError(f"{file}: not readable as reference clips ({' '.join(str(error).split())[:150]})") from None
    if not clips:
        raise ValueError(f"{file}: holds no clip")
    own = [name_of_qpos(model, i) for i in range(model.nq)]
    if joints and len(joints) == model.nq and set(joints) == set(own) and joints != own:
        i = next(i for i in range(model.nq) if joints[i] != own[i])
        raise ValueError(f"{file}: names_qpos has {joints[i]!r} at {i}, where the walker has {own[i]!r}")
    recomputed = False
    for i, clip in enumerate(clips):
        where = f"{file}, clip {i}"
        if clip["qpos"].ndim != 2 or clip["qpos"].shape[1] != model.nq:
            shape = clip["qpos"].shape
            raise ValueError(
                f"{where}: qpos has shape {shape}, but the walker has (frames, {model.nq}): another walker?"
            )
        if not np.isfinite(clip["qpos"]).all():
            raise ValueError(
                f"{where}: qpos holds NaN or infinity at frame {np.argwhere(~np.isfinite(clip['qpos']))[0][0]}"
            )
        velocity = velocities(model, clip["qpos"], mocap_hz)
        if broken(clip.get("qvel"), velocity):
            clip["qvel"], recomputed = velocity, True
        if "xpos" not in clip:
            clip["xpos"], bodies = positions(model, clip["qpos"]), body_names(model)
        elif not np.isfinite(clip["xpos"]).all():
            raise ValueError(f"{where}: xpos holds NaN or infinity")
    return clips, bodies, recomputed


# --- what the walker says


def name_of_qpos(model, index):
    joint = np.searchsorted(model.jnt_qposadr, index, side="right") - 1
    return model.joint(joint).name


def body_names(model):
    return [model.body(i).name for i in range(model.nbody)]


def velocities(model, qpos, rate):
    """Forward differences of qpos (T nq) at `rate` Hz in MuJoCo's qvel convention, (T nv); the last repeats."""
    qvel, rows = np.zeros((len(qpos), model.nv)), qpos.astype(np.float64)
    for t in range(len(qpos) - 1):
        mujoco.mj_differentiatePos(model, qvel[t], 1 / rate, rows[t], rows[t + 1])
    qvel[-1] = qvel[-2] if len(qpos) > 1 else 0
    return qvel


def broken(stored, computed):
    """True if the stored qvel is absent, of another shape, not finite, or far from the differences of qpos."""
    if stored is None or stored.shape != computed.shape or not np.isfinite(stored).all():
        return True
    return np.abs(stored - computed).mean() > 0.5 * np.abs(computed).mean() + 1e-6


def positions(model, qpos):
    """World positions of all bodies for qpos (T nq): (T nb 3)."""
    data, out = mujoco.MjData(model), np.zeros((len(qpos), model.nbody, 3), np.float32)
    for t, row in enumerate(qpos):
        data.qpos[:] = row
        mujoco.mj_kinematics(model, data)
        out[t] = data.xpos
    return out


# --- the whole


def episode_hash(source, episode):
    """A number in [0, 1) that depends on the two names alone."""
    digest = hashlib.sha256(f"{source}/{episode}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def named_paths(words):
    """["mouse=PATH", "PATH"] -> [(name, path)]; without a name it is the path's own."""
    pairs = [word.partition("=") for word in words]
    return [(name, path) if equals else (Path(name).stem or "data", name) for name, equals, path in pairs]


def hold_out(names, source, share, wanted):
    """Which clips are test clips: those `wanted`, or about `share` of them by hash, one at least of two."""
    if wanted:
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise ValueError(f"--val-episodes: no clip is called {unknown[0]}; the first is {names[0]}")
        return np.array([name in wanted for name in names])
    hashes = np.array([episode_hash(source, name) for name in names])
    held = hashes < share
    if held.all() or (share > 0 and len(names) > 1 and not held.any()):
        held = (np.arange(len(names)) == hashes.argmin()) & (len(names) > 1)
    return held


def read_clips(words, model, mocap_hz, val_share=0.1, val_episodes=(), clip_frames=0):
    """All clips of `--data` words (NAME=FILE.h5 or NAME=FOLDER) for a walker (mujoco.MjModel) as one `Clips`."""
    clips, ids, source, held, recomputed, bodies, first = [], [], [], [], 0, None, None
    for name, path in named_paths(words):
        path = Path(path)
        if not path.exists():
            raise ValueError(f"--data {path}: no such file or folder")
        files = sorted([*path.glob("*.h5"), *path.glob("*.hdf5")]) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"--data {path}: holds no .h5 file")
        own = []
        for file in files:
            found, names, again = read_file(file, model, mocap_hz, clip_frames)
            if bodies is not None and names != bodies:
                raise ValueError(f"{file}: names_xpos differs from {first}: one --data holds one walker")
            bodies, first, recomputed = names, first or file, recomputed + again
            clips += found
            own += [f"{file.stem}/{i}" for i in range(len(found))]
        ids += own
        source += [name] * len(own)
        held.append(hold_out(own, name, val_share, val_episodes))
    length = np.array([len(clip["qpos"]) for clip in clips])

    def stack(key):
        rows = (np.asarray(clip[key], np.float32) for clip in clips)
        return np.stack([np.concatenate([x, np.repeat(x[-1:], length.max() - len(x), 0)]) for x in rows])

    arrays = {key: stack(key) for key in ("qpos", "qvel", "xpos")}
    return Clips(ids, np.array(source), **arrays, bodies=bodies, length=length, validation=np.concatenate(held),
                 recomputed=recomputed)  # fmt: skip
