"""What are action tokens worth to a policy? Behaviour cloning from states on ten tasks of Meta-World.

Run:
  pip install --no-deps metaworld; pip install gymnasium mujoco imageio tokenizers
  python tests/bench/fsq_policy.py --out runs/fsq_policy

One small causal transformer learns all ten tasks from 20 demonstrations each. It predicts a chunk of actions as tokens
of fsq_vqvae, as FAST's, as 256 bins, or regresses it: same network, steps and batches. Then it acts in fresh episodes.
Our tokens and bins are predicted in two ways: all digits at once, with soft targets, and their mean is executed; or
(autoregressive) token after token, the likeliest each. Prints a table; what OUT holds already is not done again. An
hour on one core.

Letters: B batch, T steps of a chunk, A action dims, N tokens, D width.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timing import ROOT, load
from torch import nn

fsq_vqvae = load("fsq_vqvae", "baselines")

TASKS = "reach push pick-place door-open drawer-open drawer-close button-press-topdown window-open window-close"
TASKS = [*TASKS.split(), "peg-insert-side"]
FRAME_SKIP, LIMIT = 2, 100  # simulator steps of 12.5 ms per action; actions until an episode has failed
NOISE, MEMORY, PERIOD, DISTURBED = 0.5, 0.7, 24, 8  # the expert is pushed off its way for 8 of every 24 actions
TRAIN, HELD_OUT = 20, 4  # demonstrations of each task
T, A, EXECUTE = 8, 4, 4  # a chunk, and how much of it is executed before the next
WIDTH, DEPTH, HEADS, BATCH, LR = 64, 2, 4, 64, 2e-3
ARMS = ["ours", "256 bins", "regression", "ours, autoregressive", "256 bins, autoregressive", "FAST"]
SMOOTH = 0.75  # width of a soft target, in steps between levels, as arXiv 2403.03950 recommends


# --- the world


def open_world(task):
    """One task with a new goal at each reset, and its scripted expert. MuJoCo may be newer than Meta-World asks."""
    import metaworld
    import mujoco
    from metaworld import policies, sawyer_xyz_env

    def reset_mocap_welds(self):
        welds = self.model.eq_type == mujoco.mjtEq.mjEQ_WELD
        self.model.eq_data[welds] = 0  # rows of 12 numbers; Meta-World writes 11
        self.model.eq_data[welds, 6], self.model.eq_data[welds, 10] = -1.0, 5.0
        mujoco.mj_forward(self.model, self.data)

    for holder in vars(sawyer_xyz_env).values():
        if isinstance(holder, type) and "reset_mocap_welds" in vars(holder):
            holder.reset_mocap_welds = reset_mocap_welds
    env = metaworld.env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"](seed=0)
    env._freeze_rand_vec, env.seeded_rand_vec, env.max_path_length = False, True, 10**6
    return env, policies.ENV_POLICY_MAP[f"{task}-v3"]()


def reset(env, seed):
    env.seed(seed)
    return env.reset()[0]


def act(env, action):
    """(observation (39,), success) after one action (4,): the gripper's move in three directions and its grip."""
    success = False
    for _ in range(FRAME_SKIP):
        obs, _, _, _, info = env.step(np.clip(np.float32(action), -1, 1))
        success |= bool(info["success"])
    return obs, success


def demonstrate(task, count):
    """`count` successful episodes: observations (n, 39), and what the expert would do there, (n, 4)."""
    (env, expert), seed, episodes = open_world(task), 0, []
    while len(episodes) < count:
        rng, noise = np.random.default_rng(seed), np.zeros(A)
        obs, success, seen, actions = reset(env, seed), False, [], []
        while not success and len(actions) < LIMIT:
            seen.append(obs)
            actions.append(np.clip(expert.get_action(obs), -1, 1))
            disturbed = len(actions) % PERIOD < DISTURBED
            noise = MEMORY * noise + rng.normal(0, NOISE * math.sqrt(1 - MEMORY**2), A) if disturbed else np.zeros(A)
            obs, success = act(env, actions[-1] + noise)
        seed += 1
        if success:
            episodes.append((np.float32(seen), np.float32(actions)))
    return episodes


