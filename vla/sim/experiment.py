"""Does pretraining on latent actions pay? The experiment of LAPA in closed loop, from nothing to the table.

Run:
  python vla/sim/experiment.py --env metaworld --out runs/metaworld            # 3 hours on two quiet cores
  python vla/sim/experiment.py --env metaworld --quick --out runs/quick        # three tasks, one seed: 15 minutes
  python vla/sim/experiment.py --env tabletop --out runs/tabletop              # needs no simulator

Writes videos of scripted experts, trains a tokenizer (laq) on their pixels alone, labels them, pretrains a policy on
the labels (stage 2), finetunes it on N demonstrations per task (stage 3) and tests it in closed loop on fresh goals.
ARMS are what it is compared with, with the same demonstrations, steps of stage 3 and test goals; `actions`, the upper
bound, has no stage 3. A seed is a seed of everything: tokenizer, network, batches, demonstrations. Kill
it and run it again: it goes on.
Writes OUT/table.md, tasks.md, results.json, success.png and rollouts.png; OUT/logs has each stage's output.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

if __name__ == "__main__":  # vla/ and its parent take the place of vla/sim/
    sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
import figures
from shards import npz, read_clips, write_shard
from sources import read_labels, read_latents

import common
from sim import metaworld, tabletop
from sim.rollout import wilson
from sim.tiny import build

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
# The command of each stage; a plan fills in the {words}. TRAIN stands in the three training stages.
TRAIN = """--image-size {pixels} --batch-size 32 --lr 1e-3 --warmup 50 --weight-decay 0.05 --steps {steps}
    --log-every 100 --eval-every 250 --save-every 250 --val-samples 256 --seed {seed} --device {device} --resume
    --out {run}"""
COMMANDS = {
    "metaworld-videos": """vla/sim/metaworld.py --tasks {tasks} --episodes {count} --look {look} --seed {seed}
        --out {run}""",
    "metaworld-demos": "vla/sim/metaworld.py --tasks {tasks} --episodes {count} --seed 1{seed} --out {run}/robot",
    "tabletop-videos": """vla/demo.py --videos {count} --demonstrations 1 --body {look} --seed {seed} --with-actions
        --out {run}""",
    "tabletop-demos": "vla/demo.py --videos 1 --demonstrations {count} --seed 1{seed} --out {run}",
    "laq": """laq/train.py --data web={videos} --gap 4 --image-size {pixels} --patch {patch} --dim 96 --depth 2
        --code-seq-len 4 --codebook-size 8 --motion-weight 10 --steps {laq_steps} --batch-size 32 --lr 1e-3 --warmup 50
        --log-every 100 --eval-every 200 --save-every 200 --seed {seed} --device {device} --resume --out {run}""",
    "label": "laq/label.py --checkpoint {laq}/checkpoints/best --data {videos} --device {device} --out {run}",
    "stage2": "vla/train.py --data web={videos} --labels {labels} --backbone {backbone} --prompt {prompt} " + TRAIN,
    "idm": """vla/sim/idm.py --data robot={demos}/robot --val-episodes {held_out} --videos web={videos}
        --image-size {pixels} --seed {seed} --device {device} --out {run}""",
    "pretrain": """vla/finetune.py --data web={videos} {pseudo} --backbone {backbone} --backbone-lr 1 --prompt {prompt}
        --chunk {chunk} """
    + TRAIN,
    "stage3": """vla/finetune.py --data robot={demos}/robot --val-episodes {held_out} {start} --chunk {chunk} """
    + TRAIN,
    "test": """vla/evaluate.py --checkpoint {policy}/checkpoints/last --env {env} {env_tasks} --episodes {episodes}
        --n-action-steps {n_action_steps} --seed 9{seed} --device {device} --out {run}""",
}
# seconds on a quiet core, for the estimate of the time left until a stage has been measured
SECONDS = {"metaworld-videos": 500, "metaworld-demos": 110, "tabletop-videos": 30, "tabletop-demos": 10, "laq": 260}
SECONDS |= dict(label=60, stage2=130, idm=60, pretrain=130, stage3=60, test=80)


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
    add(
        "--tasks",
        nargs="+",
        choices=metaworld.TASKS,
        default=list(metaworld.TASKS),
        metavar="NAME",
        help="of metaworld",
    )
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
    if max(args.demos) > MOST_DEMOS:
        parser.error(f"--demos must be at most {MOST_DEMOS}")
    if ("given" in args.arms) != bool(args.labels):
        parser.error("--labels and the arm `given` go together")
    for name in ("demos", "videos", "laq_steps", "steps", "tune_steps", "episodes", "jobs"):
        if np.min(getattr(args, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return args


# --- the plan


@dataclass
class Job:
    """A stage, run once after the jobs that it needs: a process (`command`), or a function in this one."""

    name: str  # also the folder of what it writes
    stage: str  # its name in COMMANDS
    needs: list
    command: list | None
    function: object


def plan(args):
    """{name: Job} of the whole table, in the order in which they are begun: an arm after another, seed by seed."""
    out, jobs, meta = Path(args.out).resolve(), {}, args.env == "metaworld"
    tasks = [list(metaworld.TASKS).index(task) for task in args.tasks] if meta else [0]
    per_task = 1 if meta else len(tabletop.TASKS)  # of the tabletop's tasks only the sum is chosen
    pixels, most = (64 if meta else 32), MOST_DEMOS + HELD_OUT
    texts = list(metaworld.TASKS.values())
    if not meta:
        texts = [tabletop.instruction(i, verb) for i in range(len(tabletop.TASKS)) for verb in tabletop.VERBS]
    shared = dict(env=args.env, tasks=args.tasks, env_tasks=["--tasks", *args.tasks] if meta else [], pixels=pixels)
    shared |= dict(patch=pixels // 4, chunk=8 if meta else 4, n_action_steps=4 if meta else 1, episodes=args.episodes)
    shared |= dict(device=args.device, laq_steps=args.laq_steps, steps=args.steps, prompt="{instruction}")

    def add(stage, name, needs=(), function=None, **words):
        """Adds a job, unless it is there, and returns its name."""
        words, parts = shared | dict(run=out / name) | words, []
        for word in COMMANDS.get(stage, "").split():  # a list becomes several words
            value = words.get(word.strip("{}"))
            parts += map(str, value) if isinstance(value, list) else [word.format(**words)]
        jobs.setdefault(name, Job(name, stage, list(needs), [sys.executable, *parts] if parts else None, function))
        return name

    def cell(arm, seed, demos):
        """The jobs of one number of the table."""
        count = most * per_task
        demos_at = add(f"{args.env}-demos", f"demos-{seed}", seed=seed, count=count)
        backbone = f"backbone-{seed}"
        add("backbone", backbone, function=lambda run: build(run, texts, "film", pixels=pixels, seed=seed))
        held_out = ",".join(f"{1000 * task + demos * per_task}-{1000 * task + count - 1}" for task in tasks)
        own = dict(seed=seed, demos=out / demos_at, backbone=out / backbone, held_out=held_out)
        start, before = ["--backbone", out / backbone, "--prompt", "{instruction}", "--backbone-lr", 1], []
        if not arm.startswith("scratch"):
            before = [pretraining(arm, seed, demos, demos_at, own)]
            start = ["--init", out / before[0] / "checkpoints" / "best", "--backbone-lr", args.backbone_lr]
            start += ["--keep-head"] if arm.endswith("vpt") else []
        if arm == "actions":  # a policy already; tuned on few demonstrations it gets worse
            (policy,) = before
        else:
            steps = args.tune_steps + (args.steps if arm == "scratch_long" else 0)
            needs = [demos_at, backbone, *before]
            policy = add("stage3", f"stage3-{arm}-{seed}-{demos}", needs, **own | dict(start=start, steps=steps))
        add("test", f"test-{arm}-{seed}-{demos}", [policy], policy=out / policy, seed=seed)

    def pretraining(arm, seed, demos, demos_at, own):
        """The job that pretrains an arm."""
        other, backbone = arm.startswith("other"), f"backbone-{seed}"
        look = ("other" if meta else "light") if other else ("robot" if meta else "disc")
        count = args.videos * per_task
        videos = add(f"{args.env}-videos", "other" if other else "videos", look=look, seed=2 * other, count=count)
        own = own | dict(videos=out / videos)
        if arm == "actions":
            return add("pretrain", f"pretrain-{arm}-{seed}", [videos, backbone], **own, pseudo=[])
        if arm.endswith("vpt"):
            idm = add("idm", f"idm-{videos}-{seed}-{demos}", [videos, demos_at], **own)
            pseudo = ["--action-labels", out / idm / "web"]
            return add("pretrain", f"pretrain-{arm}-{seed}-{demos}", [idm, backbone], **own, pseudo=pseudo)
        if arm == "given":
            return add("stage2", f"stage2-{arm}-{seed}", [videos, backbone], **own, labels=Path(args.labels).resolve())
        laq = add("laq", f"laq-{videos}-{seed}", [videos], **own)
        labels = plain = add("label", f"label-{videos}-{seed}", [laq], **own, laq=out / laq)
        if arm in ("shuffled", "constant"):
            labels = f"label-{arm}-{seed}"
            add("relabel", labels, [plain], lambda run: relabel(out / plain, out / videos, run, arm, seed))
        return add("stage2", f"stage2-{arm}-{seed}", [labels, backbone], **own, labels=out / labels)

    for demos in args.demos:
        for seed in args.seeds:
            for arm in args.arms:
                cell(arm, seed, demos)
    return jobs


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


# --- running it


def die_with_parent():
    """Linux: this process is killed when its parent dies, even by kill -9. Else its folder stays locked."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Runner:
    """Runs jobs, `width` at a time. A finished one leaves OUT/done/NAME.json with its seconds, and is not run again."""

    def __init__(self, out, jobs, width, after):
        self.out, self.jobs, self.width, self.after = out, jobs, width, after
        self.done, self.running, self.stopped = {}, {}, 0
        for folder in ("done", "logs"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        for file in (out / "done").glob("*.json"):
            self.done[file.stem] = common.read_json(file)
        for name in common.SIGNALS:
            signal.signal(name, self.stop)

    def stop(self, number, frame=None):
        self.stopped = number
        for process, *_ in self.running.values():
            process.send_signal(signal.SIGTERM)  # a training stage saves and ends

    def left(self):
        """How much is done, and the estimate of the time left."""
        total, finished = 0.0, sum(name in self.done for name in self.jobs)
        for job in self.jobs.values():
            if job.name not in self.done:
                seen = [one["seconds"] for one in self.done.values() if one["stage"] == job.stage]
                total += np.mean(seen) if seen else SECONDS.get(job.stage, 5)
        return f"{finished} of {len(self.jobs)} stages done, about {total / self.width / 60:.0f} minutes left"

    def finish(self, job, began):
        took = dict(stage=job.stage, seconds=round(time.monotonic() - began, 1))
        with common.atomic(self.out / "done" / f"{job.name}.json") as path:
            path.write_text(json.dumps(took))
        self.done[job.name] = took
        self.after(job)
        print(f"{job.name}: {took['seconds']:.0f} s; {self.left()}", flush=True)

    def start(self, job):
        began = time.monotonic()
        if job.function:
            job.function(self.out / job.name)
            return self.finish(job, began)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        with open(self.out / "logs" / f"{job.name}.log", "ab") as log:
            options = dict(stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, env=env)
            options |= dict(preexec_fn=die_with_parent) if sys.platform == "linux" else {}
            self.running[job.name] = subprocess.Popen(job.command, **options), job, began

    def collect(self):
        for name, (process, job, began) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[name]
                if process.returncode == 0:
                    self.finish(job, began)
                elif not self.stopped:
                    self.stop(signal.SIGTERM)
                    log = self.out / "logs" / f"{name}.log"
                    end = log.read_text(errors="replace").strip().splitlines()[-1:]
                    raise common.DataError(f"stage {name} failed: {' '.join(end)} (all of it: {log})")

    def run(self):
        """Run all jobs; returns an exit code."""
        print(f"{self.out}: {self.left()}", flush=True)
        while self.running or not self.stopped and any(name not in self.done for name in self.jobs):
            for job in self.jobs.values():
                free = len(self.running) < self.width and not self.stopped
                waits = [name for name in job.needs if name not in self.done]
                if free and not waits and job.name not in self.done and job.name not in self.running:
                    self.start(job)
            time.sleep(0.2)
            self.collect()
        return {0: 0, signal.SIGINT: 130}.get(self.stopped, 75)


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
    for arm, demos in sorted(
        {(row["arm"], row["demos"]) for row in rows}, key=lambda key: (list(ARMS).index(key[0]), key)
    ):
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


def rollouts_of(test):
    """(instruction, success, frames (T, H, W, 3)) of the episodes that a test's rollouts.mp4 shows side by side."""
    rows = common.read_json(test / "report.json")["closed_loop"]["rows"]
    with av.open(str(test / "figures" / "rollouts.mp4")) as video:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    parts = np.split(frames, frames.shape[2] // frames.shape[1], axis=2)
    return [
        (row["instruction"], row["success"], part[: row["steps"] + 1]) for row, part in zip(rows, parts, strict=False)
    ]


def report(out):
    """Write tables and figures from the tests that are there."""
    rows = read_results(out)
    table = summarise(rows)
    texts = {"results.json": json.dumps(rows, indent=1), "table.md": "\n".join(markdown(table)) + "\n"}
    texts["tasks.md"] = "\n".join(task_tables(rows)) + "\n"
    for name, text in texts.items():
        with common.atomic(out / name) as path:
            path.write_text(text)
    pictures = {"success.png": figures.success(table, ARMS)}
    for ours in sorted(out.glob("test-latents-*/report.json"))[:1]:
        other = Path(str(ours.parent).replace("test-latents", "test-scratch"))
        if (other / "report.json").exists():
            tests = {
                "latent actions of videos, then demonstrations": ours.parent,
                "the same demonstrations alone": other,
            }
            pictures["rollouts.png"] = figures.compare({title: rollouts_of(test) for title, test in tests.items()})
    for name, picture in pictures.items():
        with common.atomic(out / name) as path:
            picture.savefig(path, format="png")


def main(argv=None):
    args = parse(argv)
    if args.env == "metaworld":
        metaworld.open_package()  # what is missing is said before anything is written
    out = Path(args.out).resolve()
    runner = Runner(out, plan(args), args.jobs, lambda job: report(out) if job.stage == "test" else None)
    code = runner.run()
    if code:
        print(f"stopped; the same command goes on: {runner.left()}", flush=True)
        return code
    print((out / "table.md").read_text())
    print(f"tables: {out}/table.md, tasks.md; figures: {out}/success.png, rollouts.png")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
