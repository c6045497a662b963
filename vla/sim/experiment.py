"""Does pretraining on latent actions pay? The experiment of LAPA in closed loop, from nothing to the table.

Run:
  python vla/sim/experiment.py --env metaworld --out runs/metaworld
  python vla/sim/experiment.py --env metaworld --quick --out runs/quick        # three tasks, one seed: 15 minutes
  python vla/sim/experiment.py --env tabletop --out runs/tabletop              # needs no simulator

Writes videos of scripted experts, trains a tokenizer (laq) on their pixels alone, labels them, pretrains a policy on
the labels (stage 2), finetunes it on N demonstrations per task (stage 3) and tests it in closed loop on fresh goals.
ARMS are what it is compared with, with the same demonstrations, steps of stage 3 and test goals; `actions`, the upper
bound, has no stage 3. A seed is of everything but the videos: tokenizer, network, batches,
demonstrations. Kill it and run it again: it goes on.
Writes OUT/table.md, tasks.md and results.json; OUT/logs has each stage's output.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":  # vla/ and its parent take the place of vla/sim/
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
from shards import npz, read_clips, write_shard
from sources import read_labels, read_latents

import common
from sim import metaworld, tabletop, tiny
from sim.rollout import wilson

ROOT = Path(__file__).resolve().parents[2]
ARMS = dict(
    latents="latent actions (laq) of the videos",
    vpt="inverse dynamics from the same demonstrations label the videos",
    actions="true actions of all videos (upper bound)",
    scratch="no pretraining",
    scratch_long="no pretraining, with the steps of both stages",
    shuffled="latent actions of other frames",
    constant="one latent action for every frame",
    given="latent actions that --labels gives, such as those of vvae_lam/label.py",
    other_latents="latent actions (laq) of another robot's videos",
    other_vpt="inverse dynamics from the same demonstrations label another robot's videos",
)
MOST_DEMOS, HELD_OUT = 10, 2  # demonstrations per task; those after the first N are held out, and two at least
# Linux: a stage that is started so is killed when the experiment dies, even by kill -9; else its folder stays locked.
# prctl(PR_SET_PDEATHSIG, SIGKILL) by the stage itself: preexec_fn is not safe where there are threads.
TIED = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""


def parse(argv=None):
    parser = common.ArgumentParser(__doc__)
    add, whole = parser.add_argument, dict(type=int, metavar="N")
    arms = [arm for arm in ARMS if arm != "given"]
    add("--env", choices=["metaworld", "tabletop"], default="metaworld", help="where the policies act")
    add("--out", required=True, metavar="DIR", help="folder of the experiment; goes on where it was")
    add("--quick", action="store_true", help="three tasks, four arms, one seed, few videos, steps and episodes")
    add("--arms", nargs="+", choices=ARMS, default=arms, metavar="NAME", help="which: " + ", ".join(ARMS))
    add("--labels", metavar="DIR", help="label shards of OUT/videos for the arm `given`")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="seeds of everything but the videos")
    add("--demos", nargs="+", type=int, default=[2, 5, 10], metavar="N", help="demonstrations per task")
    add("--tasks", nargs="+", choices=metaworld.TASKS, default=[*metaworld.TASKS], metavar="NAME", help="of metaworld")
    add("--demo-tasks", nargs="+", metavar="NAME", help="tasks with demonstrations, if not all; the others have videos")
    add("--videos", default=50, help="videos per task", **whole)
    add("--laq-steps", default=1200, help="steps of the tokenizer", **whole)
    add("--steps", default=1500, help="steps of stage 2", **whole)
    add("--tune-steps", default=600, help="steps of stage 3", **whole)
    add("--backbone-lr", type=float, default=1.0, metavar="X", help="of a pretrained backbone in stage 3, times --lr")
    add("--episodes", default=17, help="test episodes per task and seed", **whole)
    add("--jobs", default=max(1, os.cpu_count() or 1), help="stages at a time, each on one core", **whole)
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)")
    args = parser.parse_args(argv)
    if args.quick:
        args.tasks, args.seeds, args.demos = ["door-open", "button-press-topdown", "window-close"], [0], [2]
        args.arms = ["latents", "scratch", "scratch_long", "actions"]
        args.videos, args.laq_steps, args.steps, args.tune_steps, args.episodes = 25, 600, 600, 400, 10
    args.demo_tasks = args.demo_tasks or args.tasks
    if not set(args.demo_tasks) <= set(args.tasks) or (args.env != "metaworld" and args.demo_tasks != args.tasks):
        parser.error("--demo-tasks must be some of --tasks, with --env metaworld")
    if max(args.demos) > MOST_DEMOS:
        parser.error(f"--demos must be at most {MOST_DEMOS}")
    if ("given" in args.arms) != bool(args.labels):
        parser.error("--labels and the arm `given` go together")
    for name in ("demos", "videos", "laq_steps", "steps", "tune_steps", "episodes", "jobs"):
        if np.min(getattr(args, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return args


# --- the stages


class Stopped(Exception):
    """A signal, or a stage that failed, ends the experiment."""


class Experiment:
    """Makes the numbers of the table: `number`, from several threads at once.

    The other methods are a stage each. A stage first makes what it needs, then runs, unless OUT/done/NAME says that
    it has run before, and returns the folder that it has written.
    """

    def __init__(self, args):
        self.args, self.out = args, Path(args.out).resolve()
        self.metaworld = args.env == "metaworld"
        self.pixels, self.chunk = (64, 8) if self.metaworld else (32, 4)
        self.per_task = 1 if self.metaworld else len(tabletop.TASKS)  # the tabletop draws its tasks
        self.slots, self.locks, self.running, self.torch = threading.Semaphore(args.jobs), {}, set(), threading.Lock()
        self.stopped, self.failed = 0, None
        for folder in ("done", "logs"):
            common.make_folder(self.out / folder)
        free = ("out", "quick", "arms", "labels", "seeds", "demos", "jobs", "device")
        flags, record = {name: value for name, value in vars(args).items() if name not in free}, self.out / "flags.json"
        if record.exists() and (before := common.read_json(record)) != flags:
            wrong = [name for name in {**before, **flags} if before.get(name) != flags.get(name)]
            raise common.DataError(f"--out {args.out} was begun with another --{wrong[0].replace('_', '-')}")
        record.write_text(json.dumps(flags))
        for number in common.SIGNALS:
            signal.signal(number, self.stop)

    def stop(self, number, frame=None):
        self.stopped = number
        for process in list(self.running):
            process.terminate()  # a training stage saves and ends

    def once(self, name, make):
        """make(OUT/name), unless that was done before."""
        with self.locks.setdefault(name, threading.Lock()):  # two numbers may need the same stage
            done = self.out / "done" / name
            if not done.exists():
                make(self.out / name)
                done.touch()
                tqdm.write(f"done: {name}")
        return self.out / name

    def run(self, name, script, **flags):
        """Run a script once. Of its flags True is a switch, and a list several values."""
        return self.once(name, functools.partial(self.launch, script, flags))

    def launch(self, script, flags, folder):
        words = [sys.executable, *["-c", TIED] * (sys.platform == "linux"), ROOT / script]
        for flag, value in (dict(out=folder) | flags).items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{flag.replace('_', '-')}", *values]
        file = self.out / "logs" / f"{folder.name}.log"
        options = dict(cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"})
        with self.slots, open(file, "ab") as log:
            if self.stopped:
                raise Stopped
            pipes = dict(stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            process = subprocess.Popen([str(word) for word in words], **pipes, **options)
            self.running.add(process)
            if self.stopped:  # since a line above
                process.terminate()
            code = process.wait()
            self.running.discard(process)
        if code and not self.stopped:
            end = file.read_text(errors="replace").strip().splitlines()[-1:]
            self.failed = f"stage {folder.name} failed: {' '.join(end)} (all of it: {file})"
            self.stop(signal.SIGTERM)
        if code:
            raise Stopped

    def videos(self, other):
        """Videos of the robot, or of another one."""
        name, flags = "other" if other else "videos", dict(seed=2 * other)
        if self.metaworld:
            flags |= dict(tasks=self.args.tasks, episodes=self.args.videos, appearance="other" if other else "robot")
            return self.run(name, "vla/sim/metaworld.py", **flags)
        flags |= dict(videos=self.args.videos * self.per_task, demonstrations=1, body="light" if other else "disc")
        return self.run(name, "vla/demo.py", with_actions=True, **flags)

    def demonstrations(self, seed):
        """Demonstrations, more than any arm trains on."""
        name, count, flags = f"demos-{seed}", (MOST_DEMOS + HELD_OUT) * self.per_task, dict(seed=f"1{seed}")
        if self.metaworld:
            flags |= dict(tasks=self.args.demo_tasks, episodes=count, out=self.out / name / "robot")
            return self.run(name, "vla/sim/metaworld.py", **flags) / "robot"
        return self.run(name, "vla/demo.py", videos=1, demonstrations=count, **flags) / "robot"

    def held_out(self, demos):
        """The demonstrations after the first `demos` of each task, as --val-episodes takes them."""
        tasks = [list(metaworld.TASKS).index(task) for task in self.args.demo_tasks] if self.metaworld else [0]
        first, last = demos * self.per_task, (MOST_DEMOS + HELD_OUT) * self.per_task - 1
        return ",".join(f"{1000 * task + first}-{1000 * task + last}" for task in tasks)

    def backbone(self, seed):
        """A network with random weights, and a tokenizer of the tasks' words."""
        texts = list(metaworld.TASKS.values())
        if not self.metaworld:
            texts = [tabletop.instruction(i, verb) for i in range(len(tabletop.TASKS)) for verb in tabletop.VERBS]
        build = functools.partial(tiny.build, texts=texts, family="film", pixels=self.pixels, seed=seed)
        with self.torch:  # it has one generator: two networks at once would draw their weights from it in turns
            return self.once(f"backbone-{seed}", build)

    def labels(self, arm, videos, seed):
        """Latent actions of the videos, of a tokenizer that is trained on them; for two arms mixed up."""
        if arm == "given":
            return Path(self.args.labels).resolve()
        flags = dict(data=f"web={videos}", gap=4, image_size=self.pixels, patch=self.pixels // 4, dim=96, depth=2)
        flags |= dict(code_seq_len=4, codebook_size=8, motion_weight=10, flow_weight=0, batch_size=32)
        flags |= dict(steps=self.args.laq_steps, lr=1e-3, warmup=50, log_every=100, eval_every=200, save_every=200)
        flags |= dict(resume=True)
        where = dict(device=self.args.device)
        laq = self.run(f"laq-{videos.name}-{seed}", "laq/train.py", seed=seed, **flags, **where)
        flags = dict(checkpoint=laq / "checkpoints" / "best", data=videos)
        labels = self.run(f"label-{videos.name}-{seed}", "laq/label.py", **flags, **where)
        if arm in ("shuffled", "constant"):
            mix = functools.partial(relabel, labels, videos, arm=arm, seed=seed)
            return self.once(f"label-{arm}-{seed}", mix)
        return labels

    def pseudo_labels(self, videos, seed, demos):
        """Commands of the videos, as inverse dynamics guess them that are trained on the demonstrations."""
        flags = dict(data=f"robot={self.demonstrations(seed)}", val_episodes=self.held_out(demos))
        flags |= dict(videos=f"web={videos}", image_size=self.pixels, seed=seed, device=self.args.device)
        return self.run(f"idm-{videos.name}-{seed}-{demos}", "vla/sim/idm.py", **flags) / "web"

    def train(self, name, script, seed, steps, **flags):
        """A training stage of vla."""
        flags |= dict(image_size=self.pixels, batch_size=32, lr=1e-3, warmup=50, weight_decay=0.05, steps=steps)
        flags |= dict(log_every=100, eval_every=250, save_every=250, val_samples=256, resume=True)
        return self.run(name, script, seed=seed, device=self.args.device, **flags)

    def pretrained(self, arm, seed, demos):
        """The run on videos that stage 3 of an arm starts from."""
        videos, steps = self.videos(arm.startswith("other")), self.args.steps
        flags = dict(data=f"web={videos}", backbone=self.backbone(seed), prompt="{instruction}")
        if arm != "actions" and not arm.endswith("vpt"):
            flags |= dict(labels=self.labels(arm, videos, seed))
            return self.train(f"stage2-{arm}-{seed}", "vla/train.py", seed, steps, **flags)
        name, flags = f"pretrain-{arm}-{seed}", flags | dict(backbone_lr=1, chunk=self.chunk)
        if arm.endswith("vpt"):
            name, flags = f"{name}-{demos}", flags | dict(action_labels=self.pseudo_labels(videos, seed, demos))
        return self.train(name, "vla/finetune.py", seed, steps, **flags)

    def policy(self, arm, seed, demos):
        """Stage 3."""
        if arm == "actions":  # a policy already; tuned on few demonstrations it gets worse
            return self.pretrained(arm, seed, demos)
        flags = dict(data=f"robot={self.demonstrations(seed)}", val_episodes=self.held_out(demos), chunk=self.chunk)
        steps = self.args.tune_steps + (self.args.steps if arm == "scratch_long" else 0)
        if arm.startswith("scratch"):
            flags |= dict(backbone=self.backbone(seed), backbone_lr=1, prompt="{instruction}")
        else:
            best = self.pretrained(arm, seed, demos) / "checkpoints" / "best"
            flags |= dict(init=best, backbone_lr=self.args.backbone_lr)
            flags |= dict(keep_head=True) if arm.endswith("vpt") else {}
        return self.train(f"stage3-{arm}-{seed}-{demos}", "vla/finetune.py", seed, steps, **flags)

    def number(self, arm, seed, demos):
        """A number of the table: the policy of an arm on fresh goals."""
        flags = dict(checkpoint=self.policy(arm, seed, demos) / "checkpoints" / "last", env=self.args.env)
        flags |= dict(tasks=self.args.tasks, n_action_steps=4) if self.metaworld else dict(n_action_steps=1)
        flags |= dict(episodes=self.args.episodes, seed=f"9{seed}", device=self.args.device)
        return self.run(f"test-{arm}-{seed}-{demos}", "vla/evaluate.py", **flags)

    def table(self):
        """Make all numbers, seed by seed, an arm after another. Returns an exit code."""
        args = self.args
        with ThreadPoolExecutor(4 * args.jobs) as pool:  # some wait for stages that others have begun
            cells = [(arm, seed, demos) for demos in args.demos for seed in args.seeds for arm in args.arms]
            numbers = [pool.submit(self.number, *cell) for cell in cells]
            try:
                for number in tqdm(as_completed(numbers), total=len(numbers), unit="number"):
                    number.result()
                    report(self.out)
            except BaseException as error:
                self.stop(self.stopped or signal.SIGTERM)
                pool.shutdown(cancel_futures=True)
                if not isinstance(error, Stopped):
                    raise
        if self.failed:
            raise common.DataError(self.failed)
        return {0: 0, signal.SIGINT: 130}.get(self.stopped, 75)


def relabel(labels, videos, out, arm, seed):
    """Copies of label shards in which every latent is that of a random frame (shuffled), or of one frame (constant)."""
    about, rng = read_labels(labels), np.random.default_rng(seed)
    clips = [clip for clip in read_clips(videos, labels) if len(clip) > about["gap"]]
    found = [read_latents(clip, about)[:2] for clip in clips]
    codes, vectors = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = rng.permutation(len(codes)) if arm == "shuffled" else np.full(len(codes), rng.integers(len(codes)))
    start, shards = 0, {}
    for clip, (own, _) in zip(clips, found, strict=True):
        rows = order[start : start + len(own)]
        start += len(own)
        packed = npz(codes=codes[rows], vectors=vectors[rows], gap=np.int64(about["gap"]))
        shards.setdefault(clip.shard.name, []).append({"__key__": clip.key, "latents.npz": packed})
    out.mkdir(exist_ok=True)
    for name, samples in shards.items():
        write_shard(out / name, samples)
    with common.atomic(out / "labels.json") as path:
        path.write_text((labels / "labels.json").read_text())


# --- the tables


def read_results(out):
    """All tests that are there: [{arm, seed, demos, tasks: {task: (successes, episodes)}}]."""
    rows = []
    for file in sorted(out.glob("test-*/report.json")):
        _, arm, seed, demos = file.parent.name.split("-")
        tasks = common.read_json(file)["closed_loop"]["tasks"]
        tasks = {task: (row["successes"], row["episodes"]) for task, row in tasks.items()}
        rows.append(dict(arm=arm, seed=int(seed), demos=int(demos), tasks=tasks))
    return rows


def summarise(rows, draws=2000):
    """{(arm, demos): (success, low, high, seeds)}.

    The 95 % interval is the wider one at each end of Wilson's over all episodes, and of a bootstrap over seeds and,
    within each seed and task, episodes.
    """
    table, rng = {}, np.random.default_rng(0)
    cells = {(row["arm"], row["demos"]) for row in rows}
    for arm, demos in sorted(cells, key=lambda cell: (list(ARMS).index(cell[0]), cell)):
        mine = [list(row["tasks"].values()) for row in rows if (row["arm"], row["demos"]) == (arm, demos)]
        wins, trials = np.array(mine).transpose(2, 0, 1)  # seeds x tasks
        seeds = rng.integers(len(wins), size=(draws, len(wins)))
        again = rng.binomial(trials[seeds], (wins / trials)[seeds]).sum((1, 2)) / trials[seeds].sum((1, 2))
        ends = zip(np.quantile(again, [0.025, 0.975]), wilson(wins.sum(), trials.sum()), strict=True)
        (low, high), share = ends, wins.sum() / trials.sum()
        table[arm, demos] = float(share), float(min(low)), float(max(high)), len(wins)
    return table


def markdown(table):
    """An arm per line: success in per cent, its interval, the number of seeds."""
    columns = sorted({demos for _, demos in table})
    yield "| pretraining | " + " | ".join(f"{demos} demonstrations per task" for demos in columns) + " |"
    yield "| --- " + "| ---: " * len(columns) + "|"
    for arm in dict.fromkeys(arm for arm, _ in table):
        cells = []
        for demos in columns:
            p, low, high, seeds = table.get((arm, demos), (None, 0, 0, 0))
            cells.append("-" if p is None else f"{100 * p:.1f} [{100 * low:.1f}, {100 * high:.1f}] ({seeds})")
        yield f"| {arm}: {ARMS[arm]} | " + " | ".join(cells) + " |"


def task_tables(rows):
    """For each number of demonstrations a task per line, an arm per column: success in per cent over all seeds."""
    for demos in sorted({row["demos"] for row in rows}):
        mine = [row for row in rows if row["demos"] == demos]
        arms = [arm for arm in ARMS if any(row["arm"] == arm for row in mine)]
        yield f"{demos} demonstrations per task\n\n| task | {' | '.join(arms)} |\n| --- {'| ---: ' * len(arms)}|"
        for task in mine[0]["tasks"]:
            sums = [np.sum([row["tasks"][task] for row in mine if row["arm"] == arm], 0) for arm in arms]
            yield f"| {task} | {' | '.join(f'{100 * wins / trials:.0f}' for wins, trials in sums)} |"
        yield ""


def report(out):
    """Write the tables from the tests that are there."""
    rows = read_results(out)
    texts = {"results.json": json.dumps(rows, indent=1), "table.md": "\n".join(markdown(summarise(rows))) + "\n"}
    texts["tasks.md"] = "\n".join(task_tables(rows)) + "\n"
    for name, text in texts.items():
        with common.atomic(out / name) as path:
            path.write_text(text)


def main(argv=None):
    args = parse(argv)
    if args.env == "metaworld":
        metaworld.open_package()  # what is missing is said before anything is written
    code = Experiment(args).table()
    if code:
        print("stopped; the same command goes on", flush=True)
        return code
    print((Path(args.out) / "table.md").read_text())
    print(f"tables: {args.out}/table.md, tasks.md")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
