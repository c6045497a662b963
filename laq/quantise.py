"""Quantisers of latent actions: VQ with EMA codebooks, NSVQ, FSQ. Each slot has its own codebook.

What keeps codes alive: the vectors are turned to their principal axes, which are dealt to the slots so that no two say
the same (optimised product quantisation, Ge et al. 2013); k-means makes each slot's codes; codes that no pair of any
rank chose move to where vectors are; and now and then all of it is made anew if that fits better. Before `start` a
quantiser hands its input through: a code that the decoder does not use yet holds nothing to cluster. train.py
measures that use and says when.
"""

import torch
import torch.nn.functional as F
from torch import nn

LOOK = 5  # every fifth look for dead codes also looks whether other axes and clusters fit better


def gather(x):
    """Rows of all ranks, in rank order; x itself without a process group."""
    if not torch.distributed.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def rows_of_all(n):
    """(rows that all ranks have together, the slice of this rank's among them), if each has n."""
    ready = torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ready else (0, 1)
    return world * n, slice(rank * n, (rank + 1) * n)


def broadcast(x):
    """Rank 0's x on all ranks."""
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(x, 0)
    return x


def nearest(x, codebooks):
    """x (B, N, D), codebooks (N, K, D) -> index (B, N) of the nearest of the slot's K codes."""
    exact = "donot_use_mm_for_euclid_dist"  # so that a code does not depend on the batch around it
    return torch.cdist(x.transpose(0, 1), codebooks, compute_mode=exact).argmin(2).T


def pick(codebooks, codes):
    """codebooks (N, K, D), codes (..., N) -> their vectors (..., N, D)."""
    return codebooks[torch.arange(len(codebooks), device=codes.device), codes]


def totals(x, codes, K):
    """How often each code was chosen, (N, K), and the sum of the vectors that chose it, (N, K, D)."""
    chosen = F.one_hot(codes, K).to(x.dtype)  # B N K
    return chosen.sum(0), torch.einsum("bnk,bnd->nkd", chosen, x)


def kmeans(x, K, generator, trials=20, rounds=30):
    """K centres (K, D) of x (n, D): Lloyd's rounds from k-means++ starts, the best of `trials` by squared distance."""
    best = None
    for _ in range(trials):
        centres = x[torch.randint(len(x), (1,), generator=generator)]
        while len(centres) < K:
            far = torch.cdist(x, centres).amin(1).square() + 1e-12
            centres = torch.cat([centres, x[torch.multinomial(far, 1, generator=generator)]])
        for _ in range(rounds):
            counts, sums = totals(x[:, None], nearest(x[:, None], centres[None]), K)
            centres = torch.where(counts.T > 0, sums[0] / counts.T.clamp(min=1), centres)
        error = torch.cdist(x, centres).amin(1).square().sum()
        if best is None or error < best[0]:
            best = error, centres
    return best[1]


