"""Logging and checkpoints: all that the six folders share. Copy it beside, or into, a folder that you lift out.

Flags, process group, precision, schedule and loop stand in each train.py. torch is imported inside functions, so that
--help and the JAX folder do not wait for it.
"""

import argparse
import atexit
import contextlib
import fcntl
import gc
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import sys
import time
import zlib
from importlib import metadata, util
from pathlib import Path

from tqdm import tqdm

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class DataError(Exception):
    """A user's mistake or a broken file. Scripts print it as one line and exit with 2; all else keeps its traceback."""


def fail(error):
    """Print a DataError as one line and exit with 2. A loader process puts its traceback before the message."""
    text = str(error).strip().partition("\ncommon.DataError: ")[2] or str(error)
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    os._exit(2)  # not sys.exit: the other ranks may never join this one's clean-up


def warn(text):
    print(f"warning: {text}", file=sys.stderr, flush=True)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with `@preset.args` files (comments allowed), defaults in --help, no abbreviations, one-line errors."""

    class Help(argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
            hidden = default is None or default is False or default in ("", argparse.SUPPRESS)
            return action.help + ("" if hidden else f" [{default}]")

    def __init__(self, description):
        more = dict(formatter_class=self.Help, fromfile_prefix_chars="@", allow_abbrev=False)
        super().__init__(description=description, **more)

    def convert_arg_line_to_args(self, line):
        try:
            line.encode()  # Python 3.12 reads bytes that are not UTF-8 as surrogates
            return shlex.split(line, comments=True)
        except UnicodeEncodeError:
            self.error("preset is not UTF-8")
        except ValueError as error:
            self.error(f"preset, {line.strip()}: {error}")

    def parse_known_args(self, *args, **more):
        try:
            return super().parse_known_args(*args, **more)
        except UnicodeDecodeError:
            self.error("preset is not UTF-8")

    def error(self, message):
        self.exit(2, f"error: {message}\n")


# --- processes


def is_main():
    """True in the one process that writes: rank 0 of torchrun, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def group():
    """torch.distributed if a process group of several ranks is up, else None."""
    dist = sys.modules["torch"].distributed if "torch" in sys.modules else None
    return dist if dist and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def broadcast(value=None):
    """Rank 0's value (any plain object) on all ranks. Also a barrier."""
    box = [value]
    if dist := group():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def mean(totals, counts):
    """{name: total / count} over all ranks; a name missing on a rank counts as nothing there. Called by every rank."""
    parts = [(totals, counts)]
    if dist := group():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (totals, counts))
    names = dict.fromkeys(name for part, _ in parts for name in part)
    count = {name: sum(part.get(name, 0.0) for _, part in parts) for name in names}
    return {name: sum(part.get(name, 0.0) for part, _ in parts) / max(count[name], 1e-12) for name in names}


def seed_all(*key):
    """Seed torch on all devices from numbers such as (seed, step): a resumed step draws what it drew before."""
    import torch

    torch.manual_seed(zlib.crc32(repr(key).encode()))


def settle():
    """Before a fork, as for a loader process: gives gloo's thread time to let go of the last collective.

    It holds a lock of CPython 3.11 meanwhile, and a child that is forked then waits for that lock for ever.
    """
    if group():
        time.sleep(0.05)


os.register_at_fork(before=settle)


def ignore_signals(_=None):
    """`worker_init_fn` of loaders: the training process alone answers a signal, then it ends its workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_children():
    """At exit: Python ends loader processes that are left by SIGTERM, which they ignore, and would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler calls a killed worker an error
    for child in multiprocessing.active_children():
        child.kill()


