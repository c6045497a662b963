"""The quantizer of latent actions: noise substitution (NSVQ) over codebooks that follow their vectors.

Each code position has a codebook of its own. What keeps codes alive: vectors are rotated to their principal axes, which
are dealt to the positions round-robin (optimised product quantization, Ge et al. 2013), so that no two positions say
the same; k-means initialises the codebooks; an exponential moving average moves them (van den Oord et al. 2017,
appendix A.1); a code that no pair of any rank chose is put where a vector is; and now and then rotation and codebooks
are computed anew and kept if they fit better. Nothing of it touches the optimizer.

Letters: B batch, N code positions, K codes of a position, D width of a vector.
"""

import math

import torch
from einops import rearrange
from torch import nn

DECAY = 0.98  # of the moving average, per optimizer step
CHECK, STEPS = 40, 10  # vectors per code, and updates, at least between two checks for dead codes
RECLUSTER = 5  # every so many checks rotation and codebooks are computed anew
LIMIT = 8192  # vectors at most that a rank keeps for one update, and that k-means sees


def ranks():
    """(rank, number of ranks)."""
    dist = torch.distributed
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def all_gather(x):
    """The rows of all ranks, rank after rank. Every rank has as many."""
    if ranks()[1] == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(ranks()[1])]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def broadcast(x):
    """Rank 0's tensor on all ranks."""
    if ranks()[1] > 1:
        torch.distributed.broadcast(x, 0)
    return x


def nearest(x, codebook):
    """x (B N D), codebook (N K D) -> index (B N) of the nearest of each position's K codes."""
    exact = "donot_use_mm_for_euclid_dist"  # so that a code does not depend on the batch around it
    return torch.cdist(x.transpose(0, 1), codebook, compute_mode=exact).argmin(2).T


def pick(codebook, codes):
    """codebook (N K D), codes (... N) -> their vectors (... N D)."""
    return codebook[torch.arange(len(codebook), device=codes.device), codes]


def totals(x, codes, K):
    """How often each code was chosen (N K), and the sum of the vectors that chose it (N K D)."""
    N, D = x.shape[1:]
    place = (codes + K * torch.arange(N, device=codes.device)).flatten()
    counts = torch.bincount(place, minlength=N * K).to(x.dtype).view(N, K)
    return counts, x.new_zeros(N * K, D).index_add_(0, place, x.flatten(0, 1)).view(N, K, D)


def kmeans(x, K, generator, trials=4, rounds=15):
    """The best of `trials` runs of Lloyd's algorithm from k-means++ starts: centres (K D) of x (n D)."""
    best = None
    for _ in range(trials):
        first = torch.randint(len(x), (1,), generator=generator).item()
        centres, far = x[first][None], (x - x[first]).square().sum(1)
        while len(centres) < K:
            chosen = torch.multinomial((far + 1e-12).cpu(), 1, generator=generator).item()
            centres = torch.cat([centres, x[chosen][None]])
            far = torch.minimum(far, (x - x[chosen]).square().sum(1))
        for _ in range(rounds):
            counts, sums = totals(x[:, None], torch.cdist(x, centres).argmin(1)[:, None], K)
            centres = torch.where(counts.T > 0, sums[0] / counts.T.clamp(min=1), centres)
        error = torch.cdist(x, centres).amin(1).square().sum().item()
        if best is None or error < best[0]:
            best = error, centres
    return best[1]


