"""What all folders share and nothing more: flags, launch, precision, schedule, log, checkpoints, signals.

It knows no model, batch, loss or loop. Copy it beside (or into) a folder that you lift into another project.
"""

import argparse
import contextlib
import datetime
import difflib
import importlib.metadata
import json
import locale
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

# Flags that a resumed run may change; every other one would make it another run.
FREE = set(
    "out steps compile device devices compile_cache workers log_every eval_every save_every keep resume wandb".split()
)


# --- flags


def given(value):
    """False for a flag's None, a switch that is off, an empty list; 0 is a value."""
    return value is not None and value is not False and value not in ([], argparse.SUPPRESS)


def flag(name):
    """lr_end -> --lr-end."""
    return f"--{name.replace('_', '-')}"


class Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        words = action.default if isinstance(action.default, list) else [action.default]
        return action.help + (f" [{' '.join(map(str, words))}]" if given(action.default) else "")


class Parser(argparse.ArgumentParser):
    """argparse with `@preset.args` files, no abbreviations, and a hint for a mistyped flag."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=Help, fromfile_prefix_chars="@", allow_abbrev=False)
        self.words = []

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def parse_args(self, args=None, namespace=None):
        self.words = sys.argv[1:] if args is None else args
        return super().parse_args(args, namespace)

    def error(self, message):
        known = [flag for action in self._actions for flag in action.option_strings]
        words = [word.partition("=")[0].rstrip(":,") for word in [*self.words, *message.split()]]
        wrong = [word for word in words if word.startswith("--") and word not in known]
        close = difflib.get_close_matches(wrong[0], known, 1) if wrong else []
        self.exit(2, f"error: {message}{f'; {wrong[0]}: did you mean {close[0]}?' if close else ''}\n")


def flags(doc, omit=()):
    """The flags that every train.py shares. `omit`: names that a folder cannot honour, such as {"amp"}."""
    parser = Parser(doc)
    group = parser.add_argument_group("run")

    def add(name, help, **kwargs):
        if name not in omit:
            group.add_argument(f"--{name}", help=help, **kwargs)

    whole, real = dict(type=int, metavar="N"), dict(type=float, metavar="X")
    add("data", "where the data is; without it the demo runs on data it writes itself", nargs="+", metavar="PATH")
    add("out", "folder of this run; without it the next free runs/FOLDER/NNN", metavar="DIR")
    add("steps", "optimizer steps in all", default=1000, **whole)
    add("batch-size", "samples per optimizer step, over all processes and micro-steps", default=64, **whole)
    add("accum", "micro-steps per optimizer step: less memory, same batch", default=1, **whole)
    add("lr", "peak learning rate", default=1e-3, **real)
    add("lr-end", "learning rate after the last step (cosine)", default=0.0, **real)
    add("warmup", "steps of linear warm-up", default=100, **whole)
    add("betas", "AdamW betas", default=[0.9, 0.95], nargs=2, **real)
    add("weight-decay", "AdamW weight decay of matrices", default=0.1, **real)
    add("clip", "largest norm of the gradient", default=1.0, **real)
    add("amp", "mixed precision", choices=["off", "bf16", "fp16"], default="off")
    add("compile", "torch.compile the model", action="store_true")
    add("device", "auto, cpu, cuda, cuda:1, mps, xpu (ROCm is cuda)", default="auto", metavar="NAME")
    add("workers", "loader processes per rank; 0 loads in the training process", default=0, **whole)
    add("seed", "of weights, batches, augmentation and noise", default=0, **whole)
    add("log-every", "steps between two log lines", default=50, **whole)
    add("eval-every", "steps between two validations", default=500, **whole)
    add("save-every", "steps between two checkpoints", default=500, **whole)
    add("keep", "newest checkpoints kept beside the best", default=2, **whole)
    add("resume", "go on from OUT's newest whole checkpoint, or start if there is none", action="store_true")
    add("init", "checkpoint whose weights to start from", metavar="CKPT")
    add("wandb", "also log to this Weights & Biases project", metavar="PROJECT")
    return parser


def parse(parser, argv, demo):
    """Parse `argv`; without --data, put the preset `demo` in front of it. `args.demo` says which it was."""
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    args = parser.parse_args(argv)
    args.demo = args.data is None
    if args.demo:
        if os.environ.get("RANK", "0") == "0":
            print(f"no --data: running the demo (the flags of {demo.name}, data written by demo.py)", flush=True)
        args = parser.parse_args([f"@{demo}", *argv], argparse.Namespace(demo=True))
    for name in ("steps", "batch_size", "accum", "lr", "clip", "log_every", "eval_every", "save_every", "keep"):
        if not getattr(args, name, 1) > 0:
            parser.error(f"{flag(name)} must be above 0")
    for name in ("warmup", "workers", "seed", "lr_end", "weight_decay"):
        if not getattr(args, name, 0) >= 0:
            parser.error(f"{flag(name)} must not be negative")
    if args.resume and not args.out:
        parser.error("--resume needs --out, the folder of the run to go on with")
    args.folder = demo.parent.name
    return args


def report_folder(parser, args):
    """--out of a report; without it RUN/report, for --checkpoint RUN/checkpoints/NAME."""
    run = Path(args.checkpoint or ".").resolve().parent.parent
    if not args.out and not (args.checkpoint and (run / "args.json").exists()):
        parser.error("give --out DIR: there is no run of --checkpoint to write the report to")
    return args.out or str(run / "report")


def brief(error):
    """The first line of an error, or its kind if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0][:150]