class Interrupt:
    """`stop = Interrupt(out)`: stop() is True on every rank after SIGTERM, SIGUSR1, Ctrl-C, or once OUT/stop exists.

    stop.code is then the exit code: 130 after Ctrl-C, else 75 (try again later).
    """

    def __init__(self, out):
        self.file, self.code = Path(out) / "stop", 0
        for number in SIGNALS:
            signal.signal(number, self.catch)
        atexit.register(end_children)

    def catch(self, number, frame):
        if number == signal.SIGINT and self.code:
            raise KeyboardInterrupt
        self.code = 130 if number == signal.SIGINT else 75
        os.write(2, b"\nending after this step\n")

    def __call__(self):
        code = self.code or (75 if is_main() and self.file.exists() else 0)
        if dist := group():
            import torch

            highest = torch.tensor(code)
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
            code = highest.item()
        self.code = max(code, self.code)  # a signal that came meanwhile counts at the next step
        return code > 0


# --- the run's folder


def lock(out):
    """Hold OUT/lock until this process ends, however it ends; DataError if a live process holds it."""
    try:
        handle = os.open(Path(out) / "lock", os.O_RDWR | os.O_CREAT, 0o644)  # never closed: that would let go of it
    except OSError as error:
        raise DataError(f"{out} cannot be written into ({error.strerror})") from None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(handle, 200).decode(errors="replace")
        raise DataError(f"{out} is in use by {holder}: wait for it, or choose another --out") from None
    except OSError as error:
        warn(f"{out} cannot be locked ({error.strerror}): see to it that no other process writes there")
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())


def open_run(args):
    """Rank 0 chooses, locks and prepares --out (args.json, run.args); every rank gets `args.out`.

    `args.fixed` names the flags (model, optimisation) that a resumed run keeps; all others may change.
    """
    if is_main():
        if args.wandb:
            try:
                import wandb  # noqa: F401
            except ImportError:
                raise DataError("--wandb needs a package: pip install wandb") from None
        number, runs = 0, Path("runs", args.folder)
        if args.out is None:
            make_folder(runs)
        while args.out is None:
            number += 1
            try:
                (runs / f"{number:03d}").mkdir()
                args.out = str(runs / f"{number:03d}")
            except FileExistsError:
                continue
            except OSError as error:
                raise DataError(f"{runs} cannot be written into ({error.strerror}): give --out") from None
        record, log = Path(args.out) / "args.json", Path(args.out) / "log.jsonl"
        begun = record.exists() and (step_folders(args.out) or (log.exists() and log.stat().st_size))
        if begun and not args.resume:  # one that ended before its first log line has left nothing to lose
            raise DataError(f"{args.out} holds a run already: --resume goes on with it, another --out starts a new one")
        make_folder(args.out)
        lock(args.out)
        remove(record.with_name("stop"))
        flags = {name: value for name, value in vars(args).items() if name not in ("demo", "fixed", "folder")}
        before = read_json(record)["flags"] if begun else flags
        for name in args.fixed:
            if before.get(name) != flags[name]:
                raise DataError(f"--resume keeps --{name.replace('_', '-')} {before.get(name)}, not {flags[name]}")
        for name in ("val_share", "val_episodes", "manifest") if step_folders(args.out) else ():
            if before.get(name) != flags.get(name):
                warn(f"--{name.replace('_', '-')} is not looked at: a resumed run holds out what it held out before")
        packages = [name for name in ("torch", "numpy", "jax", "transformers", "lerobot") if util.find_spec(name)]
        versions = {"python": sys.version.split()[0], **{name: metadata.version(name) for name in packages}}
        with atomic(record) as path:
            path.write_text(json.dumps(dict(folder=args.folder, flags=flags, versions=versions), indent=1))
        with atomic(record.with_name("run.args")) as path, open(path, "w") as file:
            for name, value in flags.items():
                if not (value is None or value is False or value == []) and name not in ("out", "resume"):
                    words = value if isinstance(value, list) else [] if value is True else [value]
                    print(f"--{name.replace('_', '-')}", *(shlex.quote(str(word)) for word in words), file=file)
    args.out = broadcast(args.out)


