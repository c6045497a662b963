"""The teacher's intention network and the student: a latent motor skill space with a learned prior (PULSE, Luo 2023).

Student: posterior q(z | reference, proprioception), prior p(z | proprioception), decoder (z, proprioception) -> action
in [-1, 1]. z is Gaussian, or rounded to a few levels per dim (FSQ, Mentzer 2023, as in SONIC, 2511.07820). Layers carry
track-mjx's names, so the teacher's arrays fit as they are and the student's go back.

Letters: B batch (any leading dims), N observation (R reference, then P proprioception), Z latent, K levels, A actions.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from common import DataError

LOGVAR = (-5.0, 2.0)  # PULSE's clamp
QUIET = -5.0  # scale logit of the exported decoder: a standard deviation of softplus(-5) + 0.001 = 0.008
ACTIVE = 0.01  # nats of KL above which a latent dim counts as used


@dataclass
class StudentConfig:
    reference_size: int  # R
    proprioception_size: int  # P
    action_size: int  # A
    latent_dim: int = 32  # Z
    fsq_levels: int = 0  # K; 0: a Gaussian latent
    encoder_hidden_sizes: tuple = (512, 512, 256)
    decoder_hidden_sizes: tuple = (512, 512, 256)
    prior_hidden_sizes: tuple = (512, 256)
    teacher: dict = field(default_factory=dict)  # the teacher's own configuration: walker, timing, rewards


# --- networks, with track-mjx's names


def hidden(x, widths):
    """Dense, SiLU, LayerNorm (after the activation, as in track-mjx) per width; called by the modules below."""
    init = nn.initializers.lecun_uniform()
    for i, width in enumerate(widths):
        x = nn.LayerNorm(name=f"LayerNorm_{i}")(nn.silu(nn.Dense(width, name=f"hidden_{i}", kernel_init=init)(x)))
    return x


class Decoder(nn.Module):
    """B n -> B out, the last layer bare."""

    widths: tuple
    out: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.out, name=f"hidden_{len(self.widths)}")(hidden(x, self.widths))


class Encoder(nn.Module):
    """B n -> one array per head, (name, width) each; a Gaussian has fc2_mean and fc2_logvar."""

    widths: tuple
    heads: tuple

    @nn.compact
    def __call__(self, x):
        x = hidden(x, self.widths)
        return tuple(nn.Dense(width, name=name)(x) for name, width in self.heads)


def gaussian_heads(latent_dim):
    return (("fc2_mean", latent_dim), ("fc2_logvar", latent_dim))


def widths(part):
    """Widths of hidden_0, hidden_1, ... in the parameters of an encoder, prior or decoder."""
    return [part[f"hidden_{i}"]["bias"].shape[0] for i in range(sum(name.startswith("hidden_") for name in part))]


def intention(params, x, reference_size):
    """track-mjx's deterministic policy: normalised x (B N) -> action (B A) in [-1, 1], latent mean (B Z).

    Its encoder sees the reference alone, its decoder [z, proprioception]; half of the output is a scale, unused here.
    """
    encoder, decoder = params["encoder"], params["decoder"]
    heads = gaussian_heads(encoder["fc2_mean"]["bias"].shape[0])
    z, _ = Encoder(tuple(widths(encoder)), heads).apply({"params": encoder}, x[..., :reference_size])
    *inner, last = widths(decoder)
    inputs = jnp.concatenate([z, x[..., reference_size:]], -1)
    out = Decoder(tuple(inner), last).apply({"params": decoder}, inputs)
    return jnp.tanh(out[..., : last // 2]), z


# --- latents


class Normal(NamedTuple):
    """Diagonal Gaussian, posterior or prior: mean and logvar (B Z)."""

    mean: Any
    logvar: Any

    def mode(self):
        return self.mean

    def sample(self, key):
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape)

    def kl(self, prior):
        """KL(self || prior) per dim, in nats: (B Z)."""
        ratio = jnp.exp(self.logvar - prior.logvar) + jnp.square(self.mean - prior.mean) * jnp.exp(-prior.logvar)
        return 0.5 * (ratio - 1 + prior.logvar - self.logvar)


class Codes(NamedTuple):
    """FSQ posterior: one level per dim. value (B Z) in [-1, 1], with a straight-through gradient."""

    value: Any

    def mode(self):
        return self.value

    def sample(self, key):
        return self.value

    def kl(self, prior):
        """-log p of the chosen level per dim, in nats: (B Z). A point's divergence; its gradient reaches the prior."""
        levels = prior.logits.shape[-1]
        index = jnp.round((self.value + 1) * (levels // 2)).astype(int)
        return -jnp.take_along_axis(jax.nn.log_softmax(prior.logits), index[..., None], -1)[..., 0]


class Levels(NamedTuple):
    """FSQ prior: a categorical over the K levels of every dim. logits (B Z K)."""

    logits: Any

    def mode(self):
        return self.logits.argmax(-1) / (self.logits.shape[-1] // 2) - 1.0

    def sample(self, key):
        return jax.random.categorical(key, self.logits) / (self.logits.shape[-1] // 2) - 1.0


def fsq(x, levels):
    """x (B Z), unbounded -> one of `levels` values in [-1, 1], rounded with a straight-through gradient."""
    half_l, offset = (levels - 1) * (1 + 1e-3) / 2, 0.5 * (levels % 2 == 0)
    bounded = jnp.tanh(x + jnp.arctanh(offset / half_l)) * half_l - offset
    return (bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)) / (levels // 2)


# --- the student


class Student:
    """The networks, the frozen observation normaliser, and pure functions of the parameters.

    mean, std: (N,) the teacher's. Parameters: {"encoder", "prior", "decoder"}, nested dicts of arrays.
    """

    def __init__(self, config, mean, std):
        self.config, self.mean, self.std = config, np.asarray(mean, np.float32), np.asarray(std, np.float32)
        z, levels = config.latent_dim, config.fsq_levels
        encoder, prior = (("fc2_mean", z),), (("logits", z * levels),)
        encoder, prior = (encoder, prior) if levels else (gaussian_heads(z), gaussian_heads(z))
        self.encoder = Encoder(tuple(config.encoder_hidden_sizes), encoder)
        self.prior_net = Encoder(tuple(config.prior_hidden_sizes), prior)
        self.decoder = Decoder(tuple(config.decoder_hidden_sizes), config.action_size)

    def init(self, key):
        """Fresh parameters."""
        c, keys = self.config, jax.random.split(key, 3)
        p = c.proprioception_size
        networks = dict(encoder=self.encoder, prior=self.prior_net, decoder=self.decoder)
        sizes = dict(encoder=c.reference_size + p, prior=p, decoder=c.latent_dim + p)
        return {
            name: jax.jit(network.init)(k, jnp.zeros(sizes[name]))["params"]
            for (name, network), k in zip(networks.items(), keys, strict=True)
        }

    def normalize(self, obs):
        return (obs - self.mean) / self.std

    def proprioception(self, obs):
        """The last P of obs (B N), normalised."""
        return self.normalize(obs)[..., self.config.reference_size :]

    def posterior(self, params, obs):
        """q: obs (B N) -> Normal or Codes."""
        out = self.encoder.apply({"params": params["encoder"]}, self.normalize(obs))
        if self.config.fsq_levels:
            return Codes(fsq(out[0], self.config.fsq_levels))
        return Normal(out[0], jnp.clip(out[1], *LOGVAR))

    def prior(self, params, obs):
        """p: obs (B N), of which it sees the proprioception -> Normal or Levels."""
        out = self.prior_net.apply({"params": params["prior"]}, self.proprioception(obs))
        if self.config.fsq_levels:
            return Levels(out[0].reshape(*out[0].shape[:-1], self.config.latent_dim, self.config.fsq_levels))
        return Normal(out[0], jnp.clip(out[1], *LOGVAR))

    def decode(self, params, obs, z):
        """obs (B N), of which it sees the proprioception, and z (B Z) -> actions (B A) in [-1, 1]."""
        inputs = jnp.concatenate([z, self.proprioception(obs)], -1)
        return jnp.tanh(self.decoder.apply({"params": params["decoder"]}, inputs))

    def loss(self, params, batch, key, kl_weight):
        """(loss, metrics) of a batch: obs (B N), action (B A) the teacher's.

        action MSE + kl_weight * KL(q || p), summed over dims. With FSQ the KL is -log p of the codes.
        """
        q, p = self.posterior(params, batch["obs"]), self.prior(params, batch["obs"])
        error = self.decode(params, batch["obs"], q.sample(key)) - batch["action"]
        dims = q.kl(p).mean(tuple(range(batch["obs"].ndim - 1)))  # Z
        mse = jnp.square(error).mean()
        loss = mse + kl_weight * dims.sum()
        metrics = dict(
            action_mse=mse,
            kl=dims.sum(),
            active_dims=(dims > ACTIVE).sum().astype(jnp.float32),
            latent_rms=jnp.sqrt(jnp.square(q.mode()).mean()),
        )
        if not self.config.fsq_levels:
            metrics["posterior_std"] = jnp.exp(0.5 * q.logvar).mean()
        return loss, dict(loss=loss, **metrics)

    # --- files

    def save_pretrained(self, folder, params):
        """config.json and weights.npz (`encoder.hidden_0.kernel`, ..., `mean`, `std`)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=1))
        np.savez(folder / "weights.npz", mean=self.mean, std=self.std, **pack(params))

    @classmethod
    def from_pretrained(cls, folder):
        """(student, params) of a checkpoint folder. Never runs code from the files."""
        student = cls(read_config(folder), 0, 1)
        return student, student.load_pretrained(folder)

    def load_pretrained(self, folder):
        """The parameters of a checkpoint of a student with these sizes and this walker; takes over its normaliser."""
        config, where = read_config(folder), Path(folder) / "weights.npz"
        here, there = comparable(self.config), comparable(config)
        for name, value in here.items():
            if value != there[name]:
                raise DataError(f"{folder}: its {name} is {there[name]}, but this run has {value}")
        like = dict.fromkeys(("mean", "std"), np.zeros(config.reference_size + config.proprioception_size))
        params = unpack({**like, **jax.eval_shape(self.init, jax.random.key(0))}, read_npz(where), where)
        self.mean, self.std = (np.asarray(params.pop(name)) for name in ("mean", "std"))
        return params


def comparable(config):
    """What two students must share for one's weights to serve the other: sizes, and what the numbers mean."""
    out = {name: value for name, value in asdict(config).items() if name != "teacher"}
    walker = config.teacher.get("walker_config", {})
    names = {key: walker.get(key) for key in ("joint_names", "body_names", "end_eff_names")}
    return json.loads(json.dumps({**out, **names}))


def read_config(folder):
    """The StudentConfig of a checkpoint folder."""
    file = Path(folder) / "config.json"
    if not file.exists():
        raise DataError(f"{folder}: holds no config.json; expected a folder such as RUN/checkpoints/best")
    try:
        config = StudentConfig(**json.loads(file.read_text()))
        sizes = [getattr(config, f.name) for f in fields(config) if f.name.endswith(("size", "dim", "levels"))]
        hidden = [*config.encoder_hidden_sizes, *config.decoder_hidden_sizes, *config.prior_hidden_sizes]
        if any(type(size) is not int or not 0 <= size < 10**6 for size in [*sizes, *hidden]):
            raise ValueError("a size is no size")
        if not isinstance(config.teacher.get("walker_config", {}), dict):
            raise ValueError("walker_config is no table")
        return config
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not the configuration of a student ({error})") from None


def pack(tree):
    """A pytree as {"opt.1.mu.encoder.hidden_0.bias": array}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in leaves}


def unpack(like, arrays, where):
    """`arrays` in the structure of the pytree `like`; DataError if names or shapes differ."""
    wanted = {name: value.shape for name, value in pack(like).items()}
    found = {name: value.shape for name, value in arrays.items()}
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise DataError(f"{where}: {name} has shape {found.get(name)}, but this run needs {wanted.get(name)}")
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in wanted])


def unflatten(arrays):
    """{"encoder.hidden_0.kernel": array} -> nested dicts."""
    out = {}
    for name, value in arrays.items():
        *path, last = name.split(".")
        node = out
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return out


def read_npz(path):
    """All arrays of an npz file; DataError for a pickle, a broken or a missing file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = dict(arrays)
        wrong = [name for name, x in found.items() if not isinstance(x, np.ndarray) or x.dtype.kind not in "biuf"]
        if wrong:
            raise ValueError(f"{wrong[0]} is no array of numbers")
        return found
    except Exception as error:  # for a broken file numpy raises tokenize, zip, zlib and syntax errors
        raise DataError(f"{path}: not readable as arrays ({str(error)[:150]})") from None
