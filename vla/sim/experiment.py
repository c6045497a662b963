"""Does pretraining on latent actions pay? The experiment of LAPA on a tabletop that fits on a laptop.

Run:
  python vla/sim/experiment.py --out runs/lapa
  python vla/sim/experiment.py --out runs/lapa --seeds 0 1 2 --demos 5 10 25 50 --steps 1200
  python vla/sim/experiment.py --out runs/lapa --labels PATH      # of laq/label.py, made from OUT/data

Videos without actions teach latent actions, then 5 to 50 labelled demonstrations teach commands. Beside it stand
references that get the same demonstrations, the same sweep and the same tests (ARMS). Kill it and run it again: it
goes on. Writes OUT/results.json, OUT/table.md and OUT/success.png. The choice of learning rate is made on held-out
demonstrations; the test scenes are drawn from seeds that nothing else uses.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

if __name__ == "__main__":  # vla/ and its parent take the place of vla/sim/
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
import demo
import figures
import finetune
import train
from policy import Policy
from shards import npz, read_clips, read_vocabulary, write_shard

import common
from sim import idm, rollout

ARMS = dict(
    scratch="demonstrations only",
    scratch_long="demonstrations only, as many steps as both stages together",
    shuffled="latents of other clips: the control that shows that latents matter",
    latents="latent actions of the same robot's videos",
    latents_other="latent actions of another robot's videos",
    vpt="inverse dynamics from the same demonstrations label the videos with commands",
    vpt_other="the same for another robot's videos",
    actions="true commands of all videos: the upper bound",
)


def parse(argv=None):
    parser = common.Parser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    add("--out", required=True, metavar="DIR", help="folder of the experiment; goes on where it was")
    add("--labels", metavar="DIR", help="latents of OUT/data from a tokenizer; without it demo.py's stand-in")
    add("--labels-other", metavar="DIR", help="latents of OUT/other, likewise")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME", help="which: " + ", ".join(ARMS))
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of weights, subsets and batches, not of tests")
    add("--demos", nargs="+", type=int, default=[10], metavar="N", help="numbers of demonstrations")
    add("--videos", default=700, help="videos without actions", **whole)
    add("--other-body", choices=["square", "light"], default="light", help="how the other robot looks")
    add("--family", default="film", metavar="NAME", help="of the backbone: film, qwen3_vl, qwen2_5_vl (tiny.py)")
    add("--pointing", default=400, help="steps in which the backbone of all arms learns to see (pointing.py)", **whole)
    add("--steps", default=2000, help="of stage 2", **whole)
    add("--tune-steps", default=150, help="of stage 3", **whole)
    add("--batch-size", default=32, help="samples per step in both", **whole)
    add("--target", choices=["codes", "codebook", "vectors"], default="vectors", help="what stage 2 learns")
    add("--backbone-lr", nargs="+", type=float, default=[0.1, 1.0], metavar="X", help="the sweep, for every arm alike")
    add("--share-stage-2", action="store_true", help="one stage-2 run serves all seeds: they vary stage 3 alone")
    add("--episodes", default=100, help="test episodes per policy", **whole)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    return parser.parse_args(argv)


def shuffle_labels(labels, folder):
    """Copies of label shards in which every latent is that of a random frame of a random clip."""
    about, rng = read_vocabulary(labels), np.random.default_rng(0)
    clips = read_clips(folder.parent / "data", labels)
    for clip in clips:
        clip.labels = about
    found = [clip.latents() for clip in clips]
    codes, vectors, _ = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order, start, shards = rng.permutation(len(codes)), 0, {}
    for clip, (own, *_) in zip(clips, found, strict=True):
        rows = order[start : start + len(own)]
        start += len(own)
        packed = npz(codes=codes[rows], vectors=vectors[rows], gap=np.int64(about["gap"]))
        shards.setdefault(clip.shard.name, []).append({"__key__": clip.key, "latents.npz": packed})
    folder.mkdir(exist_ok=True)
    for name, samples in shards.items():
        write_shard(folder / name, samples)
    with common.atomic(folder / "labels.json") as path:
        path.write_text(json.dumps(about))


class Experiment:
    def __init__(self, args):
        self.args, self.out = args, Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        same = dict(with_actions=True, videos=args.videos)
        demo.write(self.out / "data", family=args.family, pointing=args.pointing, **same)
        other = [arm for arm in args.arms if arm.endswith("other")]
        if other:
            demo.write(self.out / "other", body=args.other_body, demonstrations=1, seed=1, **same)
        self.labels = dict(
            latents=args.labels or self.out / "data" / "labels",
            latents_other=args.labels_other or self.out / "other" / "labels",
            shuffled=self.out / "shuffled",
        )
        if "shuffled" in args.arms:
            shuffle_labels(self.labels["latents"], self.labels["shuffled"])
        shown = dict(image_size=32, prompt="robot, {instruction}", device=args.device, batch_size=args.batch_size)
        self.common = [word for name, value in shown.items() for word in (common.flag(name), value)]
        self.common += "--lr 1e-3 --warmup 20 --weight-decay 0.05 --log-every 50 --val-samples 128".split()

    def run(self, main, name, steps, *words):
        """A training run in OUT/runs/NAME, begun or gone on with; returns its best checkpoint and its val/loss."""
        folder = self.out / "runs" / name
        best = folder / "checkpoints" / "best"
        if not (folder / "done").exists():
            every = ["--steps", steps, "--eval-every", max(1, steps // 4), "--save-every", steps]
            code = main([*self.common, *every, "--out", folder, "--resume", *words])
            if code:
                sys.exit(code)  # it was asked to stop, and has saved
            (folder / "done").touch()
        return best, common.load(best / "resume.pt")["best"]

    def pretrain(self, arm, seed, demos):
        """The checkpoint that stage 3 of this arm starts from, as flags of finetune.py."""
        args, backbone = self.args, ["--backbone", self.out / "data" / "backbone"]
        if args.share_stage_2 and not arm.startswith("vpt"):  # whose labels depend on the demonstrations
            seed = args.seeds[0]
        videos = self.out / ("other" if arm.endswith("other") else "data")
        if arm.startswith("scratch"):
            return backbone
        words = ["--data", f"videos={videos}", "--seed", seed, *backbone]
        if arm in self.labels:
            words += ["--labels", self.labels[arm], "--target", args.target]
            return ["--init", self.run(train.main, f"{arm}-{seed}", args.steps, *words)[0]]
        words += ["--chunk", 1, "--backbone-lr", 1]
        name = f"{arm}-{seed}"
        if arm.startswith("vpt"):
            name = f"{arm}-{seed}-{demos}"
            pseudo = self.out / "idm" / name
            if not (pseudo / "report.json").exists():
                about = [
                    "--data",
                    f"robot={self.out / 'data' / 'robot'}",
                    "--videos",
                    f"videos={videos}",
                    "--seed",
                    seed,
                ]
                idm.main(
                    [str(word) for word in [*about, "--out", pseudo, "--episodes", demos, "--device", args.device]]
                )
            words += ["--action-labels", pseudo / "videos"]
        return ["--init", self.run(finetune.main, name, args.steps, *words)[0]]

    def row(self, arm, seed, demos):
        """One number: stage 3 with every rate of the sweep, the best by held-out demonstrations in closed loop."""
        args = self.args
        start, tried = self.pretrain(arm, seed, demos), {}
        steps = args.tune_steps + (args.steps if arm == "scratch_long" else 0)
        for rate in args.backbone_lr:
            words = [
                "--data",
                f"robot={self.out / 'data' / 'robot'}",
                "--episodes",
                demos,
                "--seed",
                seed,
                "--chunk",
                1,
            ]
            name = f"{arm}-{seed}-{demos}-tuned-{rate}"
            best, loss = self.run(finetune.main, name, steps, *start, *words, "--backbone-lr", rate)
            tried[rate] = loss, best
        rate = min(tried, key=lambda rate: tried[rate][0])
        policy = Policy.from_pretrained(
            tried[rate][1], common.setup(SimpleNamespace(device=args.device, seed=seed)).device
        )
        tests = [(seed, 1_000_000 + i) for i in range(args.episodes)]
        won = rollout.on_tables(policy, tests)[0]
        return dict(arm=arm, seed=seed, demos=demos, rate=rate, loss=tried[rate][0], won=int(won.sum()), of=len(won))


def summarise(rows):
    """{(arm, demos): (success, low, high, seeds)}: all seeds' episodes together, with the 95 % interval."""
    table = {}
    for arm in ARMS:
        for demos in sorted({row["demos"] for row in rows}):
            mine = [row for row in rows if (row["arm"], row["demos"]) == (arm, demos)]
            if mine:
                won, of = sum(row["won"] for row in mine), sum(row["of"] for row in mine)
                table[arm, demos] = (won / of, *rollout.wilson(won, of), len(mine))
    return table


