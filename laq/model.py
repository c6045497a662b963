"""LAQ: discrete latent actions of frame pairs (LAPA stage 1, arXiv 2410.11758), with the released code's faults mended.

    first, second frame -> spatial blocks -> temporal blocks (causal) -> difference of encodings -> N vectors -> N codes
    first frame + codes -> decoder: the first frame's tokens look at the codes -> second frame

What differs from the publication, because it was needed: patches are embedded by a small convolution, and the second
frame's also see what changed, so that motion of less than a patch is seen at once; tokens are told where they are by
depthwise convolutions alone (PEG) and averaged before the codes, so that a move means the same everywhere.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from quantise import FSQ, NSVQ, VQ, gather, rows_of_all
from torch import nn

MOVED = 0.05  # a pixel that changes by more, of 1, has moved: `motion_weight`


class Stem(nn.Module):
    """Images (B, C, S, S) -> fine features (B, W, 4G, 4G) and one token per patch (B, G^2, D); G = S / patch."""

    def __init__(self, channels, patch, width, dim):
        super().__init__()
        self.fine = patch // 4
        self.first = nn.Conv2d(channels * self.fine**2, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.third = nn.Conv2d(2 * width, dim, 3, stride=2, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(1, width), nn.GroupNorm(1, 2 * width), nn.LayerNorm(dim)])

    def forward(self, images):
        fine = F.gelu(self.norms[0](self.first(F.pixel_unshuffle(images, self.fine))))
        coarse = self.third(F.gelu(self.norms[1](self.second(fine))))
        return fine, self.norms[2](rearrange(coarse, "b d i j -> b (i j) d"))


class Attention(nn.Module):
    """Multi-head attention of x (B T D) over context (B T' D); heads of 64 dims, or of D if that is less."""

    def __init__(self, dim):
        super().__init__()
        self.heads = max(1, dim // 64)
        self.norm = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x, context=None):
        x = self.norm(x)
        q = rearrange(self.q(x), "b t (h d) -> b h t d", h=self.heads)
        k, v = rearrange(
            self.kv(x if context is None else context), "b t (two h d) -> two b h t d", two=2, h=self.heads
        )
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))


class PairAttention(Attention):
    """Each token of the second frame attends to the first frame's token at its place and to itself.

    Causal: the first frame sees nothing of the second, so it is read and never rewritten. Two keys make the softmax a
    sigmoid of the difference of two scores.
    """

    def forward(self, second, first):
        x = self.norm(second)
        q = rearrange(self.q(x), "b t (h d) -> b t h d", h=self.heads)
        before, here = (rearrange(self.kv(y), "b t (two h d) -> two b t h d", two=2, h=self.heads) for y in (first, x))
        score = (q * (here[0] - before[0])).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
        return self.out(before[1].lerp(here[1], score.sigmoid()).flatten(2))