def record(folder):
    """Write the demonstrations as npz episodes, TASK_NN.npz; the last of each task are held out."""
    for task in TASKS:
        if not (folder / f"{task}_{TRAIN + HELD_OUT - 1:02d}.npz").exists():
            for i, (obs, actions) in enumerate(demonstrate(task, TRAIN + HELD_OUT)):
                np.savez(folder / f"{task}_{i:02d}.npz", obs=obs, actions=actions)


def read(folder, numbers):
    """(observations with the task behind them (n, 49), chunks (n, T, A), and whether the next row is a step later)."""
    inputs, chunks, followed = [], [], []
    for t, task in enumerate(TASKS):
        for i in numbers:
            with np.load(folder / f"{task}_{i:02d}.npz") as arrays:
                obs, actions = arrays["obs"], arrays["actions"]
            inputs.append(np.c_[obs, np.tile(np.eye(len(TASKS))[t], (len(obs), 1))])
            steps = np.minimum(np.arange(len(obs))[:, None] + np.arange(T), len(obs) - 1)
            chunks.append(actions[steps])
            followed.append(np.arange(len(obs)) < len(obs) - 1)
    return np.float32(np.concatenate(inputs)), np.concatenate(chunks), np.concatenate(followed)


# --- tokens: `vocabulary`, `length`, encode(chunks) -> (B, N) padded with -1, decode(tokens) -> chunks, valid (B,);
# where a token is made of digits: `levels` of the digits of each token, `points` of each digit (K of them),
# digits(tokens) -> (B, K), chunks(values (B, K)) -> chunks


class Ours:
    """This folder's tokenizer, trained by its own command. Actions are velocities here, so no context helps."""

    def __init__(self, folder, out, tokens, codebook_size):
        held_out = ",".join(f"{task}_{TRAIN + i:02d}" for task in TASKS for i in range(HELD_OUT))
        words = ["--data", f"metaworld={folder}", "--chunk", T, "--condition", "none", "--tokens", tokens]
        words += ["--codebook-size", codebook_size]
        words += ["--val-episodes", held_out, "--val-stride", 2, "--steps", 500, "--out", out, "--device", "cpu"]
        if not (out / "checkpoints" / "best").exists():
            command = [sys.executable, ROOT / "fsq_vqvae" / "train.py", *words, "--resume"]
            subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
        self.model = fsq_vqvae.model.FSQVQVAE.from_pretrained(out / "checkpoints" / "best")
        self.vocabulary, self.length = self.model.config.codebook_size, self.model.num_tokens
        coder = self.model.coders[0]
        self.levels, self.digits = coder.source["levels"], coder.unpack
        counts = [count for of_token in self.levels for count in of_token]
        self.points = [points[:count] for points, count in zip(coder.points, counts, strict=True)]

    def encode(self, chunks):
        return self.model.encode(chunks)

    def decode(self, tokens):
        return self.model.decode(tokens), np.ones(len(tokens), bool)

    def chunks(self, values):
        return self.model.decode_values(values).numpy()


class Bins:
    vocabulary, length = 255, T * A

    def __init__(self):
        self.bins = fsq_vqvae.baselines.Bins(T, A)
        middles = torch.tensor((self.bins.edges[1:] + self.bins.edges[:-1]) / 2, dtype=torch.float32)
        self.levels, self.points = [[self.vocabulary]] * self.length, [middles] * self.length

    def digits(self, tokens):
        return tokens

    def chunks(self, values):
        return values.view(-1, T, A).numpy()

    def encode(self, chunks):
        return self.bins.encode(chunks)

    def decode(self, tokens):
        return self.bins.decode(tokens), np.ones(len(tokens), bool)


