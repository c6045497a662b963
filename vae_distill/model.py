"""The teacher's intention network and the student: a latent motor skill space with a learned prior (PULSE, Luo 2023).

Student: encoder q(z | reference, proprioception), prior p(z | proprioception), decoder (z, proprioception) -> action in
[-1, 1]. All layers carry track-mjx's names, so the teacher's arrays fit as they are and the student's go back.

Letters: B batch (any leading dims), N observation (R reference, then P proprioception), Z latent, A actions.
"""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

LOGVAR = (-5.0, 2.0)  # PULSE's clamp
QUIET = -5.0  # scale logit of the exported decoder: a standard deviation of softplus(-5) + 0.001 = 0.008
ACTIVE = 0.01  # nats of KL above which a latent dim counts as used


def hidden(x, widths):
    """Dense, SiLU, LayerNorm (after the activation, as in track-mjx) per width; called by the modules below."""
    init = nn.initializers.lecun_uniform()
    for i, width in enumerate(widths):
        x = nn.LayerNorm(name=f"LayerNorm_{i}")(nn.silu(nn.Dense(width, name=f"hidden_{i}", kernel_init=init)(x)))
    return x


class Decoder(nn.Module):
    """B n -> B last, the last layer bare."""

    widths: tuple
    last: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.last, name=f"hidden_{len(self.widths)}")(hidden(x, self.widths))


class Gaussian(nn.Module):
    """B n -> mean and log-variance (B Z each) of a diagonal Gaussian."""

    widths: tuple
    latent: int

    @nn.compact
    def __call__(self, x):
        x = hidden(x, self.widths)
        return nn.Dense(self.latent, name="fc2_mean")(x), nn.Dense(self.latent, name="fc2_logvar")(x)


def widths(part):
    """Widths of hidden_0, hidden_1, ... in the parameters of an encoder, prior or decoder."""
    return [part[f"hidden_{i}"]["bias"].shape[0] for i in range(sum(name.startswith("hidden_") for name in part))]


