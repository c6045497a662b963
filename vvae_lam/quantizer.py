"""The codebook of latent actions: off during a warm-up, then set by k-means, tracked by EMA, with dead codes restarted.

The order matters more than the quantizer. Before the decoder uses the vectors, the encoder's output holds nothing to
cluster, and codes made of it stay dead. So vectors pass unchanged (quantization warm-up) until train.py has measured
that shuffled vectors hurt; then k-means makes the codes.

Vectors are normalised per code position by tracked statistics. The commitment loss pulls vectors to their codes, and
the codes follow the vectors: where the prediction error pulls weakly (real video) both would shrink to a point.

Letters: S code positions, K codes in the codebook of a position, D width of a code.
"""

import torch
import torch.nn.functional as F
from torch import nn

DECAY = 0.98  # of the moving averages, per optimizer step
RESTART_AFTER = 20  # steps without use until a code counts as dead


def kmeans(x, K, generator, trials=5, rounds=30):
    """K centres (K, D) of x (n, D), n >= 1: Lloyd's algorithm from k-means++ starts, the best of `trials`."""
    best_error, best = float("inf"), None
    for _ in range(trials):
        centres = x[torch.randint(len(x), (1,), generator=generator).to(x.device)]
        distance = torch.cdist(x, centres)[:, 0].square()
        for _ in range(K - 1):
            row = torch.multinomial((distance + 1e-12).cpu(), 1, generator=generator).to(x.device)
            centres = torch.cat([centres, x[row]])
            distance = torch.minimum(distance, torch.cdist(x, x[row])[:, 0].square())
        for _ in range(rounds):
            index = torch.cdist(x, centres).argmin(1)
            counts = torch.bincount(index, minlength=K)[:, None]
            sums = torch.zeros_like(centres).index_add_(0, index, x)
            centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        error = torch.cdist(x, centres).amin(1).square().sum().item()
        if error < best_error:
            best_error, best = error, centres
    return best