class Fast:
    """FAST at its published scale. Its sentences end with a token of their own; what is no chunk decodes to zeros."""

    def __init__(self, train, scale=10):
        self.codec = fsq_vqvae.baselines.Fast(train, scale)
        self.end = fsq_vqvae.baselines.FAST_VOCABULARY
        self.vocabulary, self.length = self.end + 1, 1 + max(map(len, self.codec.encode(train)))

    def encode(self, chunks):
        rows = np.full((len(chunks), self.length), -1)
        for row, tokens in zip(rows, self.codec.encode(chunks), strict=True):
            tokens = [*tokens, self.end][: self.length]
            row[: len(tokens)] = tokens
        return rows

    def decode(self, tokens):
        chunks, valid = np.zeros((len(tokens), T, A)), np.zeros(len(tokens), bool)
        for i, row in enumerate(tokens):
            ended = np.flatnonzero((row == self.end) | (row < 0))
            chunk = self.codec.decode(row[: ended[0]] if len(ended) else row)
            if chunk is not None:
                chunks[i], valid[i] = chunk, True
        return chunks, valid


def measure(codec, chunks, followed, rng, tuples=1_000_000):
    """What can be said of tokens without a policy, on held-out chunks."""
    tokens = codec.encode(chunks)
    lengths = (tokens >= 0).sum(1)
    decoded, valid = codec.decode(tokens)
    flipped = tokens.copy()
    at = rng.integers(0, lengths - isinstance(codec, Fast))  # not the end
    flipped[np.arange(len(tokens)), at] = rng.integers(0, min(codec.vocabulary, 1024), len(tokens))
    broken, still_valid = codec.decode(flipped)
    here = np.flatnonzero(followed)
    both = (tokens[here] >= 0) | (tokens[here + 1] >= 0)
    invalid = 0
    for first in range(0, tuples, 10_000):
        size = min(10_000, tuples - first)
        random = rng.integers(0, min(codec.vocabulary, 1024), (size, int(np.median(lengths))))
        random_chunks, good = codec.decode(random)
        invalid += int((~good | ~np.isfinite(random_chunks).all((1, 2))).sum())
    return dict(
        tokens=float(lengths.mean()),
        bits=float(lengths.mean() * math.log2(codec.vocabulary)),
        mse=float(np.square(decoded - chunks).mean()),
        mse_one_flipped=float(np.square(broken - chunks).mean()),
        invalid_one_flipped=float(1 - still_valid.mean()),
        overlap=float((tokens[here] == tokens[here + 1])[both].mean()),
        invalid_random=invalid / tuples,
    )


# --- the policy


def digits(codec):
    """Which digits each token is made of: 0 or 1, (N, V, S), S the levels of a place in all; and which are tokens."""
    levels, codes, vocabulary = codec.levels, torch.arange(codec.vocabulary), codec.vocabulary
    unpacked = codec.digits(codes[:, None].expand(-1, len(levels))).T  # a row per coefficient, token after token
    made_of, row = torch.zeros(len(levels), vocabulary, max(map(sum, levels))), 0
    for n, of_token in enumerate(levels):
        for i in range(len(of_token)):
            made_of[n, codes, sum(of_token[:i]) + unpacked[row]] = 1
            row += 1
    return made_of, codes < torch.tensor([math.prod(of_token) for of_token in levels])[:, None]


class Whole(nn.Module):
    """A vector and a score of its own for each token."""

    def __init__(self, codec):
        super().__init__()
        self.vectors, self.scores = nn.Embedding(codec.vocabulary, WIDTH), nn.Linear(WIDTH, codec.vocabulary)

    def embed(self, tokens, n):
        """tokens (B,) at place n -> (B, D)."""
        return self.vectors(tokens)

    def logits(self, h, n):
        """h (B, D) -> (B, V)."""
        return self.scores(h)


class Digits(nn.Module):
    """A token's vector and score are the sums of those of its digits: 1024 tokens are some thirty digits."""

    def __init__(self, codec):
        super().__init__()
        made_of, is_token = digits(codec)
        self.register_buffer("made_of", made_of)  # N V S
        self.register_buffer("outside", torch.where(is_token, 0.0, -torch.inf))  # N V
        N, _, S = made_of.shape
        self.vectors = nn.Parameter(torch.randn(N, S, WIDTH))
        self.scores = nn.ModuleList(nn.Linear(WIDTH, S) for _ in range(N))

    def embed(self, tokens, n):
        return self.made_of[n][tokens] @ self.vectors[n]

    def logits(self, h, n):
        return self.scores[n](h) @ self.made_of[n].T + self.outside[n]


