"""The codebook of latent actions: one for all slots, continuous at first, then k-means and restarts.

The order matters more than the quantiser. Before the decoder uses the code, the encoder's output says nothing, and
codes made of it stay dead whatever restarts them. So vectors pass unchanged until train.py has measured that foreign
vectors hurt; then k-means makes the codes; after that a code that nothing chooses moves to where vectors are.

Codes live among vectors that are centred and scaled slot by slot. Without that the slots' own means are what k-means
finds, every slot sits on a code or two of its own, and what happens in the video is lost. The mean and spread are
tracked: the losses pull vectors towards codes and codes towards vectors, and where the error of the prediction pulls
weakly (real video) both would shrink to a point together.
"""

import torch
import torch.nn.functional as F
from torch import nn


def gather(x):
    """Rows of all ranks in rank order; x itself without a process group."""
    if not torch.distributed.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@torch.compiler.disable
def total(x):
    """The sum of x over all ranks, in place; x itself without a process group."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


def far_rows(x, centres, count, generator):
    """`count` rows of x (n, D), drawn one by one, likelier the further from all centres (k-means++)."""
    for _ in range(count):
        away = torch.cdist(x, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, x[torch.multinomial(away, 1, generator=generator)]])
    return centres[-count:]


def kmeans(x, K, generator, trials=5, rounds=30):
    """K centres (K, D) of x (n, D): Lloyd's algorithm from k-means++ starts, the best of `trials`."""
    best_error, best = float("inf"), None
    for _ in range(trials):
        first = x[torch.randint(len(x), (1,), generator=generator)]
        centres = torch.cat([first, far_rows(x, first, K - 1, generator)])
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
    """Nearest of K codes with a straight-through gradient (van den Oord et al. 2017, equation 3), S slots a time.

    started: False while vectors pass unchanged. mean, spread: of each slot's vectors, tracked. offset, scale: the same
    when the codes began, which is how the decoder goes on to see them. Everything is float32, whatever autocast says.
    Letters: S slots, K codes, D width of a code.
    """

    def __init__(self, num_embeddings, num_codes, dim, restart_every=20):
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(num_embeddings, dim).uniform_(-1, 1) / num_embeddings)  # K D
        for name in ("mean", "offset"):
            self.register_buffer(name, torch.zeros(num_codes, dim))
        for name in ("spread", "scale"):
            self.register_buffer(name, torch.ones(num_codes, 1))
        self.register_buffer("used", torch.zeros(num_embeddings, dtype=torch.int64))  # since the last restart
        self.restart_every, self.started, self.age, self.pending = restart_every, False, 0, []

    def get_extra_state(self):
        return dict(started=self.started, age=self.age)

    def set_extra_state(self, state):
        self.started, self.age = state["started"], state["age"]

    def nearest(self, z):
        """Vectors (..., S, D) -> codes (..., S) int64."""
        z = (z.detach().float() - self.mean) / self.spread
        exact = "donot_use_mm_for_euclid_dist"  # so that a code does not depend on the batch around it
        return torch.cdist(z.flatten(0, -2), self.codebook.detach(), compute_mode=exact).argmin(1).view(z.shape[:-1])

    def lookup(self, codes):
        """Codes (..., S) -> vectors (..., S, D), as the decoder gets them."""
        return self.codebook[codes] * self.scale + self.offset

    @torch.compiler.disable
    def remember(self, z):
        self.pending.append(z.detach())

    def forward(self, z):
        """Vectors (..., S, D) -> (vectors for the decoder, codes (..., S) int64, codebook loss, commitment loss)."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            codes = self.nearest(z)
            if self.training:
                self.remember(z)
            if not self.started:
                nothing = 0 * self.codebook.sum()  # DDP wants a gradient of every parameter, if only zero
                return z, codes, nothing, nothing.detach()
            z = (z - self.mean) / self.spread * self.scale + self.offset
            chosen = self.lookup(codes)
            codebook, commitment = F.mse_loss(chosen, z.detach()), F.mse_loss(z, chosen.detach())
            return z + (chosen - z).detach(), codes, codebook, commitment

    @torch.no_grad()
    def start(self, vectors, seed):
        """Make the first codes of `vectors` (n, S, D), the same on every rank, and quantise from now on."""
        self.mean.copy_(vectors.mean(0))
        self.spread.copy_((vectors - self.mean).square().mean((0, 2)).sqrt().clamp(min=1e-6)[:, None])
        self.offset.copy_(self.mean)
        self.scale.copy_(self.spread)
        flat = ((vectors - self.mean) / self.spread).flatten(0, 1).cpu()
        self.codebook.copy_(kmeans(flat, len(self.codebook), torch.Generator().manual_seed(seed)))
        self.started, self.age = True, 0
        self.used.zero_()

    @torch.no_grad()
    def update(self, opt, seed, momentum=0.02):
        """After each optimizer step, on every rank: track mean and spread, count the codes; move those of no use.

        A code without use for `restart_every` steps moves to a vector of the step's batch far from all codes and loses
        its moments in the optimizer. Returns how many moved.
        """
        vectors, self.pending = self.pending, []
        if not self.started:
            return 0
        z = torch.cat([part.flatten(0, -3) for part in vectors])  # n S D
        used = total(torch.bincount(self.nearest(z).flatten(), minlength=len(self.codebook)))
        moments = gather(torch.stack([z.mean(0), z.square().mean(0)])[None]).mean(0)
        spread = (moments[1] - moments[0].square()).mean(1, keepdim=True).clamp(min=1e-12).sqrt()
        self.mean.lerp_(moments[0], momentum)
        self.spread.lerp_(spread, momentum)
        self.used += used
        self.age += 1
        if self.age % self.restart_every:
            return 0
        dead = torch.nonzero(self.used == 0)[:, 0]
        self.used.zero_()
        if len(dead):
            z = torch.cat([gather(part.flatten(0, -3)) for part in vectors])  # the same order on any number of ranks
            flat = ((z - self.mean) / self.spread).flatten(0, 1).cpu()
            generator = torch.Generator().manual_seed(seed + self.age)
            rows = far_rows(flat, self.codebook.detach().cpu(), len(dead), generator)
            self.codebook[dead] = rows.to(self.codebook.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                if self.codebook in opt.state:
                    opt.state[self.codebook][moment][dead] = 0.0
        return len(dead)