class VectorQuantizer(nn.Module):
    """Nearest code with a straight-through gradient (van den Oord et al. 2017, section 3.2; EMA: appendix A.1).

    Each code position has a codebook of its own. Everything is float32, whatever autocast says. In training, forward()
    adds to sums of fixed size; ema_update() uses them, once per optimizer step. Without ema_update the codes stay.
    quantizing: False while vectors pass unchanged.
    """

    def __init__(self, num_embeddings, num_codes, dim):
        super().__init__()
        S, K, D = num_codes, num_embeddings, dim
        self.register_buffer("codebook", torch.zeros(S, K, D))  # in the decoder's units
        self.register_buffer("mean", torch.zeros(S, D))  # of the encoder's vectors, tracked
        self.register_buffer("std", torch.ones(S, 1))
        self.register_buffer("offset", torch.zeros(S, D))  # the same when quantization began: the decoder's units
        self.register_buffer("scale", torch.ones(S, 1))
        self.register_buffer("cluster_size", torch.ones(S, K))  # moving average of vectors per code and step
        self.register_buffer("idle", torch.zeros(S, K, dtype=torch.int64))  # steps since a code was last used
        sums = dict(counts=(S, K), vectors=(S, K, D), moment1=(S, D), moment2=(S, D))
        for name, shape in sums.items():
            self.register_buffer(f"sum_{name}", torch.zeros(shape), persistent=False)
        self.quantizing, self.age = False, 0

    def get_extra_state(self):
        return dict(quantizing=self.quantizing, age=self.age)

    def set_extra_state(self, state):
        self.quantizing, self.age = bool(state["quantizing"]), int(state["age"])

    def align(self, z):
        """Vectors (..., S, D) of the encoder, in the units that the decoder got when quantization began."""
        return (z - self.mean) * (self.scale / self.std) + self.offset

    def nearest(self, z):
        """Vectors (..., S, D) -> codes (..., S) int64."""
        z = self.align(z.detach().float())
        exact = "donot_use_mm_for_euclid_dist"  # so that a code does not depend on the batch around it
        distance = torch.cdist(z.flatten(0, -3).transpose(0, 1), self.codebook, compute_mode=exact)  # S n K
        return distance.argmin(2).T.reshape(z.shape[:-1])

    def lookup(self, codes):
        """Codes (..., S) -> vectors (..., S, D), as the decoder gets them."""
        return self.codebook[torch.arange(codes.shape[-1], device=codes.device), codes]

    def forward(self, z):
        """Vectors (..., S, D) -> (vectors for the decoder, codes (..., S) int64 or None, commitment loss)."""
        if not self.quantizing:
            return z, None, z.new_zeros(())
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            codes = self.nearest(z)
            if self.training:
                self.remember(z.detach(), codes)
            z, chosen = self.align(z), self.lookup(codes)
            return z + (chosen - z).detach(), codes, F.mse_loss(z, chosen)

    @torch.compiler.disable
    def remember(self, z, codes):
        """Add the vectors of a micro-batch to the sums of this step."""
        z, codes = z.flatten(0, -3), codes.flatten(0, -2)  # n S D, n S
        chosen = F.one_hot(codes, self.codebook.shape[1]).to(z.dtype)  # n S K
        self.sum_counts += chosen.sum(0)
        self.sum_vectors += torch.einsum("n s k, n s d -> s k d", chosen, self.align(z))
        self.sum_moment1 += z.sum(0)
        self.sum_moment2 += z.square().sum(0)

    @torch.no_grad()
    def init_codebook(self, vectors, seed):
        """Set the codes by k-means of `vectors` (n, S, D), the same on every rank, and quantize from now on."""
        vectors = vectors.float()
        self.mean.copy_(vectors.mean(0))
        self.std.copy_((vectors - self.mean).square().mean((0, 2)).sqrt().clamp(min=1e-6)[:, None])
        self.offset.copy_(self.mean)
        self.scale.copy_(self.std)
        generator = torch.Generator().manual_seed(seed)
        for position, rows in enumerate(vectors.transpose(0, 1)):
            self.codebook[position] = kmeans(rows, self.codebook.shape[1], generator)
        if torch.distributed.is_initialized():  # a GPU adds in no fixed order: one rank's choice among equal trials
            torch.distributed.broadcast(self.codebook, 0)
        self.idle.zero_()
        self.quantizing, self.age = True, 0

    @torch.no_grad()
    def ema_update(self, seed=0):
        """Once per optimizer step, on every rank: move codes and statistics to the step's vectors, restart dead codes.

        Returns {codebook_usage: share of the codes that the step used, restarts: codes that moved}. A step whose
        vectors are not finite changes nothing.
        """
        if not self.quantizing:
            return {}
        sums = [self.sum_counts, self.sum_vectors, self.sum_moment1, self.sum_moment2]
        total = torch.cat([part.flatten() for part in sums])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        parts = total.split([part.numel() for part in sums])
        counts, vectors, moment1, moment2 = (part.view_as(like) for part, like in zip(parts, sums, strict=True))
        for part in sums:
            part.zero_()
        n = counts[0].sum()
        self.age += 1
        if not (total.isfinite().all() and n > 0):
            return {}
        if self.age == 1:
            self.cluster_size.copy_(counts.mean(1, keepdim=True).expand_as(counts))
        self.cluster_size.lerp_(counts, 1 - DECAY)
        share = (1 - DECAY) * counts / self.cluster_size.clamp(min=1e-6)
        self.codebook += share[..., None] * (vectors / counts.clamp(min=1)[..., None] - self.codebook)
        mean = moment1 / n
        std = (moment2 / n - mean.square()).mean(1, keepdim=True).clamp(min=1e-12).sqrt()
        self.mean.lerp_(mean, 1 - DECAY)
        self.std.lerp_(std, 1 - DECAY)
        self.idle = torch.where(counts > 0, 0, self.idle + 1)
        return dict(codebook_usage=(counts > 0).float().mean(), restarts=self.restart_dead_codes(seed))

    def restart_dead_codes(self, seed):
        """Split the most used codes: each gives half of its vectors to a dead one, as in the LBG algorithm (1980)."""
        dead = (self.idle >= RESTART_AFTER).nonzero().tolist()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + self.age)
        for position, code in dead:
            sizes = self.cluster_size[position]
            big = int(sizes.argmax())
            away = torch.randn(self.codebook.shape[2], generator=generator).to(sizes.device)
            away *= 0.1 * self.scale[position] * len(away) ** 0.5 / away.norm()  # a tenth of the vectors' deviation
            self.codebook[position, code] = self.codebook[position, big] + away
            self.codebook[position, big] -= away
            sizes[code] = sizes[big] = sizes[big] / 2
            self.idle[position, code] = 0
        return len(dead)