def run(main):
    """Call `main`. A user's mistake, a broken file, a dead loader: one line and exit code 2 (TRACEBACK=1: where)."""
    if not sys.flags.utf8_mode and locale.getencoding().lower() != "utf-8":  # names and texts are the same everywhere
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONUTF8": "1"})
    try:
        sys.exit(main())
    except (ValueError, OSError, RuntimeError) as error:
        dead = isinstance(error, ConnectionResetError) or "DataLoader worker" in str(error)
        if os.environ.get("TRACEBACK") or not (dead or isinstance(error, ValueError | OSError)):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        text = "a loader process died; if memory ran out, use fewer --workers" if dead else text
        print(f"error: {text}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    sys.stdout.flush()
    os._exit(2)  # not sys.exit: the other ranks may never join this one's clean-up


# --- launch


def setup(args):
    """Join the process group if torchrun started us; pick and seed the device. Returns rank, world, device."""
    import torch

    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    name = args.device
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = found.type if found else "cpu"
    try:
        device = torch.device(name if ":" in name or name in ("cpu", "mps") else f"{name}:{local}")
        torch.zeros(1, device=device)
        if device.type not in ("cpu", "mps"):
            torch.accelerator.set_device_index(device.index)
            torch.set_float32_matmul_precision("high")
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {args.device}: {brief(error)}") from None
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        patience = datetime.timedelta(seconds=float(os.environ.get("DIST_TIMEOUT", 600)))  # gloo's own: half an hour
        gpu = device if device.type == "cuda" else None
        torch.distributed.init_process_group(backend, timeout=patience, device_id=gpu)
    seed(args.seed)
    return SimpleNamespace(rank=rank, world=max(world, 1), device=device, main=rank == 0)


def share(dist, value):
    """Rank 0's `value` (any plain object) on all ranks."""
    if dist.world == 1:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def seed(*key):
    """Seed torch from numbers such as (seed, step, rank), so that a resumed step draws what it drew before."""
    import torch

    number = zlib.crc32(repr(key).encode())
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes 0.1 ms where CUDA sleeps
    for backend in (torch.cuda, torch.xpu):
        if backend.is_initialized():
            backend.manual_seed(number)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


def cleanup(dist, log):
    log.close()
    if dist.world > 1:
        import torch

        torch.distributed.barrier()  # 30 s after the first process has ended torchrun kills rank 0 in its last save
        time.sleep(0.5)  # gloo's thread lets go of the barrier; joined before that, it waits for the GIL for ever
        torch.distributed.destroy_process_group()


def autocast(args, device):
    """(context, scaler). The scaler skips a step whose gradient is not finite in every precision; it scales in fp16."""
    import torch

    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    context = torch.autocast(device.type, dtype, enabled=args.amp != "off")
    # without fp16 the scale stays 1: it never grows, and backs off to what rounds to 1 again
    grow = dict(init_scale=1.0, growth_interval=2**31 - 1, backoff_factor=math.nextafter(1, 0))
    grow = {} if args.amp == "fp16" else grow
    return context, torch.amp.GradScaler(device.type, **grow)


def unwrap(model):
    """The module inside DDP and torch.compile."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


def cosine(step, args):
    """Learning rate of `step`: linear warm-up to --lr, then half a cosine down to --lr-end at --steps."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = min(1.0, (step - args.warmup) / max(1, args.steps - args.warmup))
    return args.lr_end + (args.lr - args.lr_end) * 0.5 * (1 + math.cos(math.pi * done))


def mean(dist, totals, counts):
    """{name: total / count} over all ranks; a name missing on a rank counts as nothing there. Called by every rank."""
    if dist.world > 1:
        import torch

        parts = [None] * dist.world
        torch.distributed.all_gather_object(parts, (totals, counts))
        names = [name for part, _ in parts for name in part]
        totals = {name: sum(part.get(name, 0.0) for part, _ in parts) for name in names}
        counts = {name: sum(part.get(name, 0.0) for _, part in parts) for name in names}
    return {name: total / max(counts[name], 1e-12) for name, total in totals.items()}


# --- the run's folder


def open_run(args, dist):
    """Choose (rank 0) and prepare --out: args.json, run.args. Refuses a folder that holds another run."""
    if dist.main and args.out is None:
        root = Path("runs") / args.folder
        root.mkdir(parents=True, exist_ok=True)
        used = [int(path.name) for path in root.iterdir() if path.name.isdigit()]
        for number in range(max(used, default=0) + 1, 1_000_000):
            with contextlib.suppress(FileExistsError):
                (root / f"{number:03d}").mkdir()
                args.out = str(root / f"{number:03d}")
                break
    args.out = share(dist, args.out)
    if not dist.main:
        return
    out = Path(args.out)
    before = out / "args.json"
    if before.exists() and not args.resume:
        raise ValueError(f"{out} holds a run already: --resume goes on with it, another --out starts a new one")
    out.mkdir(parents=True, exist_ok=True)
    (out / "stop").unlink(missing_ok=True)
    now = {name: value for name, value in vars(args).items() if name != "demo"}
    old = json.loads(before.read_text())["flags"] if before.exists() else now
    for name in sorted(set(old) | set(now)):
        was, new = old.get(name), now.get(name)
        if name not in FREE and was != new:
            raise ValueError(f"{flag(name)} was {was} and is now {new}: a resumed run keeps its flags")
    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "numpy", "jax", "transformers", "lerobot"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit = None
    if shutil.which("git"):
        git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    with atomic(before) as path:
        path.write_text(json.dumps(dict(flags=now, versions=versions, commit=commit, world=dist.world), indent=1))
    lines = [f"# python {args.folder}/train.py @run.args"]
    for name, value in now.items():
        if name not in ("folder", "out", "resume") and given(value):
            words = [] if value is True else value if isinstance(value, list) else [value]
            lines.append(" ".join([flag(name), *(shlex.quote(str(word)) for word in words)]))
    with atomic(out / "run.args") as path:
        path.write_text("\n".join(lines) + "\n")


class Logger:
    """Progress for people, log.jsonl for programs, figures, and wandb if asked for. Only rank 0 writes."""

    def __init__(self, args, dist, first=0):
        self.args, self.dist, self.out = args, dist, Path(args.out)
        self.totals, self.count, self.waited, self.seconds = {}, 0, 0.0, 0.0
        self.since, self.bar, self.wandb = time.monotonic(), None, None
        if not dist.main:
            return
        file = self.out / "log.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        keep = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first]
        with atomic(file) as path:
            path.write_text("".join(keep))
        (self.out / "figures").mkdir(exist_ok=True)
        shown = sys.stderr.isatty()
        self.bar = tqdm(total=args.steps, initial=first, unit="step", disable=not shown, dynamic_ncols=True)
        if args.wandb:
            import wandb

            name = self.out / "wandb_id"
            identity = name.read_text() if name.exists() else wandb.util.generate_id()
            name.write_text(identity)
            more = dict(id=identity, resume="allow", dir=self.out, config=vars(args))
            try:
                self.wandb = wandb.init(project=args.wandb, **more)
            except wandb.errors.Error as error:
                raise ValueError(f"--wandb: {brief(error)} (WANDB_MODE=offline needs no account)") from None

    def say(self, text):
        if self.dist.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def add(self, metrics, share=1.0):
        """Sum metrics, a micro-step's by its share of the step. Tensors stay on their device: no sync here."""
        for name, value in metrics.items():
            value = value.detach() if hasattr(value, "detach") else value
            self.totals[name] = self.totals.get(name, 0.0) + value * share

    def tick(self, waited=0.0):
        """One optimizer step is done; `waited`: seconds of it spent waiting for data."""
        now = time.monotonic()
        self.count, self.waited, self.seconds = self.count + 1, self.waited + waited, self.seconds + now - self.since
        self.since = now
        if self.bar is not None:
            self.bar.update()

    def flush(self, **extra):
        """Means over ranks and steps of what was added since the last flush, and the speed. Every rank calls it."""
        totals = {f"train/{name}": float(value) for name, value in self.totals.items()}
        metrics = mean(self.dist, totals, dict.fromkeys(totals, self.count))
        if not math.isfinite(metrics["train/loss"]):
            raise ValueError(
                f"the loss is not finite; {self.out}/checkpoints is as it was: try a lower --lr or --amp off"
            )
        seconds = max(self.seconds, 1e-9)
        metrics |= {f"train/{name}": value for name, value in extra.items()}
        metrics |= {"steps_per_s": self.count / seconds, "data_share": self.waited / seconds}
        self.totals, self.count, self.waited, self.seconds = {}, 0, 0.0, 0.0
        return metrics

    def write(self, step, metrics):
        """One line of log.jsonl at `step`."""
        if not self.dist.main:
            return
        plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **plain}) + "\n")
        if self.wandb:
            self.wandb.log(metrics, step=step)
        shown = "  ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in metrics.items())
        self.say(f"step {step}/{self.args.steps}  {shown}")

    def figure(self, step, name, figure):
        """Write figures/NAME.png (and to wandb); returns its path."""
        path = self.out / "figures" / f"{name}.png"
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png")
        if self.wandb:
            import wandb

            self.wandb.log({name: wandb.Image(str(path))}, step=step)
        return path

    def pause(self):
        """Leave what happened since the last step (validation, saving) out of the speed."""
        self.since = time.monotonic()

    def close(self):
        if self.bar is not None:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()