class Quantizer(nn.Module):
    """NSVQ (Vali & Baeckstroem 2022): in training the quantization error becomes noise of the same length.

    forward(d (B N D)) -> z (B N D) for the decoder, codes (B N) int64. In evaluation z is the code's own vector. Before
    `start` z is d: a code that the decoder does not use yet holds nothing to cluster. Call `update` after each
    optimizer step; without it the codebooks just stay. All of it is float32, under autocast too, and the same on all
    ranks: each draws the noise of the whole batch (from the same seed) and keeps its rows.
    """

    def __init__(self, code_seq_len, codebook_size, code_dim):
        super().__init__()
        N, K, D = self.shape = code_seq_len, codebook_size, code_dim
        self.quantizing, self.restarts, self.checks, self.filled = False, 0, 0, 0
        self.seen, self.age = 0, 0  # vectors and updates since the last check for dead codes
        self.fresh = None  # vectors of this rank since the last update, LIMIT rows at most
        self.register_buffer("codebook", torch.zeros(N, K, D))
        self.register_buffer("counts", torch.ones(N, K))
        self.register_buffer("sums", torch.zeros(N, K, D))
        self.register_buffer("used", torch.zeros(N, K))
        self.register_buffer("recent", torch.zeros(min(LIMIT, max(512, 32 * K)), N, D))
        self.register_buffer("center", torch.zeros(N * D))
        self.register_buffer("rotation", torch.eye(N * D))

    def get_extra_state(self):
        return {name: getattr(self, name) for name in ("quantizing", "restarts", "checks", "filled", "seen", "age")}

    def set_extra_state(self, state):
        for name, value in state.items():
            setattr(self, name, value)

    # --- vectors and codes

    def rotate(self, d):
        """The encoder's vectors (B N D), centred and rotated to their principal axes."""
        return ((d.float().flatten(1) - self.center) @ self.rotation).view(d.shape)

    def restore(self, v):
        """The inverse of `rotate`."""
        return (v.flatten(1) @ self.rotation.T + self.center).view(v.shape)

    def forward(self, d):
        with torch.autocast(d.device.type, enabled=False):
            v = self.rotate(d)
            if self.training:
                self.remember(v.detach())
            codes = nearest(v.detach(), self.codebook)
            if not self.quantizing:
                return d.float(), codes
            z = pick(self.codebook, codes)
            if self.training:
                rank, world = ranks()
                noise = torch.randn(world * len(v), *v.shape[1:], device=v.device)[rank * len(v) :][: len(v)]
                length = (v - z).norm(dim=-1, keepdim=True)
                z = v + length * noise / noise.norm(dim=-1, keepdim=True).clamp(min=1e-8)
            return self.restore(z), codes

    @torch.no_grad()
    def encode(self, d):
        """d (B N D) -> codes (B N), the rotated vectors (B N D) before quantization."""
        with torch.autocast(d.device.type, enabled=False):
            v = self.rotate(d)
            return nearest(v, self.codebook), v

    @torch.no_grad()
    def lookup(self, codes):
        """codes (B N) -> z (B N D) for the decoder."""
        with torch.autocast(codes.device.type, enabled=False):
            return self.restore(pick(self.codebook, codes))

    # --- codebooks

    @torch.compiler.disable
    def remember(self, v):
        """Keep the vectors of a micro-batch for `update`."""
        self.fresh = v if self.fresh is None else torch.cat([self.fresh, v])[-LIMIT:]

    @torch.no_grad()
    def update(self, seed, accum=1):
        """After the optimizer's step: move the codebooks after the vectors of all ranks and of `accum` micro-steps."""
        if self.fresh is None:
            return
        with torch.autocast(self.recent.device.type, enabled=False):
            micro, v, self.fresh = accum if len(self.fresh) % accum == 0 else 1, all_gather(self.fresh), None
            # the order of the global batch, on any number of ranks and micro-steps
            v = rearrange(v, "(rank micro b) n d -> (micro rank b) n d", rank=ranks()[1], micro=micro)
            v = v[v.isfinite().all(2).all(1)]  # a step that is not finite was skipped
            latest = v[-len(self.recent) :]
            self.recent.copy_(torch.cat([self.recent, latest])[len(latest) :])
            self.filled = min(self.filled + len(latest), len(self.recent))
            if self.quantizing and len(v):
                self.ema_update(v, torch.Generator().manual_seed(seed))

    def known(self):
        """The recent vectors (n N D), oldest first."""
        return self.recent[len(self.recent) - self.filled :]

    @torch.no_grad()
    def start(self, seed):
        """Initialise rotation and codebooks from the recent vectors. Every rank calls it, at the same step."""
        self.quantizing = True
        self.fit_rotation()
        self.set_codebook(self.cluster(torch.Generator().manual_seed(seed)))

    def fit_rotation(self):
        """Principal axes of the recent vectors; axis i goes to position i mod N, the strongest first."""
        N, _, D = self.shape
        vectors = self.restore(self.recent)
        flat = vectors[len(vectors) - self.filled :].flatten(1).cpu().double()  # mps has no float64
        spread = flat - flat.mean(0)
        axes = torch.linalg.eigh(spread.T @ spread).eigenvectors.flip(1)
        order = torch.arange(N * D).view(D, N).T.flatten()
        self.center.copy_(flat.mean(0))
        self.rotation.copy_(axes[:, order])
        broadcast(self.center)
        broadcast(self.rotation)
        self.recent.copy_(self.rotate(vectors))

    def cluster(self, generator):
        """k-means of each position's recent vectors, (N K D)."""
        return broadcast(torch.stack([kmeans(v, self.shape[1], generator) for v in self.known().unbind(1)]))

    def set_codebook(self, codebook):
        self.codebook.copy_(codebook)
        self.counts.fill_(1 / self.shape[1])
        self.sums.copy_(codebook / self.shape[1])
        self.used.zero_()

    def ema_update(self, v, generator):
        """Codebooks follow the vectors v (B N D) of all ranks; from time to time dead codes are restarted."""
        K = self.shape[1]
        counts, sums = totals(v, nearest(v, self.codebook), K)
        self.counts.lerp_(counts / len(v), 1 - DECAY)
        self.sums.lerp_(sums / len(v), 1 - DECAY)
        self.codebook.copy_(self.sums / self.counts[..., None].clamp(min=1e-6))
        self.used += counts
        self.seen, self.age = self.seen + len(v), self.age + 1
        if self.seen < CHECK * K or self.age < STEPS:
            return
        self.seen, self.age, self.checks = 0, 0, self.checks + 1
        if self.checks % RECLUSTER or not self.recluster(generator):
            self.restart_dead_codes(generator)
        self.used.zero_()

    def restart_dead_codes(self, generator):
        """Put each code that no pair chose since the last check where a recent vector is."""
        K, found = self.shape[1], torch.nonzero(self.used == 0).tolist()
        order = torch.randperm(self.filled, generator=generator)  # each vector once: no two codes are alike
        rows = order[torch.arange(len(found)) % self.filled].tolist()
        for (position, code), row in zip(found, rows, strict=True):
            vector = self.known()[row, position]
            self.codebook[position, code] = vector
            self.counts[position, code] = 1 / K
            self.sums[position, code] = vector / K
        self.restarts += len(found)

    def recluster(self, generator):
        """Rotation and codebooks anew, kept if they lower the error of the recent vectors by a tenth: returns whether.

        One code may hold two clusters while two codes share another, or two positions may say the same: no code is dead
        then, and none would ever move.
        """

        def error(codebook):
            return (pick(codebook, nearest(self.known(), codebook)) - self.known()).square().sum().item()

        old, before = error(self.codebook), [x.clone() for x in (self.center, self.rotation, self.recent)]
        self.fit_rotation()
        codebook = self.cluster(generator)
        if error(codebook) < 0.9 * old:
            self.restarts += math.prod(self.shape[:2])
            self.set_codebook(codebook)
            return True
        for x, was in zip((self.center, self.rotation, self.recent), before, strict=True):
            x.copy_(was)
        return False
