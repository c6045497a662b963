"""track-mjx checkpoints without track-mjx: read any of its three layouts, write the first.

A run folder holds `PPONetwork_<step>` folders with two items: `config` (plain JSON) and `policy` (OCDBT and zarr arrays
under the names `0.*`, the observation normaliser, and `1.params.*`, the networks). Arrays are read by name, straight to
numpy, so it does not matter on which devices they were saved. The three layouts differ in the normaliser alone:

  flat (2025)     0.mean, 0.std over [reference, proprioception]
  dict (2025-12)  0.imitation_target.mean, 0.proprioception.mean
  nested (2026)   0.mean.state.task_obs, 0.mean.state.proprioception
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore
from model import unflatten, widths

from common import DataError

REFERENCE_KEYS = ("imitation_target", "task_obs")  # what the layouts call the reference part


@dataclass
class Teacher:
    """config: the run's own; mean, std (N,): normaliser over [reference, proprioception], identity if it was off;
    params: {"encoder": ..., "decoder": ...}, nested dicts of float32 arrays; reference_size: first part of the N;
    layout: flat, dict or nested."""

    path: Path
    config: dict
    mean: np.ndarray
    std: np.ndarray
    params: dict
    reference_size: int
    layout: str

    @property
    def action_size(self):
        """A; the decoder's last layer holds a mean and a scale for each action."""
        return widths(self.params["decoder"])[-1] // 2

    @property
    def latent_size(self):
        return self.params["encoder"]["fc2_mean"]["bias"].shape[0]

    @property
    def mocap_hz(self):
        """Frames per second of the clips it was trained on."""
        return float(self.config["env_config"]["env_args"]["mocap_hz"])


def newest(path):
    """`path` if it is a checkpoint, else its PPONetwork_<step> with the largest step."""
    path = Path(path)
    if (path / "policy").exists():
        return path
    steps = [p for p in path.glob("PPONetwork_*") if p.name.rpartition("_")[2].isdigit()]
    if not steps:
        raise DataError(f"--teacher {path}: no PPONetwork_<step> folder in it (a track-mjx run has them)")
    return max(steps, key=lambda p: int(p.name.rpartition("_")[2]))


def read_arrays(folder):
    """{"0.mean": array, ...} of one saved item, whatever devices it was saved from."""
    try:
        about = json.loads((folder / "_METADATA").read_text())
        names = [
            ".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in about["tree_metadata"].values()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}/_METADATA: not the table of a checkpoint's arrays ({error})") from None
    ocdbt = (folder / "manifest.ocdbt").exists()
    arrays = {}
    for name in names:
        files = dict(driver="file", path=f"{folder.resolve()}/")  # a path, not a URL: it may hold %, # and ?
        store = dict(driver="ocdbt", base=files, path=f"{name}/")
        plain = dict(files, path=f"{folder.resolve()}/{name}/")
        spec = dict(driver="zarr3" if about.get("use_zarr3") else "zarr", kvstore=store if ocdbt else plain)
        try:  # without `fill`, a chunk that is gone would read as zeros
            fill = {} if about.get("use_zarr3") else dict(fill_missing_data_reads=False)
            arrays[name] = tensorstore.open({**spec, **fill}, read=True).result().read().result()
        except (ValueError, OSError, RuntimeError) as error:
            raise DataError(
                f"{folder}: array {name} is missing or damaged ({' '.join(str(error).split())[:120]})"
            ) from None
    return arrays


def read_normaliser(arrays, where):
    """(layout, mean, std, size of the reference part or None) of whichever layout the arrays are in."""
    if "0.mean" in arrays and "0.std" in arrays:
        return "flat", arrays["0.mean"], arrays["0.std"], None
    for key in REFERENCE_KEYS:
        for layout, pattern in dict(dict="0.{part}.{stat}", nested="0.{stat}.state.{part}").items():
            names = [
                [pattern.format(part=part, stat=stat) for part in (key, "proprioception")] for stat in ("mean", "std")
            ]
            if all(name in arrays for row in names for name in row):
                mean, std = (np.concatenate([arrays[name] for name in row]) for row in names)
                return layout, mean, std, len(arrays[names[0][0]])
    found = sorted(name for name in arrays if name.startswith("0."))[:4]
    raise DataError(f"{where}/policy: an observation normaliser of an unknown layout ({', '.join(found) or 'none'})")


def read_teacher(path):
    """The teacher of a run folder (its newest checkpoint) or of one PPONetwork_<step> folder."""
    path = newest(path)
    try:
        config = json.loads((path / "config" / "metadata").read_text())
        network = dict(config["network_config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}/config/metadata: no `network_config` of a track-mjx run ({error})") from None
    kind = network.get("arch_name", "intention")
    if kind not in ("intention", "amp_intention"):
        raise DataError(
            f"{path}: its network_config.arch_name is {kind!r}; only 'intention' and 'amp_intention' are known"
        )
    if not (path / "policy").is_dir():
        raise DataError(f"{path}: the item `policy` is missing")
    arrays = read_arrays(path / "policy")
    if bad := [name for name, x in arrays.items() if not np.isfinite(x).all()]:
        raise DataError(f"{path}/policy: array {bad[0]} holds NaN or infinity")
    weights = {name[9:]: np.asarray(x, np.float32) for name, x in arrays.items() if name.startswith("1.params.")}
    params = {part: unflatten(weights).get(part, {}) for part in ("encoder", "decoder")}
    for part, needed in (("encoder", ("hidden_0", "fc2_mean", "fc2_logvar")), ("decoder", ("hidden_0",))):
        missing = [name for name in needed if name not in params[part]]
        if missing:
            have = ", ".join(sorted(params[part])) or "nothing"
            raise DataError(f"{path}/policy: {part}/{missing[0]} is missing (it has {have}): not an intention network")
    layout, mean, std, size = read_normaliser(arrays, path)
    size = size or network.get("reference_obs_size") or params["encoder"]["hidden_0"]["kernel"].shape[0]
    if not network.get("normalize_observations", True):
        mean, std = np.zeros_like(mean), np.ones_like(std)
    teacher = Teacher(path, config, mean.astype(np.float32), std.astype(np.float32), params, int(size), layout)
    wants = params["encoder"]["hidden_0"]["kernel"].shape[0], params["decoder"]["hidden_0"]["kernel"].shape[0]
    gives = teacher.reference_size, teacher.latent_size + len(mean) - teacher.reference_size
    if wants != gives:
        raise DataError(f"{path}/policy: encoder and decoder take {wants} numbers, but the observation gives {gives}")
    return teacher


def write_teacher(folder, step, config, mean, std, params):
    """Save as track-mjx does (orbax), in the flat layout; params: {"encoder": ..., "decoder": ..., ...}."""
    import jax
    import orbax.checkpoint as ocp  # two seconds

    folder = Path(folder).resolve()
    shutil.rmtree(folder / f"PPONetwork_{step}", ignore_errors=True)
    variance = np.square(std).astype(np.float32)
    normaliser = dict(count=np.float32(1), mean=mean, std=std, summed_variance=variance)
    items = dict(policy=ocp.args.StandardSave((normaliser, dict(params=params))), config=ocp.args.JsonSave(config))
    me = jax.process_index()  # the one process that saves: without this orbax waits for all the others
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix="teacher"
    )
    folder.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        step_prefix="PPONetwork", enable_async_checkpointing=False, multiprocessing_options=alone, create=False
    )
    with ocp.CheckpointManager(folder, options=options) as manager:
        manager.save(step, args=ocp.args.Composite(**items))