# --- checkpoints


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def discard(path):
    """Remove a file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic(path, folder=False):
    """A temporary neighbour of `path` to write into; synced and renamed at the end, so `path` is whole or absent."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        discard(temporary)
        if folder:
            temporary.mkdir(parents=True)
        yield temporary
        for part in [*temporary.rglob("*"), temporary] if folder else [temporary]:
            sync(part)
        if folder:
            discard(path)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        discard(temporary)
        raise


def checksum(path):
    """CRC-32 of a file, read in parts: weights may be larger than memory."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def numbered(root):
    """The checkpoint folders of a run, oldest first."""
    return sorted(root.glob("step_*"), key=lambda path: int(path.name[5:]))


def card(args, step):
    """A model card to complete: what, from which data, the newest validation, licence."""
    log, found = Path(args.out) / "log.jsonl", {}
    for line in log.read_text().splitlines() if log.exists() else ():
        found |= {name: value for name, value in json.loads(line).items() if name.startswith("val/")}
    data = " ".join(shlex.quote(str(word)) for word in args.data)
    rows = [f"| `{name}` | {value:.4g} |" for name, value in found.items() if value is not None]
    return "\n".join(
        [
            *("---", "license: other  # yours to choose; the data's licence may bind it", "---", ""),
            *(f"# {args.folder}, step {step} of {args.steps}", ""),
            *(f"Trained with `{args.folder}/train.py` on `{data}`; all flags are in the run's `args.json`.", ""),
            *("What it is for, and what it is not for: (to be written)", ""),
            *("Data, its origin and licence: (to be written)", ""),
            *(["| held-out metric | value |", "| --- | ---: |", *rows, ""] if rows else []),
        ]
    )


@contextlib.contextmanager
def checkpoint(args, step, best=False):
    """A folder to fill that becomes OUT/checkpoints/step_NNNNNNN, linked as `last` (and `best`). Rank 0 only."""
    root = Path(args.out) / "checkpoints"
    root.mkdir(exist_ok=True)
    with atomic(root / f"step_{step:07d}", folder=True) as folder:
        yield folder
        if best:
            (folder / "best").touch()
        (folder / "README.md").write_text(card(args, step))
        sums = {str(p.relative_to(folder)): checksum(p) for p in folder.rglob("*") if p.is_file()}
        (folder / "whole.json").write_text(json.dumps(sums, indent=1))
    links(root / f"step_{step:07d}")
    kept = {(root / link).resolve() for link in ("last", "best") if (root / link).exists()}
    for old in numbered(root)[: -args.keep]:
        if old.resolve() not in kept:
            stale = old.rename(old.with_name(f".{old.name}.{os.getpid()}.tmp"))  # killed in here: no half checkpoint
            shutil.rmtree(stale)


def links(folder):
    """Point `last` at a checkpoint, and `best` if it was the best when it was saved."""
    for link in ["last"] + ["best"] * (folder / "best").exists():
        with atomic(folder.parent / link) as temporary:
            temporary.symlink_to(folder.name)


def save(args, dist, step, model, opt, scaler, best, is_best=False):
    """`model.save_pretrained` and the training state into a checkpoint. `best`: the best validation metric so far."""
    if not dist.main:
        return
    import torch

    state = dict(step=step, best=best, opt=opt.state_dict(), scaler=scaler.state_dict())
    try:
        with checkpoint(args, step, is_best) as folder:
            unwrap(model).save_pretrained(folder)
            torch.save(state, folder / "resume.pt")
    except Exception as error:  # when a disk is full torch says RuntimeError, and safetensors has an error of its own
        if not isinstance(error, RuntimeError) and type(error).__name__ != "SafetensorError":
            raise
        raise OSError(f"cannot write {args.out}/checkpoints ({brief(error)})") from None


def load(path):
    """torch.load that never runs code: a pickle with anything but tensors and plain values is a ValueError."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # for a damaged file torch raises struct.error, IndexError and a dozen more
        raise ValueError(f"{path}: not a checkpoint that is safe to load ({brief(error)})") from None


