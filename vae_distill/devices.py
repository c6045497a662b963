"""Where JAX computes: the device mesh, processes, the compile cache, and a word while something compiles."""

import contextlib
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

BY_ENV = ("envs", "obs")  # parts of the training state with an environment axis in front
PLATFORM = dict(cuda="gpu", rocm="gpu")  # flag -> what JAX calls it


def setup(device, count=0):
    """Join the processes that torchrun started, if any; make a mesh of devices. Returns what common.py expects.

    device: auto, cpu, cuda, cuda:1; count: devices of the mesh, 0 for all. rank, main, mesh; world is 1 for
    common.py, as every process computes the same metrics of the whole batch and has nothing to average.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not jax.distributed.is_initialized():
        # torchrun's own store listens on MASTER_PORT
        address = f"{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT']) + 1}"
        jax.distributed.initialize(address, world, rank, local_device_ids=local_devices(device))
    name, _, index = device.partition(":")
    try:
        devices = jax.devices() if name == "auto" else jax.devices(PLATFORM.get(name, name))
        devices = [devices[int(index)]] if index else devices
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(
            f"--device {device}: JAX has no such device here ({str(error).splitlines()[0][:100]})"
        ) from None
    if count > len(devices):
        raise ValueError(f"--devices {count}: there are {len(devices)} here")
    devices = devices[: count or None]
    mesh = jax.make_mesh((len(devices),), ("env",), axis_types=(AxisType.Auto,), devices=devices)
    return SimpleNamespace(rank=rank, world=1, processes=world, main=rank == 0, mesh=mesh, device=devices[0])


def local_devices(device):
    """What of this machine's devices belongs to this process: one GPU each; on a CPU there is nothing to divide."""
    return None if device == "cpu" or not os.environ.get("LOCAL_RANK") else [int(os.environ["LOCAL_RANK"])]


def cache(folder):
    """Keep compiled programs in `folder`, so that the next start of the same run need not compile."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


# --- processes


def share(dist, text):
    """Rank 0's `text` on all processes."""
    if dist.processes == 1:
        return text
    letters = np.zeros(4096, np.uint8)
    if dist.main:
        letters[: len(text.encode())] = np.frombuffer(text.encode(), np.uint8)
    letters = multihost_utils.broadcast_one_to_all(letters)
    return bytes(np.asarray(letters)).rstrip(b"\0").decode()


def any_of(dist, asked):
    """True on all processes if it is on one."""
    return (
        bool(asked) if dist.processes == 1 else bool(np.any(multihost_utils.process_allgather(np.array(bool(asked)))))
    )


# --- arrays


def spread(dist, tree, by_env=False):
    """A pytree of arrays on all devices of the mesh: whole on each, or divided along the first axis.

    Every process holds the same arrays and gives its devices their parts; device_put would compare them all first.
    """
    sharding = NamedSharding(dist.mesh, PartitionSpec("env") if by_env else PartitionSpec())

    def put(x):
        host = np.asarray(jnp.asarray(x))
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def place(dist, state):
    """The training state on the mesh: what belongs to environments divided, the rest whole on each device."""
    return {name: spread(dist, value, name in BY_ENV) for name, value in state.items()}


def program(dist, iteration, state):
    """`iteration` jitted: it uses up the state that it is given and leaves the new one where the old one was."""
    shardings = {name: jax.tree.map(lambda x: x.sharding, value) for name, value in state.items()}
    whole = NamedSharding(dist.mesh, PartitionSpec())
    return jax.jit(iteration, donate_argnums=0, out_shardings=(shardings, whole))


def collect(dist, tree):
    """A pytree of arrays as numpy arrays on every process."""
    if dist.processes > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


@contextlib.contextmanager
def waiting(say, what, every=20):
    """Say what takes long, every `every` seconds how long it has taken, and at the end the time if it was above 1 s."""
    start, done = time.monotonic(), threading.Event()

    def tell():
        while not done.wait(every):
            say(f"{what}: {time.monotonic() - start:.0f} s so far")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if time.monotonic() - start > 1:
        say(f"{what}: {time.monotonic() - start:.0f} s")