class Parallel(nn.Module):
    """All digits of a chunk at once. What is executed is the mean of the levels' points.

    The targets are soft, since a neighbouring level is nearly right (HL-Gauss, Farebrother 2024, arXiv 2403.03950).
    """

    def __init__(self, codec):
        super().__init__()
        self.codec, K, L = codec, len(codec.points), max(map(len, codec.points))
        self.scores = nn.ModuleList(nn.Linear(WIDTH, sum(of_token)) for of_token in codec.levels)
        points, soft = torch.zeros(K, L), torch.zeros(K, L, L)
        for k, own in enumerate(codec.points):
            steps = torch.arange(len(own))
            targets = torch.softmax(-0.5 * ((steps[:, None] - steps) / SMOOTH).square(), 1)
            soft[k, : len(own), : len(own)] = targets
            points[k, : len(own)] = torch.linalg.solve(targets, own)  # so that the mean of a target is its own point
        self.register_buffer("points", points)
        self.register_buffer("soft", soft)  # true level, level

    def log_probabilities(self, h):
        """h (B, N, D) -> (B, K, L); levels that a digit does not have are impossible."""
        L, rows = self.points.shape[1], []
        for n, of_token in enumerate(self.codec.levels):
            rows += self.scores[n](h[:, n]).split(of_token, 1)
        return torch.stack([F.pad(row, (0, L - row.shape[1]), value=-1e9) for row in rows], 1).log_softmax(2)

    def loss(self, h, digits):
        """Cross-entropy in nats per chunk; digits (B, K)."""
        soft = self.soft[torch.arange(digits.shape[1]), digits]  # B K L
        return -(soft * self.log_probabilities(h)).sum((1, 2)).mean()

    def mean(self, h):
        return (self.log_probabilities(h).exp() * self.points).sum(2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x, past=None):
        """x (B, N, D), after the keys and values `past` -> the same, and the keys and values so far."""
        B, N, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, N, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.project(y.transpose(1, 2).reshape(B, N, D))
        return x + self.mlp(self.norm2(x)), (k, v)