def newest(args, dist):
    """The newest whole checkpoint of --out, or None; damaged ones are named and passed over."""
    found = None
    if dist.main:
        root = Path(args.out) / "checkpoints"
        for stale in root.glob(".*.tmp"):
            discard(stale)
        for folder in reversed(numbered(root)):
            try:
                sums = json.loads((folder / "whole.json").read_text())
                wrong = [name for name, crc in sums.items() if checksum(folder / name) != crc]
                if not wrong:
                    found = str(folder)
                    break
            except (OSError, ValueError, AttributeError, TypeError) as error:  # whole.json is another kind of json
                wrong = [str(error)]
            print(f"{folder} is damaged ({wrong[0]}); trying the one before", flush=True)
        if found:
            links(Path(found))  # killed between a checkpoint and its links
    found = share(dist, found)
    return Path(found) if found else None


def resume(args, dist, model, opt, scaler):
    """Restore weights and training state if --resume; returns (first step, best metric). --init: weights alone."""
    folder = newest(args, dist) if args.resume else None
    if folder is None:
        if args.init:
            model.load_pretrained(args.init)
        return 0, None
    model.load_pretrained(folder)
    state = load(folder / "resume.pt")
    opt.load_state_dict(state["opt"])
    scaler.load_state_dict(state["scaler"])
    return state["step"], state["best"]


class Interrupt:
    """True once SIGTERM, SIGUSR1, Ctrl-C or a file OUT/stop asks to end; all ranks agree on the step."""

    def __init__(self, args, dist):
        self.dist, self.file, self.signal = dist, Path(args.out) / "stop", 0
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(name, self.catch)

    def catch(self, number, frame):
        if number == signal.SIGINT:
            if self.signal:
                raise KeyboardInterrupt
            if self.dist.main:
                os.write(2, b"\nending after this step; Ctrl-C again ends at once\n")
        self.signal = number

    def __call__(self):
        asked = self.signal or (self.dist.main and self.file.exists())
        if self.dist.world > 1:
            import torch

            flag = torch.tensor([float(bool(asked))])
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            asked = flag.item()
        return bool(asked)

    @property
    def code(self):
        return 130 if self.signal == signal.SIGINT else 75
