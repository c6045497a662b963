"""RLDS tfrecords as in Open X-Embodiment: a record is an episode with all its cameras."""

import os
from pathlib import Path

import numpy as np

from common import DataError
from readers.recording import Entry, Recording, as_rows, check_file, relative
from readers.video import picture

LANGUAGE = ("language_instruction", "language_instruction_2", "language_instruction_3")
LANGUAGE += ("observation/natural_language_instruction", "observation/instruction")


def entries(source, files):
    protobuf()
    root, found = Path(os.path.commonpath([file.parent for file in files])), []
    for file in files:
        stem = relative(file, root).replace(".tfrecord", "").partition("-of-")[0]
        try:
            check_file(file)
            spans = list(records(file))
        except DataError:
            spans = []
        for number, (first, last) in enumerate(spans or [(0, 1)]):  # a file without records is one broken record
            more = dict(actions="delta", start=first, length=last - first)
            found.append(Entry(source, f"{stem}-{number}", "tfrecord", str(file), **more))
    return found, []


def records(file):
    """[from, to) in bytes of each record's data in a tfrecord: length (8 bytes), its crc (4), data, data's crc (4)."""
    with open(file, "rb") as stream:
        while header := stream.read(12):
            first = stream.tell()
            last = first + int.from_bytes(header[:8], "little")
            yield first, last
            if last > os.path.getsize(file):  # cut off, or no tfrecord
                return
            stream.seek(last + 4)


def protobuf():
    """(the message tf.train.Example, the error of bytes that are none). Only RLDS needs this package."""
    try:
        from google.protobuf.message import DecodeError
        from tfrecord.example_pb2 import Example
    except ImportError:
        raise DataError("RLDS tfrecords need one more package: pip install tfrecord") from None
    return Example, DecodeError


def example_of(entry):
    """The entry's record as {feature: list}."""
    Example, DecodeError = protobuf()
    check_file(entry.path)
    with open(entry.path, "rb") as file:
        file.seek(entry.start)
        data = file.read(entry.length) if entry.start + entry.length <= os.path.getsize(entry.path) else b""
    if len(data) < entry.length:
        raise DataError("truncated: its last record is not complete")
    try:
        features = Example.FromString(data).features.feature
    except DecodeError as error:
        raise DataError(f"not a tfrecord of tf.train.Example ({error})") from None
    kinds = {key: feature.WhichOneof("kind") for key, feature in features.items()}
    return {key: list(getattr(features[key], kind).value) for key, kind in kinds.items() if kind}


def opened(entry):
    """A Recording of each camera of the record."""
    example = example_of(entry)
    cameras = [key for key, values in sorted(example.items()) if is_camera(key, values)]
    if not cameras:
        raise DataError("its record has no pictures of 8 bits")
    length = len(example.get("steps/is_first") or example[cameras[0]])
    actions, action_parts = numbers(example, "steps/action", length)
    state, state_parts = numbers(example, "steps/observation/state", length)
    rows = {name: as_rows(name, table) for name, table in (("actions", actions), ("state", state)) if table is not None}
    missing = [name for name in ("actions", "state") if name not in rows]
    notes = [f"no {name}: its features are {', '.join(sorted(example))}" for name in missing]
    parts = dict(actions_parts=action_parts, state_parts=state_parts)
    more = {name: names for name, names in parts.items() if len(names) > 1}
    for camera in cameras:
        cells, name = example[camera], camera.removeprefix("steps/observation/")
        frames = (picture(cell, f"{name} of step {step}") for step, cell in enumerate(cells))
        about = dict(length=length, camera=name, more=dict(more), notes=list(notes))
        yield Recording(frames, entry.fps, instructions(example, length), rows, **about)


def is_camera(key, values):
    """Whether a feature holds pictures of 8 bits (a depth map has 16)."""
    head = next((value for value in values if value), b"") if values and isinstance(values[0], bytes) else b""
    png = head.startswith(b"\x89PNG") and head[24:25] == b"\x08"
    return key.startswith("steps/observation/") and (png or head.startswith(b"\xff\xd8\xff"))


def instructions(example, length):
    """The text of each step, from the first language feature that has one; "" if none does."""
    for key in LANGUAGE:
        values = example.get(f"steps/{key}") or [b""]
        if not isinstance(values[0], bytes):  # Language Table has its letters as numbers
            texts = [bytes(values).partition(b"\0")[0].decode("utf-8", "replace").strip()]
        else:
            texts = [value.decode("utf-8", "replace").strip() for value in values]
        found = [text for text in texts if text]
        if found:
            return [text or found[0] for text in texts] if len(texts) == length else found[0]
    return ""


def numbers(example, prefix, length):
    """A feature, or all below it side by side by name: ((length, A) or None, their names)."""
    tables = {}
    for key, values in sorted(example.items()):
        if (key == prefix or key.startswith(f"{prefix}/")) and values and not isinstance(values[0], bytes):
            if len(values) % length:
                raise DataError(f"{key}: {len(values)} numbers for {length} frames")
            tables[key.removeprefix(f"{prefix}/")] = np.float32(values).reshape(length, -1)
    return np.concatenate(list(tables.values()), 1) if tables else None, list(tables)