def read_json(path):
    """What a JSON file holds; DataError names the file when it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from None


class Logger:
    """Progress for people, log.jsonl for programs, figures, and wandb if asked for. Only rank 0 writes."""

    def __init__(self, args, first=0):
        self.out, self.steps, self.bar, self.wandb = Path(args.out), args.steps, None, None
        self.totals, self.count, self.seconds, self.waited = {}, 0, 1e-9, 0.0
        if not is_main():
            return
        (self.out / "figures").mkdir(exist_ok=True)
        file, kept = self.out / "log.jsonl", []
        for line in file.read_text(errors="replace").splitlines(keepends=True) if file.exists() else ():
            try:
                kept += [line] if json.loads(line)["step"] <= first else []
            except (ValueError, LookupError, TypeError):
                warn(f"{file}: a broken line is left out")
        with atomic(file) as path:
            path.write_text("".join(kept))
        self.bar = tqdm(total=self.steps, initial=first, unit="step", disable=not sys.stderr.isatty())
        if args.wandb:
            import wandb

            name = self.out / "wandb_id"  # one id: a resumed run goes on in the same curve
            name.write_text(name.read_text() if name.exists() else wandb.util.generate_id())
            more = dict(id=name.read_text(), resume="allow", dir=self.out, config=vars(args))
            try:
                self.wandb = wandb.init(project=args.wandb, **more)
            except wandb.errors.Error as error:
                raise DataError(f"--wandb: {error} (WANDB_MODE=offline needs no account)") from None

    def say(self, text):
        if is_main():
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def add(self, metrics, weight=1.0):
        """Sum metrics; `weight`: a micro-step's part of the step. Tensors stay on their device: no sync here."""
        for name, value in metrics.items():
            value = value.detach() if hasattr(value, "detach") else value
            self.totals[name] = self.totals.get(name, 0.0) + value * weight

    def tick(self, seconds, waited=0.0):
        """One optimizer step is done: its seconds, and how many of them it waited for data."""
        self.count, self.seconds, self.waited = self.count + 1, self.seconds + seconds, self.waited + waited
        if self.bar is not None:
            self.bar.update()

    def flush(self, **extra):
        """Means over ranks and steps of what was added since the last flush, and the speed. Every rank calls it."""
        totals = {f"train/{name}": float(value) for name, value in self.totals.items()}
        metrics = mean(totals, dict.fromkeys(totals, self.count))
        if not math.isfinite(metrics["train/loss"]):
            raise DataError(f"the loss is not finite; {self.out}/checkpoints is as it was: try a lower --lr")
        metrics |= {f"train/{name}": value for name, value in extra.items()}
        metrics |= dict(steps_per_s=self.count / self.seconds, data_fraction=self.waited / self.seconds)
        self.totals, self.count, self.seconds, self.waited = {}, 0, 1e-9, 0.0
        return metrics

    def write(self, step, metrics):
        """One line of log.jsonl at `step`, and one for people with the time left."""
        if not is_main():
            return
        plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        try:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **plain}) + "\n")
        except OSError as error:
            raise DataError(f"{self.out}/log.jsonl cannot be written ({error.strerror})") from None
        if self.wandb:
            self.wandb.log(metrics, step=step)
        shown = "  ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in metrics.items())
        left = (self.steps - step) / metrics["steps_per_s"] if "steps_per_s" in metrics else 0
        self.say(f"step {step}/{self.steps}  {shown}" + (f"  left {tqdm.format_interval(left)}" if left else ""))

    def figure(self, step, name, figure):
        """Write figures/NAME.png (and to wandb)."""
        path = self.out / "figures" / f"{name}.png"
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png")
        gc.collect()  # a figure is a web of cycles, a MB and more, that Python finds late among transformers' objects
        if self.wandb:
            import wandb

            self.wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self):
        if self.bar is not None:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()


# --- files and checkpoints