class Quantiser(nn.Module):
    """What the three share: the continuous start, the turn to principal axes, memory of recent vectors.

    forward(d (B, N, D)) -> (z (B, N, D) for the decoder, codes (B, N) int64, auxiliary loss). Before `start` z is d.
    """

    def __init__(self, codes, vocabulary, dim):
        super().__init__()
        self.codes, self.vocabulary, self.dim = codes, vocabulary, dim
        self.started, self.restarts, self.age, self.filled, self.pending = False, 0, 0, 0, []
        self.register_buffer("recent", torch.zeros(max(512, 32 * vocabulary), codes, dim))
        self.register_buffer("used", torch.zeros(codes, vocabulary))
        self.register_buffer("centre", torch.zeros(codes * dim))
        self.register_buffer("axes", torch.eye(codes * dim))

    def get_extra_state(self):
        return dict(started=self.started, restarts=self.restarts, age=self.age, filled=self.filled)

    def set_extra_state(self, state):
        self.started, self.restarts = state["started"], state["restarts"]
        self.age, self.filled = state["age"], state["filled"]

    def align(self, d):
        """The encoder's vectors (B, N, D) -> the vectors that are quantised: centred and turned."""
        return ((d.flatten(1) - self.centre) @ self.axes).view_as(d)

    def restore(self, v):
        """The inverse of `align`."""
        return (v.flatten(1) @ self.axes.T + self.centre).view_as(v)

    def forward(self, d):
        v = self.align(d)
        if self.training:
            self.keep(v)
        z, codes, loss = self.quantise(v)
        return self.restore(z), codes, loss

    @torch.compiler.disable
    def keep(self, v):
        self.pending.append(v.detach())

    @torch.no_grad()
    def start(self, seed):
        """Make the first codes from the recent vectors. Every rank calls it, at the same step; rank 0 decides."""
        self.started = True
        self.turn()
        self.begin(self.cluster(torch.Generator().manual_seed(seed)))

    def turn(self):
        """Principal axes of the recent vectors; axis i goes to slot i mod N, the strongest first."""
        vectors = self.restore(self.recent)
        flat = vectors[len(vectors) - self.filled :].flatten(1).double()
        self.centre.copy_(flat.mean(0))
        spread = flat - flat.mean(0)
        axes = torch.linalg.eigh(spread.T @ spread).eigenvectors.flip(1)
        order = torch.arange(axes.shape[1]).view(self.dim, self.codes).T.flatten()
        self.axes.copy_(axes[:, order.to(axes.device)])
        broadcast(self.centre)
        broadcast(self.axes)
        self.recent.copy_(self.align(vectors))

    def cluster(self, generator):
        """k-means of the recent vectors of each slot, (N, K, D)."""
        recent = self.recent[len(self.recent) - self.filled :].cpu()
        centres = torch.stack([kmeans(slot, self.vocabulary, generator) for slot in recent.unbind(1)])
        return broadcast(centres.to(self.recent.device))

    def error(self, codebook):
        recent = self.recent[len(self.recent) - self.filled :]
        return (pick(codebook, nearest(recent, codebook)) - recent).square().sum()

    def look(self, generator):
        """Turn and cluster anew, if that lowers the error of the recent vectors by a tenth; returns whether it did.

        One code may hold two clusters while another cluster has two codes, or two slots may say the same: no code is
        dead then, and none would ever move.
        """
        old, before = self.error(self.codebook), [x.clone() for x in (self.centre, self.axes, self.recent)]
        self.turn()
        codebook = self.cluster(generator)
        if self.error(codebook) < 0.9 * old:
            self.restarts += codebook[..., 0].numel()
            self.begin(codebook)
            return True
        for x, was in zip((self.centre, self.axes, self.recent), before, strict=True):
            x.copy_(was)
        return False

    @torch.no_grad()
    def update(self, opt, seed, restart_every):
        """After the optimizer's step: learn from the vectors of all ranks; the codes stay the same on all of them."""
        v = torch.cat([gather(part) for part in self.pending])  # the same order on any number of ranks
        self.pending = []
        v = v[v.isfinite().all(2).all(1)]  # the step that made these was skipped
        if not len(v):
            return
        fresh = v[-len(self.recent) :]
        self.recent.copy_(torch.cat([self.recent, fresh])[len(fresh) :])
        self.filled = min(self.filled + len(fresh), len(self.recent))
        self.age += 1
        if self.started:
            self.learn(v, opt, torch.Generator().manual_seed(seed), restart_every)

    def learn(self, v, opt, generator, restart_every):
        """Move the codes after vectors v (B, N, D) of all ranks; a fixed grid stays."""

    def dead(self, counts, restart_every, generator):
        """(slot, code, vector) of codes that no pair chose in the last restart_every steps: a recent vector each."""
        self.used += counts
        if self.age % restart_every:
            return []
        found = torch.nonzero(self.used == 0).tolist()
        self.used.zero_()
        self.restarts += len(found)
        rows = torch.randint(len(self.recent) - self.filled, len(self.recent), (len(found),), generator=generator)
        return [(slot, code, self.recent[row, slot]) for (slot, code), row in zip(found, rows.tolist(), strict=True)]


