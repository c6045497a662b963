"""Damage to files, drawn by a seed, and a judge of the readers that meet it."""

import io
import json
import os
import pickle
import signal
import struct
import sys
import traceback
import zipfile
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT

sys.path.insert(1, str(ROOT))
import common

LIMIT = 20  # seconds for one file of a few kB, after which it counts as a hang
WEIRD = [None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "", "ü\n", "\0", [], {}, [[]], [None], {"a": {}}]
ARRAYS = [np.zeros(0), np.zeros((0, 3)), np.array(5.0), np.full((20, 3), np.nan), np.zeros((3, 2, 2, 2)), np.zeros(20)]
ARRAYS += [np.array(["text"]), np.zeros((20, 3), complex), np.zeros((20, 3), bool), np.zeros((7, 3)), np.array([b"x"])]
ARRAYS += [
    np.zeros(20, "M8[s]"),
    np.zeros(3, [("a", "f4"), ("b", "i8")]),
    np.arange(20.0)[::-1],
    np.full((20, 3), 1e300),
]


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damaged(path, draw, mark):
    """The bytes of a file with one to three damages: of values inside of its format, or of bytes.

    draw: random.Random; mark: the folder that code in the file would make.
    """
    data, deep = path.read_bytes(), draw.random() < 0.5
    for _ in range(draw.randint(1, 3)):
        try:
            if deep and path.suffix == ".npz":
                data = damage_archive(data, draw, mark)
            elif deep and data[:1] in (b"{", b"["):
                data = damage_json(data, draw)
            elif deep and path.suffix in (".bin", ".pt"):
                file = io.BytesIO()
                torch.save(dict(step=1, opt=Evil(mark)), file, _use_new_zipfile_serialization=draw.random() < 0.5)
                return draw.choice([file.getvalue(), pickle.dumps(Evil(mark), protocol=2)])
            else:
                data = damage_bytes(data, draw)
        except (ValueError, zipfile.BadZipFile):  # what the damage before left is not of the format any more
            data = damage_bytes(data, draw)
    return data


def damage_bytes(data, draw):
    data, at, length = bytearray(data), draw.randint(0, max(len(data) - 1, 0)), draw.randint(1, 64)
    part = slice(at, at + length)
    match draw.choice(["flip", "zero", "ones", "cut out", "cut off", "repeat", "huge"]):
        case "flip" if data:
            data[at] ^= draw.randint(1, 255)
        case "zero":
            data[part] = bytes(length)
        case "ones":
            data[part] = b"\xff" * length
        case "cut out":
            del data[part]
        case "cut off":
            del data[at:]
        case "repeat":
            data[at:at] = data[part] * 3
        case "huge":  # a length or an offset that leads far away
            data[at : at + 8] = struct.pack("<Q", 1 << draw.randint(0, 63))
    return bytes(data)


def damage_json(data, draw):
    """A value of a JSON document is replaced, or removed, or the whole document is another one."""
    tree, places = json.loads(data), []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    if not places or draw.random() < 0.05:
        return json.dumps(draw.choice(WEIRD)).encode()
    node, key = draw.choice(places)
    if draw.random() < 0.2:
        node.pop(key)
    else:
        node[key] = draw.choice(WEIRD)
    return json.dumps(tree).encode()


def damage_archive(data, draw, mark):
    """An npz whose checksums are right and whose arrays are not: another shape or type, a pickle, one less."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name, file = draw.choice(sorted(members)), io.BytesIO()
    match draw.choice(["bytes", "pickle", "lost", "array", "array"]):
        case "bytes":
            members[name] = damage_bytes(members[name], draw)
        case "pickle":
            np.lib.format.write_array(file, np.array([Evil(mark)], object), allow_pickle=True)
            members[name] = file.getvalue()
        case "lost" if len(members) > 1:
            del members[name]
        case _:
            np.lib.format.write_array(file, draw.choice(ARRAYS))
            members[name] = file.getvalue()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return made.getvalue()


# --- judging


class Hang(BaseException):
    pass


def ring(*_):
    raise Hang


seen, watching = [], [False]
RUNS_CODE = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn", "pickle.find_class", "os.mkdir"}
sys.addaudithook(lambda event, words: seen.append(event) if watching[0] and event in RUNS_CODE else None)


def judge(read, limit=LIMIT):
    """None if a reader returned or raised DataError, else what it did and where in our code."""
    signal.signal(signal.SIGALRM, ring)
    seen.clear()
    try:
        signal.setitimer(signal.ITIMER_REAL, limit)
        watching[0] = True
        read()
    except common.DataError as error:
        if len(str(error)) > 2000:
            return f"a message of {len(str(error))} characters at {place(error)}"
    except Hang as error:
        return f"hang at {place(error)}"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} at {place(error)}"
    finally:
        watching[0] = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    return f"ran code: {sorted(set(seen))}" if seen else None


def place(error):
    """file:line of the last frame in this repository's own code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(ROOT) in frame.filename]
    frames = [frame for frame in frames if "tests" not in Path(frame.filename).parts] or frames
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "?"