def make_folder(path, flag="--out"):
    """Make a folder that a flag names, if it is not there; DataError if it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{flag} {path}: {error.strerror}") from None


def sync(path):
    """Flush a file or folder to the disk; for folders some file systems (CIFS, FUSE) refuse it."""
    handle = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        os.fsync(handle)
    os.close(handle)


def remove(path):
    """Remove a file, link or folder, if it is there; what cannot be removed (a busy .nfs file) is named."""
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    except OSError as error:
        warn(f"{path} cannot be removed ({error.strerror}); remove it by hand")


@contextlib.contextmanager
def atomic(path, folder=False):
    """A temporary neighbour of `path` to write into, synced and renamed at the end: `path` is complete or absent."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        remove(temporary)
        if folder:
            temporary.mkdir(parents=True)
        yield temporary
        for part in [*temporary.rglob("*"), temporary] if folder else [temporary] * (not temporary.is_symlink()):
            sync(part)
        if folder:
            remove(path)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        remove(temporary)
        # a full disk or a quota, in the words of torch and safetensors, who raise no OSError
        full = any(words in str(error) for words in ("file write failed", "unexpected pos", "(os error"))
        if isinstance(error, OSError) or full:
            raise DataError(f"{path} cannot be written ({' '.join(str(error).split())[:150]})") from None
        raise


def step_folders(out):
    """The checkpoint folders of a run, oldest first."""
    found = (path for path in (Path(out) / "checkpoints").glob("step_*") if path.name[5:].isdigit())
    return sorted(found, key=lambda path: int(path.name[5:]))


@contextlib.contextmanager
def checkpoint(out, step, best=False, keep=2):
    """A folder to fill that becomes OUT/checkpoints/step_NNNNNNN, linked as `last` (and `best`). Rank 0 only.

    manifest.json lists the size of every file. The newest `keep` checkpoints stay, and the best one.
    """
    root = Path(out) / "checkpoints"
    root.mkdir(exist_ok=True)
    with atomic(root / f"step_{step:07d}", folder=True) as folder:
        yield folder
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        (folder / "manifest.json").write_text(json.dumps(dict(step=step, best=best, files=sizes), indent=1))
    link(root / f"step_{step:07d}", best)
    kept = [root / f"step_{step:07d}", *[old for old in step_folders(out) if was_best(old)][-1:]]
    for old in step_folders(out)[:-keep]:
        if old not in kept:
            remove(old / "manifest.json")  # killed in here: not taken for a complete checkpoint
            remove(old)


def was_best(folder):
    """Whether a checkpoint was the best so far when it was saved: known without links, too."""
    with contextlib.suppress(DataError, AttributeError):
        return read_json(folder / "manifest.json").get("best") is True


def link(folder, best):
    """Point `last`, and `best` if it is the best so far, at a checkpoint."""
    for name in ["last"] + ["best"] * best:
        path = folder.parent / name
        if path.is_dir() and not path.is_symlink():  # the run was copied, and its links became folders
            remove(path)
        try:
            with atomic(path) as temporary:
                temporary.symlink_to(folder.name)
        except DataError as error:  # a file system without links: the run itself does not need them
            warn(f"no link to {folder.name}: {error}")


def newest(out):
    """The newest complete checkpoint folder of a run, or None, the same on all ranks; corrupt ones are named."""
    found = None
    for folder in reversed(step_folders(out)) if is_main() else ():
        try:
            manifest = read_json(folder / "manifest.json")
            wrong = [name for name, size in manifest["files"].items() if (folder / name).stat().st_size != size]
        except (DataError, OSError, LookupError, TypeError, AttributeError) as error:
            wrong = [str(error)]
        if not wrong:
            found = str(folder)
            link(folder, manifest.get("best") is True)  # killed between a checkpoint and its links
            break
        warn(f"{folder} is corrupt ({wrong[0]}): trying the one before")
    for temporary in (Path(out) / "checkpoints").glob(".*.tmp") if is_main() else ():  # of dead processes: we hold OUT
        remove(temporary)
    found = broadcast(found)
    return Path(found) if found else None


def load(path):
    """torch.load that never runs code; DataError for a file that is missing, broken or holds more than plain values."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a broken file torch raises struct.error, IndexError and a dozen more
        text = (str(error) or type(error).__name__).splitlines()[0][:150]
        raise DataError(f"{path}: not a checkpoint that is safe to load ({text})") from None