class VQ(Quantiser):
    """Nearest of K codes, straight-through; codes follow their vectors by an exponential moving average.

    Oord et al. 2017, appendix A.1: loss commitment * ||d - sg(z)||^2.
    """

    def __init__(self, codes, vocabulary, dim, commitment=0.25, decay=0.98):
        super().__init__(codes, vocabulary, dim)
        self.commitment, self.decay = commitment, decay
        self.register_buffer("codebook", torch.randn(codes, vocabulary, dim))
        self.register_buffer("counts", torch.ones(codes, vocabulary))
        self.register_buffer("sums", torch.zeros(codes, vocabulary, dim))

    def lookup(self, codes):
        """Codes (..., N) -> vectors (..., N, D), as `align` gives them."""
        return pick(self.codebook, codes)

    def quantise(self, v):
        codes = nearest(v.detach(), self.codebook)
        if not self.started:
            return v, codes, v.new_zeros(())
        z = self.lookup(codes)
        return v + (z - v).detach(), codes, self.commitment * F.mse_loss(v, z)

    def begin(self, centres):
        self.codebook.copy_(centres)
        self.counts.fill_(1 / self.vocabulary)
        self.sums.copy_(centres / self.vocabulary)
        self.used.zero_()

    def learn(self, v, opt, generator, restart_every):
        if self.age % (LOOK * restart_every) == 0 and self.look(generator):
            return
        counts, sums = totals(v, nearest(v, self.codebook), self.vocabulary)
        self.counts.lerp_(counts / len(v), 1 - self.decay)
        self.sums.lerp_(sums / len(v), 1 - self.decay)
        self.codebook.copy_(self.sums / self.counts[..., None].clamp(min=1e-6))
        for slot, code, vector in self.dead(counts, restart_every, generator):
            self.codebook[slot, code] = vector
            self.counts[slot, code] = 1 / self.vocabulary
            self.sums[slot, code] = vector / self.vocabulary


class NSVQ(Quantiser):
    """Noise substitution (Vali & Baeckstroem 2022): in training the quantisation error becomes noise of its length.

    The gradient reaches d and, through the length, the codes: no straight-through, no commitment. In evaluation z is
    the code itself. Every rank draws the noise of all (from the same seed) and keeps its rows, so their number changes
    nothing. A restarted code is a recent vector with visible noise, and loses its optimizer moments.
    """

    def __init__(self, codes, vocabulary, dim, noise=0.01):
        super().__init__(codes, vocabulary, dim)
        self.noise = noise
        self.codebook = nn.Parameter(torch.randn(codes, vocabulary, dim))

    def lookup(self, codes):
        return pick(self.codebook, codes)

    def quantise(self, v):
        codes = nearest(v.detach(), self.codebook.detach())
        if not self.started:
            return v, codes, 0 * self.codebook.sum()  # DDP wants a gradient, if only zero
        z = self.lookup(codes)
        if not self.training:
            return z, codes, v.new_zeros(())
        count, here = rows_of_all(len(v))
        noise = torch.randn(count, *v.shape[1:], device=v.device)[here]
        length = (v - z).norm(dim=-1, keepdim=True)
        return v + length * noise / noise.norm(dim=-1, keepdim=True).clamp(min=1e-8), codes, v.new_zeros(())

    def begin(self, centres):
        self.codebook.copy_(centres)
        self.used.zero_()

    def learn(self, v, opt, generator, restart_every):
        moments = opt.state.get(self.codebook, {})
        if self.age % (LOOK * restart_every) == 0 and self.look(generator):
            for name in {"exp_avg", "exp_avg_sq"} & moments.keys():
                moments[name].zero_()
            return
        counts, _ = totals(v, nearest(v, self.codebook), self.vocabulary)
        for slot, code, vector in self.dead(counts, restart_every, generator):
            spread = self.noise * self.recent[:, slot].std()
            self.codebook[slot, code] = vector + spread * torch.randn(vector.shape, generator=generator).to(vector)
            for name in {"exp_avg", "exp_avg_sq"} & moments.keys():
                moments[name][slot, code] = 0.0


class FSQ(Quantiser):
    """Finite scalar quantisation (Mentzer et al. 2023): each of len(levels) dims is bounded and rounded to its levels.

    A fixed grid in [-1, 1]: nothing to learn, to turn or to restart. The vocabulary is the product of the levels.
    """

    def __init__(self, codes, levels):
        vocabulary = 1
        for level in levels:
            vocabulary *= level
        super().__init__(codes, vocabulary, len(levels))
        basis = torch.tensor([1, *levels[:-1]]).cumprod(0)
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)

    def lookup(self, codes):
        return 2 * ((codes[..., None] // self.basis) % self.levels) / (self.levels - 1) - 1

    def quantise(self, v):
        bounded = torch.tanh(v)
        number = ((bounded + 1) / 2 * (self.levels - 1)).round()
        codes = (number.long() * self.basis).sum(-1)
        z = bounded + (self.lookup(codes) - bounded).detach() if self.started else bounded
        return z, codes, v.new_zeros(())

    def start(self, seed):
        self.started = True