class Place(nn.Module):
    """Position by a depthwise 3 x 3 convolution over one frame's tokens (PEG, arXiv 2102.10882)."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x):
        side = round(x.shape[1] ** 0.5)
        return x + rearrange(self.conv(rearrange(x, "b (i j) d -> b d i j", i=side)), "b d i j -> b (i j) d")


def feed_forward(dim):
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class SpatialBlock(nn.Module):
    """Pre-norm: tokens of one frame look at one another, then (cross=True) at the codes."""

    def __init__(self, dim, cross=False):
        super().__init__()
        self.place, self.attend, self.feed = Place(dim), Attention(dim), feed_forward(dim)
        self.cross = Attention(dim) if cross else None

    def forward(self, x, codes=None):
        x = self.place(x)
        x = x + self.attend(x)
        if self.cross is not None:
            x = x + self.cross(x, codes)
        return x + self.feed(x)


class TemporalBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.place, self.attend, self.feed = Place(dim), PairAttention(dim), feed_forward(dim)

    def forward(self, second, first):
        second = self.place(second)
        second = second + self.attend(second, first)
        return second + self.feed(second)


class Head(nn.Module):
    """Decoder tokens (B, G^2, D), the first frame's fine features and the codes (B, N D) -> change of the image.

    Two convolutions on the fine grid, scaled and shifted by the codes (FiLM, arXiv 1709.07871). The last layer begins
    at zero: the first prediction is "nothing moves".
    """

    def __init__(self, dim, patch, width, code_width):
        super().__init__()
        self.fine = patch // 4
        self.up = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 16 * width))
        self.convs = nn.ModuleList([nn.Conv2d(2 * width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)])
        self.film = nn.Linear(code_width, 4 * width)
        self.out = nn.Conv2d(width, 3 * self.fine**2, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens, fine, codes):
        side = round(tokens.shape[1] ** 0.5)
        up = rearrange(self.up(tokens), "b (i j) (p q w) -> b w (i p) (j q)", i=side, p=4, q=4)
        scale1, shift1, scale2, shift2 = self.film(codes)[..., None, None].chunk(4, 1)
        x = F.gelu(self.convs[0](torch.cat([fine, up], 1)) * (1 + scale1) + shift1)
        x = x + F.gelu(self.convs[1](x) * (1 + scale2) + shift2)
        return F.pixel_shuffle(self.out(x), self.fine)


class LAQ(nn.Module):
    """Latent action quantiser.

    image_size, patch: pixels; the grid has (image_size / patch)^2 tokens. dim: width of a token, stem: of the
    convolutions. spatial_depth, temporal_depth, decoder_depth: blocks. codes: N per transition; vocabulary: K of each;
    code_dim: width of a vector before quantisation. quantiser: vq, nsvq or fsq (`levels`, whose product is the
    vocabulary). motion_weight: w in the loss mean((1 + w [pixel moved]) error^2). action_dim, action_weight: LAOM's
    linear head from the vectors to the robot's move (arXiv 2502.00379), trained on the pairs whose move is known.
    feature_dim: width of a frozen backbone's tokens, if those are the target instead of pixels (UniVLA, 2505.06111);
    pixels are then painted from detached states, for pictures and gauges only.
    """

    def __init__(
        self, image_size=256, patch=32, dim=1024, stem=64, spatial_depth=8, temporal_depth=8, decoder_depth=8, codes=4,
        vocabulary=8, code_dim=32, quantiser="nsvq", levels=(2, 2, 2), commitment=0.25, motion_weight=0.0, action_dim=0,
        action_weight=1.0, feature_dim=0,
    ):  # fmt: skip
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if image_size % patch or patch % 4:
            raise ValueError(f"--image-size {image_size} must be a multiple of --patch {patch}, and that of 4")
        self.image_size, self.patch, self.codes = image_size, patch, codes
        self.motion_weight, self.action_weight = motion_weight, action_weight
        self.quantiser = {
            "vq": lambda: VQ(codes, vocabulary, code_dim, commitment),
            "nsvq": lambda: NSVQ(codes, vocabulary, code_dim),
            "fsq": lambda: FSQ(codes, list(levels)),
        }[quantiser]()
        if self.quantiser.vocabulary != vocabulary:
            raise ValueError(f"--levels: their product is {self.quantiser.vocabulary}, --vocabulary is {vocabulary}")
        code_dim = self.quantiser.dim

        self.stem = Stem(3, patch, stem, dim)
        self.stem_change = Stem(6, patch, stem, dim)
        self.spatial = nn.ModuleList(SpatialBlock(dim) for _ in range(spatial_depth))
        self.temporal = nn.ModuleList(TemporalBlock(dim) for _ in range(temporal_depth))
        self.squeeze = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 128), nn.GELU())
        self.read = nn.Linear(128, codes * code_dim, bias=False)
        self.stem_decoder = Stem(3, patch, stem, dim)
        self.expand = nn.Linear(code_dim, dim)
        self.slot = nn.Parameter(torch.randn(codes, dim) * 0.02)
        self.decoder = nn.ModuleList(SpatialBlock(dim, cross=True) for _ in range(decoder_depth))
        self.head = Head(dim, patch, stem, codes * code_dim)
        self.feature_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, feature_dim)) if feature_dim else None
        self.act = nn.Linear(codes * code_dim, action_dim) if action_dim else None
        if action_dim:
            self.register_buffer("action_mean", torch.zeros(action_dim))
            self.register_buffer("action_std", torch.ones(action_dim))

    # --- encoder

    def see(self, frames):
        """One frame by itself: (B, 3, S, S) in [0, 1] -> tokens (B, G^2, D)."""
        x = self.stem(frames)[1]
        for block in self.spatial:
            x = block(x)
        return x

    def compare(self, first, second, seen_first, seen_second):
        """Two frames (B, 3, S, S), and as `see` gives them -> vectors (B, N, D) before quantisation."""
        x = seen_second + self.stem_change(torch.cat([first, 2 * (second - first)], 1))[1]
        for block in self.temporal:
            x = block(x, seen_first)
        change = self.squeeze(x) - self.squeeze(seen_first)
        return self.read(change.mean(1)).unflatten(1, (self.codes, -1)).float()

    # --- decoder

    def look(self, first, z):
        """First frames and the codes' vectors -> the first frame's fine features, decoder tokens (B, G^2, D)."""
        fine, x = self.stem_decoder(first)
        codes = self.expand(z) + self.slot
        for block in self.decoder:
            x = block(x, codes)
        return fine, x

    def predict(self, first, z):
        """First frames (B, 3, S, S) and the codes' vectors (B, N, D) -> second frames, not clamped."""
        fine, tokens = self.look(first, z)
        return first + self.head(tokens, fine, z.flatten(1)).float()

    # --- training

    def forward(self, batch):
        """frames (B, 2, 3, S, S) in [0, 1] -> (loss, metrics).

        With an action head also actions (B, A) and labelled (B,); with feature targets also features (B, 2, G^2, F).
        """
        first, second = batch["frames"].unbind(1)
        seen = self.see(torch.cat([first, second])).chunk(2)
        d = self.compare(first, second, *seen)
        with torch.autocast(d.device.type, enabled=False):
            z, _, extra = self.quantiser(d)
        fine, tokens = self.look(first, z)
        loss, metrics = extra, dict(commitment=extra)
        if self.feature_head is not None:
            before, after = batch["features"].unbind(1)
            error = (before + self.feature_head(tokens).float() - after).square()
            metrics["features"] = error.mean() / (before - after).square().mean().clamp(min=1e-8)
            loss = loss + error.mean()
            fine, tokens, z = fine.detach(), tokens.detach(), z.detach()
        error = (first + self.head(tokens, fine, z.flatten(1)).float() - second).square()
        weight = 1 + self.motion_weight * ((first - second).abs().amax(1, keepdim=True) > MOVED)
        metrics |= dict(mse=error.mean(), still=(first - second).square().mean())
        loss = loss + (weight * error).mean()
        if self.act is not None:
            want = (batch["actions"] - self.action_mean) / self.action_std
            off = (self.act(d.flatten(1)).float() - want).square().mean(1)
            metrics["action"] = (off * batch["labelled"]).mean()
            loss = loss + self.action_weight * metrics["action"]
        return loss, dict(loss=loss, **metrics)

    @torch.no_grad()
    def reconstruct(self, first, second, shuffle=False):
        """Pairs -> (second frames from the first and the codes, in [0, 1], codes (B, N)). shuffle: a neighbour's codes,
        which may be another rank's: then every rank has to call this.

        Continuous before the codes start, as in training.
        """
        d = self.compare(first, second, self.see(first), self.see(second))
        if shuffle:
            d = gather(d).roll(1, 0)[rows_of_all(len(d))[1]]
        z, codes, _ = self.quantiser(d)
        return self.predict(first, z).clamp(0, 1), codes

    @torch.no_grad()
    def use_of_codes(self, frames):
        """How much the decoder relies on its code: error with another pair's minus error with its own, per "still".

        Over the pairs of all ranks, so every rank has to call this.
        """
        first, second = frames.unbind(1)
        training = self.training
        self.eval()
        guesses = [self.reconstruct(first, second, shuffle)[0] for shuffle in (False, True)]
        errors = torch.stack([(x - second).square().mean() for x in (*guesses, first)])
        own, other, still = gather(errors[None]).mean(0)
        self.train(training)
        return (other - own) / still.clamp(min=1e-12)

    # --- latent actions

    @torch.no_grad()
    def encode(self, first, second):
        """Frames (B, 3, S, S) in [0, 1] -> codes (B, N) int64, vectors (B, N, D) before quantisation, float32."""
        v = self.quantiser.align(self.compare(first, second, self.see(first), self.see(second)))
        return self.quantiser.quantise(v)[1], v

    @torch.no_grad()
    def encode_clip(self, frames, gap, batch=64):
        """All pairs (t, t + gap) of a clip -> codes (T - gap, N), vectors (T - gap, N, D). Every frame is seen once.

        frames: (T, 3, S, S) in [0, 1], or (T, S, S, 3) uint8 as clips have them; `batch` of them are in memory at once.
        """
        parts, waiting, seen = [], frames.new_zeros(0), None
        for part in frames.to(self.slot.device).split(batch):
            part = part.movedim(-1, 1).float() / 255 if part.dtype == torch.uint8 else part
            fresh = self.see(part)
            waiting, seen = (torch.cat([waiting, part]), torch.cat([seen, fresh])) if parts else (part, fresh)
            ready = max(0, len(waiting) - gap)
            pair = waiting[:ready], waiting[gap:], seen[:ready], seen[gap:]
            parts.append(self.quantiser.align(self.compare(*pair)) if ready else self.slot.new_zeros(0))
            waiting, seen = waiting[ready:], seen[ready:]
        v = torch.cat(parts).view(-1, self.codes, self.quantiser.dim)
        return self.quantiser.quantise(v)[1], v

    @torch.no_grad()
    def decode(self, first, codes):
        """Frames (B, 3, S, S) and codes (B, N) -> the frames that they lead to, in [0, 1]."""
        return self.predict(first, self.quantiser.restore(self.quantiser.lookup(codes).float())).clamp(0, 1)

    # --- files

    def save_pretrained(self, folder):
        """config.json and pytorch_model.bin."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        torch.save(self.state_dict(), folder / "pytorch_model.bin")

    def load_pretrained(self, folder):
        """Weights of a checkpoint folder whose configuration is this model's."""
        path = Path(folder) / "pytorch_model.bin"
        try:
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except OSError:
            raise
        except Exception as error:  # for a damaged file torch raises struct.error, IndexError and a dozen more
            reason = (str(error) or type(error).__name__).splitlines()[0][:150]
            raise ValueError(f"{path}: cannot be loaded into this model ({reason})") from None
        return self

    @classmethod
    def from_pretrained(cls, folder):
        """The model of a checkpoint folder, in eval mode. Never runs code from the files."""
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text())
            big = [k for k, v in config.items() if isinstance(v, (int, float)) and not abs(v) < 1e6]
            if big:
                raise ValueError(f"{big[0]} is {config[big[0]]}")  # a depth of 1e30 is built for ever
            model = cls(**config)
        except OSError:
            raise
        except Exception as error:  # for sizes that are none torch raises a dozen kinds
            raise ValueError(f"{path}: not a configuration of LAQ ({error})") from None
        return model.load_pretrained(folder).eval()