def markdown(table):
    """The table of a README: an arm per line, success in per cent with its interval and the number of seeds."""
    columns = sorted({demos for _, demos in table})
    yield "| pretraining | " + " | ".join(f"{demos} demonstrations" for demos in columns) + " |"
    yield "| --- " + "| ---: " * len(columns) + "|"
    for arm in [arm for arm in ARMS if any(arm == key[0] for key in table)]:
        cells = []
        for demos in columns:
            p, low, high, seeds = table.get((arm, demos), (None, 0, 0, 0))
            cells.append("-" if p is None else f"{100 * p:.1f} [{100 * low:.1f}, {100 * high:.1f}] ({seeds})")
        yield f"| {arm}: {ARMS[arm]} | " + " | ".join(cells) + " |"


def main(argv=None):
    args = parse(argv)
    experiment = Experiment(args)
    results = experiment.out / "results.json"
    rows = json.loads(results.read_text()) if results.exists() else []
    for seed in args.seeds:
        for demos in args.demos:
            for arm in args.arms:
                if any((row["arm"], row["seed"], row["demos"]) == (arm, seed, demos) for row in rows):
                    continue
                rows.append(experiment.row(arm, seed, demos))
                with common.atomic(results) as path:
                    path.write_text(json.dumps(rows, indent=1))
                table = summarise(rows)
                with common.atomic(experiment.out / "table.md") as path:
                    path.write_text("\n".join(markdown(table)) + "\n")
                with common.atomic(experiment.out / "success.png") as path:
                    figures.success(table, ARMS).savefig(path, format="png")
                print(json.dumps(rows[-1]), flush=True)
    print((experiment.out / "table.md").read_text())
    print(f"figure: {experiment.out / 'success.png'}")
    return 0


if __name__ == "__main__":
    common.run(main)