def intention(params, x, reference_size):
    """track-mjx's deterministic policy: normalised x (B N) -> action (B A) in [-1, 1], latent mean (B Z).

    Its encoder sees the reference alone, its decoder [z, proprioception]; half of the output is a scale, unused here.
    """
    encoder, decoder = params["encoder"], params["decoder"]
    latent = encoder["fc2_mean"]["bias"].shape[0]
    z, _ = Gaussian(tuple(widths(encoder)), latent).apply({"params": encoder}, x[..., :reference_size])
    *inner, last = widths(decoder)
    inputs = jnp.concatenate([z, x[..., reference_size:]], -1)
    out = Decoder(tuple(inner), last).apply({"params": decoder}, inputs)
    return jnp.tanh(out[..., : last // 2]), z


def kl(mean, logvar, prior_mean, prior_logvar):
    """KL(q || p) of diagonal Gaussians per dim, in nats: (B Z)."""
    ratio = jnp.exp(logvar - prior_logvar) + jnp.square(mean - prior_mean) * jnp.exp(-prior_logvar)
    return 0.5 * (ratio - 1 + prior_logvar - logvar)


class Student:
    """The student's sizes, the frozen observation normaliser, and pure functions of its parameters.

    config: reference_size, action_size, latent, encoder, decoder, prior (widths), teacher (the teacher's
    configuration). mean, std: (N,) the teacher's. Parameters: {"encoder", "prior", "decoder"}, nested dicts of
    arrays.
    """

    def __init__(self, config, mean, std):
        self.config, self.mean, self.std = config, np.asarray(mean, np.float32), np.asarray(std, np.float32)
        self.encoder = Gaussian(tuple(config["encoder"]), config["latent"])
        self.prior = Gaussian(tuple(config["prior"]), config["latent"])
        self.decoder = Decoder(tuple(config["decoder"]), config["action_size"])

    def init(self, key):
        """Fresh parameters, the prior as wide as a standard normal."""
        keys, n = jax.random.split(key, 3), len(self.mean)
        p, z = n - self.config["reference_size"], self.config["latent"]
        inputs = dict(encoder=jnp.zeros(n), prior=jnp.zeros(p), decoder=jnp.zeros(z + p))
        return {
            name: getattr(self, name).init(k, x)["params"] for k, (name, x) in zip(keys, inputs.items(), strict=True)
        }

    def proprioception(self, obs):
        """The last P of obs (B N), normalised."""
        return self.normalise(obs)[..., self.config["reference_size"] :]

    def normalise(self, obs):
        return (obs - self.mean) / self.std

    def encode(self, params, obs):
        """obs (B N) -> mean, logvar (B Z) of q."""
        mean, logvar = self.encoder.apply({"params": params["encoder"]}, self.normalise(obs))
        return mean, jnp.clip(logvar, *LOGVAR)

    def predict(self, params, obs):
        """The prior: obs (B N), of which it sees the proprioception -> mean, logvar (B Z) of p."""
        mean, logvar = self.prior.apply({"params": params["prior"]}, self.proprioception(obs))
        return mean, jnp.clip(logvar, *LOGVAR)

    def decode(self, params, obs, z):
        """obs (B N), of which it sees the proprioception, and z (B Z) -> actions (B A) in [-1, 1]."""
        inputs = jnp.concatenate([z, self.proprioception(obs)], -1)
        return jnp.tanh(self.decoder.apply({"params": params["decoder"]}, inputs))

    def loss(self, params, batch, key, weights, action_loss="mse", detach=False):
        """(loss, metrics) of a batch: obs (B N), action (B A) the teacher's; with the AR term also before (B N), the
        observation one control step earlier, and follows (B), 0 where there is none in this episode.

        weights: kl, unit_kl, ar. action_loss "mse", or "norm": PULSE's mean Euclidean distance. detach: the prior is
        fitted to a frozen encoder (track-mjx 2026), which is then held by unit_kl * KL(q || N(0, I)) alone. The AR term
        is PULSE's mean distance of consecutive latent means, |mu_t - 0.99 mu_(t-1)|.
        """
        mean, logvar = self.encode(params, batch["obs"])
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = self.decode(params, batch["obs"], z) - batch["action"]
        prior_mean, prior_logvar = self.predict(params, batch["obs"])
        fixed = jax.lax.stop_gradient if detach else lambda x: x
        each = kl(fixed(mean), fixed(logvar), prior_mean, prior_logvar)  # B Z
        dims = each.mean(tuple(range(each.ndim - 1)))
        unit = kl(mean, logvar, 0.0, 0.0).sum(-1).mean()
        mse = jnp.square(error).mean()
        distance = jnp.sqrt(jnp.square(error).sum(-1) + 1e-12).mean()
        loss = (mse if action_loss == "mse" else distance) + weights["kl"] * dims.sum() + weights["unit_kl"] * unit
        metrics = dict(
            action_mse=mse,
            kl=dims.sum(),
            active_dims=(dims > ACTIVE).sum().astype(jnp.float32),
            latent_rms=jnp.sqrt(jnp.square(mean).mean()),
            posterior_std=jnp.exp(0.5 * logvar).mean(),
            prior_std=jnp.exp(0.5 * prior_logvar).mean(),
            unit_kl=unit,
        )
        if "before" in batch:
            jump = mean - 0.99 * self.encode(params, batch["before"])[0]
            metrics["ar"] = (jnp.sqrt(jnp.square(jump).sum(-1) + 1e-12) * batch["follows"]).mean()
            loss = loss + weights["ar"] * metrics["ar"]
        return loss, dict(loss=loss, **metrics)

    # --- files

    def as_intention(self, params):
        """(params, mean, std, network_config) of a track-mjx intention policy that acts as this student's mean does.

        It is fed [reference, proprioception, proprioception]: track-mjx's encoder sees the first part, its decoder the
        second, so that the student's encoder, which sees both, fits.
        """
        decoder, last = dict(params["decoder"]), f"hidden_{len(self.config['decoder'])}"
        kernel, bias = (np.asarray(decoder[last][name], np.float32) for name in ("kernel", "bias"))
        wide = dict(kernel=np.concatenate([kernel, 0 * kernel], 1), bias=np.r_[bias, np.full_like(bias, QUIET)])
        own = slice(self.config["reference_size"], None)
        sizes = dict(
            arch_name="intention",
            encoder_layer_sizes=list(self.config["encoder"]),
            decoder_layer_sizes=list(self.config["decoder"]),
            intention_size=self.config["latent"],
            observation_size=len(self.mean) + len(self.mean[own]),
            reference_obs_size=len(self.mean),
            proprioceptive_obs_size=len(self.mean[own]),
            action_size=self.config["action_size"],
            normalize_observations=True,
        )
        params = dict(encoder=params["encoder"], decoder={**decoder, last: wide})
        return params, np.r_[self.mean, self.mean[own]], np.r_[self.std, self.std[own]], sizes

    def save_pretrained(self, folder, params):
        """config.json and weights.npz (`encoder.hidden_0.kernel`, ..., `mean`, `std`)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        np.savez(folder / "weights.npz", mean=self.mean, std=self.std, **flat(params))

    @classmethod
    def from_pretrained(cls, folder):
        """(student, params) of a checkpoint folder. Never runs code from the files."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            arrays = read_npz(folder / "weights.npz")
            student = cls(config, arrays.pop("mean"), arrays.pop("std"))
            jax.eval_shape(student.init, jax.random.key(0))
        except OSError:
            raise
        except Exception as error:  # for sizes that are none flax raises a dozen kinds
            raise ValueError(f"{folder}: config.json and weights.npz are not a student's ({error})") from None
        return student, student.load_pretrained(folder)

    def load_pretrained(self, folder):
        """The parameters of a checkpoint folder, if their names and shapes are this student's."""
        where = Path(folder) / "weights.npz"
        arrays = read_npz(where)
        arrays = {name: value for name, value in arrays.items() if name not in ("mean", "std")}
        wanted = flat(jax.eval_shape(self.init, jax.random.key(0)))
        for name in sorted({*wanted, *arrays}):
            here, there = (x[name].shape if name in x else None for x in (wanted, arrays))
            if here != there:
                raise ValueError(f"{where}: {name} has shape {there}, but this student needs {here}")
        return unflat(arrays)


def flat(tree, prefix=""):
    """Nested dicts -> {"encoder.hidden_0.kernel": array}."""
    out = {}
    for name, value in tree.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def unflat(arrays):
    out = {}
    for name, value in arrays.items():
        *path, last = name.split(".")
        node = out
        for key in path:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(value)
    return out


def read_npz(path):
    """All arrays of an npz file; a pickle or a damaged file is a ValueError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = dict(arrays)
        assert all(isinstance(array, np.ndarray) for array in found.values()), "a member is no array"
        return found
    except OSError:
        raise
    except Exception as error:  # for a damaged file numpy raises tokenize, zip, zlib and syntax errors
        raise ValueError(f"{path}: not readable as arrays ({error})") from None