class Policy(nn.Module):
    """A causal transformer over the observation and the tokens so far.

    Regression (codec None) and `parallel` see empty tokens: T of A numbers each, or all digits.
    """

    def __init__(self, codec, mean, std, parallel=False):
        super().__init__()
        self.codec, self.length, self.parallel = codec, T if codec is None else codec.length, parallel
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("std", torch.from_numpy(std))
        self.observe = nn.Sequential(nn.Linear(len(mean), WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        head = Parallel if parallel else Digits if isinstance(codec, Ours) else Whole
        self.token = nn.Linear(WIDTH, A) if codec is None else head(codec)
        self.position = nn.Parameter(torch.randn(self.length, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def hidden(self, inputs, tokens=None):
        """inputs (B, 49), tokens (B, N - 1), or None: empty ones -> (B, N, D)."""
        h = [self.observe((inputs - self.mean) / self.std)]
        if tokens is None:
            h += [torch.zeros_like(h[0])] * (self.length - 1)
        else:
            h += [self.token.embed(token, n) for n, token in enumerate(tokens.clamp(min=0).T)]
        h = torch.stack(h, 1) + self.position[: len(h)]
        for block in self.blocks:
            h, _ = block(h)
        return self.norm(h)

    def loss(self, inputs, targets):
        """Mean absolute error of chunks; or nats of the digits; or bits of the tokens (B, N), -1 after their end."""
        if self.codec is None:
            return (self.token(self.hidden(inputs)) - targets).abs().mean()
        if self.parallel:
            return self.token.loss(self.hidden(inputs), self.codec.digits(targets))
        targets = targets[:, : int((targets >= 0).sum(1).max())]
        h = self.hidden(inputs, targets[:, :-1])
        logits = torch.stack([self.token.logits(h[:, n], n) for n in range(h.shape[1])], 1)
        nats = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="sum")
        return nats / math.log(2) / len(inputs)

    @torch.no_grad()
    def chunk(self, inputs):
        """inputs (B, 49) -> chunks (B, T, A) and whether each was one."""
        if self.codec is None or self.parallel:
            h = self.hidden(inputs)
            chunks = self.codec.chunks(self.token.mean(h)) if self.parallel else self.token(h).numpy()
            return chunks, np.ones(len(inputs), bool)
        h, past, tokens = self.observe((inputs - self.mean) / self.std)[:, None], [None] * DEPTH, []
        for n in range(self.length):
            h = h + self.position[n]
            for i, block in enumerate(self.blocks):
                h, past[i] = block(h, past[i])
            tokens.append(self.token.logits(self.norm(h)[:, 0], n).argmax(-1))
            h = self.token.embed(tokens[-1], n)[:, None]
        return self.codec.decode(torch.stack(tokens, 1).numpy())


def train(codec, inputs, chunks, steps, seed, parallel=False, blind=False):
    """A policy, or with `blind` a prior of the tokens, which sees no observation."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    policy = Policy(codec, inputs.mean(0), inputs.std(0) + 1e-3, parallel)
    inputs = torch.from_numpy(inputs) * (not blind)
    targets = torch.from_numpy(chunks if codec is None else codec.encode(chunks))
    opt = torch.optim.AdamW(policy.parameters(), LR, (0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, LR, steps, pct_start=0.1)
    for _ in range(steps):
        rows = torch.from_numpy(rng.integers(0, len(inputs), BATCH))
        loss = policy.loss(inputs[rows], targets[rows])
        (loss / (1 if codec is None else codec.length)).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        opt.step()
        schedule.step()
        opt.zero_grad(set_to_none=True)
    return policy.eval()


@torch.no_grad()
def bits_of(policy, inputs, chunks, blind=False):
    targets = torch.from_numpy(policy.codec.encode(chunks))
    return float(policy.loss(torch.from_numpy(inputs) * (not blind), targets))


def roll_out(policy, envs, rounds):
    """Successes (rounds, tasks) in fresh episodes, the same for every policy, and the share of broken chunks."""
    successes, broken = np.zeros((rounds, len(TASKS)), bool), []
    for number in range(rounds):
        obs = [reset(env, 10**6 + number) for env, _ in envs]
        live = list(range(len(TASKS)))
        for step in range(LIMIT):
            if step % EXECUTE == 0:
                inputs = np.float32([np.r_[obs[t], np.eye(len(TASKS))[t]] for t in live])
                chunks, valid = policy.chunk(torch.from_numpy(inputs))
                plans = dict(zip(live, chunks, strict=True))
                broken += (~valid).tolist()
            for t in list(live):
                obs[t], successes[number, t] = act(envs[t][0], plans[t][step % EXECUTE])
                if successes[number, t]:
                    live.remove(t)
            if not live:
                break
    return successes, float(np.mean(broken))


def interval(successes, n, z=1.96):
    """95 % of Wilson."""
    p, middle = successes / n, (successes / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


# --- the command


class Results:
    """OUT/results.json: what is there is not computed again. Several processes may fill it."""

    def __init__(self, file):
        self.file = file

    def read(self):
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def get(self, key, compute, *words):
        if key not in self.read():
            start = time.process_time()
            found = compute(*words) | dict(cpu_seconds=time.process_time() - start)
            self.file.write_text(json.dumps(self.read() | {key: found}, indent=1))
            print(key, found, flush=True)
        return self.read()[key]


def one_policy(codec, parallel, data, held_out, envs, args, seed):
    policy = train(codec, *data[:2], args.steps, seed, parallel)
    successes, broken = roll_out(policy, envs, args.episodes)
    bits = None if codec is None or parallel else bits_of(policy, *held_out[:2])
    return dict(successes=successes.sum(0).tolist(), broken=broken, bits=bits)


def one_prior(codec, data, held_out, args):
    return dict(bits=bits_of(train(codec, *data[:2], args.steps // 2, 0, blind=True), *held_out[:2], blind=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fsq_policy"), help="folder [runs/fsq_policy]")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, help="what the policies predict [all]")
    parser.add_argument("--tokens", type=int, default=8, help="of ours, per chunk [8]")
    parser.add_argument("--codebook-size", type=int, default=1024, help="codes of one of our tokens [1024]")
    parser.add_argument("--steps", type=int, default=2400, help="training steps of each policy [2400]")
    parser.add_argument("--seeds", type=int, default=3, help="policies of each arm [3]")
    parser.add_argument("--episodes", type=int, default=5, help="fresh episodes of each task and seed [5]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    demos = args.out / "demos"
    demos.mkdir(parents=True, exist_ok=True)
    record(demos)
    data, held_out = read(demos, range(TRAIN)), read(demos, range(TRAIN, TRAIN + HELD_OUT))
    print(f"{len(TASKS) * TRAIN} demonstrations, {len(data[1])} chunks of {T} x {A}", flush=True)
    envs = [open_world(task) for task in TASKS]
    ours = f"{args.tokens} of {args.codebook_size}"
    makers = {
        "ours": lambda: Ours(demos, args.out / f"ours, {ours}", args.tokens, args.codebook_size),
        "FAST": lambda: Fast(data[1]),
        "256 bins": Bins,
        "regression": lambda: None,
    }
    kinds = {arm: arm.partition(",")[0] for arm in args.arms}  # of tokens
    codecs = {kind: makers[kind]() for kind in dict.fromkeys(kinds.values())}
    names = {arm: arm.replace("ours", f"ours, {ours}") for arm in args.arms}
    results = Results(args.out / "results.json")
    runs = {arm: [] for arm in args.arms}
    for seed in range(args.seeds):
        for arm, name in names.items():
            words = codecs[kinds[arm]], arm in ("ours", "256 bins"), data, held_out, envs, args, seed
            runs[arm].append(results.get(f"{name}, seed {seed}", one_policy, *words))
    episodes = args.episodes * len(TASKS)
    print(f"\n| predicts | success, 95 % | of each seed | bits | chunks that did not decode | {', '.join(TASKS)} |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for arm, name in names.items():
        won = np.array([run["successes"] for run in runs[arm]])  # seeds, tasks
        low, high = interval(won.sum(), args.seeds * episodes)
        cells = [name, f"{won.sum() / args.seeds / episodes:.1%} [{low:.1%}, {high:.1%}]"]
        cells.append(" ".join(f"{n:.0%}" for n in won.sum(1) / episodes))
        bits = [run["bits"] for run in runs[arm]]
        cells.append("" if bits[0] is None else f"{np.mean(bits):.0f}")
        cells.append(f"{np.mean([run['broken'] for run in runs[arm]]):.2%}")
        cells.append(" ".join(f"{n:.0%}" for n in won.mean(0) / args.episodes))
        print("| " + " | ".join(cells) + " |", flush=True)
    print("\n| tokens | per chunk | bits | bits, prior | MSE | one flipped | does not decode | overlap |", end="")
    print(" random ones that do not decode |\n| --- " + "| ---: " * 8 + "|")
    for kind, codec in codecs.items():
        if codec is not None:
            name = kind.replace("ours", f"ours, {ours}")
            told = results.get(f"{name}, tokens", measure, codec, *held_out[1:], np.random.default_rng(0))
            prior = results.get(f"{name}, prior", one_prior, codec, data, held_out, args)["bits"]
            cells = [name, f"{told['tokens']:.3g}", *(f"{x:.0f}" for x in (told["bits"], prior))]
            cells += [f"{told['mse']:.2g}", f"{told['mse_one_flipped']:.2g}", f"{told['invalid_one_flipped']:.1%}"]
            print("| " + " | ".join([*cells, f"{told['overlap']:.0%}", f"{told['invalid_random']:.4%}"]) + " |")


if __name__ == "__main__":
    main()
