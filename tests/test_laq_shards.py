"""laq/videos_to_shards.py: every kind of source on tiny data written here, faults, stops, and real recordings."""

import contextlib
import gzip
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, launch, load, shared

from common import DataError

VERB = ROOT / "laq" / "videos_to_shards.py"


@pytest.fixture(scope="module")
def laq():
    return load("laq", "shards", "sources", "readers", "videos_to_shards")


def run(laq, out, *words):
    """Run the verb here on `words`; returns (clips by key, summary)."""
    laq.videos_to_shards.main([str(word) for word in [*words, "--out", out, "--workers", 0]])
    summary = json.loads((out / "summary.json").read_text())
    clips = laq.shards.read_clips(out) if any(about["clips"] for about in summary.values()) else []
    return {clip.key: clip for clip in clips}, summary


def write_clip(laq, folder, length, **members):
    """A shard of one clip; returns it as it is read."""
    meta = dict(instruction="", fps=5, source="d", episode="0", camera="c", length=length)
    named = {name.replace("_", "."): data for name, data in members.items()}
    laq.shards.write_shard(folder / "a.tar", [{"__key__": "k", "json": json.dumps(meta).encode(), **named}])
    (clip,) = laq.shards.read_clips(folder)
    return clip


# --- tiny data: the grey level of a frame is its number, so that a clip tells which frames it holds


def grey(numbers, height=48, width=64):
    """Frames (T, H, W, 3) uint8: level 30 + 10 n all over, but for a moving stripe that gives the codec work."""
    frames = np.stack([np.full((height, width, 3), 30 + 10 * (n % 20), np.uint8) for n in numbers])
    for frame, n in zip(frames, numbers, strict=True):
        frame[:4, (3 * n) % (width - 8) :][:, :8] = 200
    return frames


def numbers(frames):
    """What `grey` drew: (T, H, W, 3) -> list of T, modulo 20."""
    rows = frames[:, frames.shape[1] // 2 :].reshape(len(frames), -1).astype(float)
    return [round((level - 30) / 10) for level in np.median(rows, 1)]


def write_video(path, frames, codec="libx264", fps=10, pix_fmt="yuv420p", head=True, sound=False, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    more = dict(movflags="faststart") if head and path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=more) as video:
        stream = video.add_stream(codec, rate=fps, options={name: str(value) for name, value in options.items()})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        if sound:
            audio = video.add_stream("aac", rate=16000)
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            noise.sample_rate = 16000
            video.mux([*audio.encode(noise), *audio.encode()])
        for frame in frames:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        video.mux(stream.encode())


def picture(frame, codec="png", pix_fmt="rgb24"):
    """The bytes of a PNG or (mjpeg, yuvj420p) JPEG."""
    coder = av.CodecContext.create(codec, "w")
    coder.height, coder.width, coder.pix_fmt, coder.time_base = *frame.shape[:2], pix_fmt, Fraction(1, 10)
    packets = coder.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt))
    return b"".join(bytes(packet) for packet in [*packets, *coder.encode()])


def jpeg(frame):
    return picture(frame, "mjpeg", "yuvj420p")


def rows(numbers, width=3):
    """Actions (T, width) whose first column is the frame's number."""
    return np.float32(numbers)[:, None] + np.arange(width, dtype=np.float32) / 100


CAMERAS = ["observation.images.top", "observation.images.wrist"]


def lerobot_info(root, version, cameras, dtype="video", **more):
    features = {name: dict(dtype=dtype, shape=[48, 64, 3]) for name in cameras}
    features |= {"action": dict(dtype="float32", shape=[3]), "observation.state": dict(dtype="float32", shape=[2])}
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta/info.json").write_text(json.dumps(dict(codebase_version=version, fps=10, features=features, **more)))


def lerobot_table(path, lengths, **columns):
    """A parquet of episodes {index: length}."""
    parts = [(episode, n) for episode, length in lengths.items() for n in range(length)]
    table = dict(episode_index=[episode for episode, _ in parts], frame_index=[n for _, n in parts])
    table |= {
        "action": [rows([n])[0].tolist() for _, n in parts],
        "observation.state": [[1.0 * n, 5.0] for _, n in parts],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(table | columns), path)


def lerobot_v21(root, lengths):
    """Episodes {index: length}, two cameras; the wrist's frames are numbered from 3."""
    paths = dict(
        data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )
    lerobot_info(root, "v2.1", CAMERAS, chunks_size=2, **paths)
    lines = [dict(episode_index=n, tasks=[f"task {n}"], length=length) for n, length in lengths.items()]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    for n, length in lengths.items():
        lerobot_table(root / f"data/chunk-{n // 2:03d}/episode_{n:06d}.parquet", {n: length})
        for offset, camera in zip((0, 3), CAMERAS, strict=True):
            path = root / f"videos/chunk-{n // 2:03d}/{camera}/episode_{n:06d}.mp4"
            write_video(path, grey(range(offset, offset + length)))


def lerobot_v30(root, lengths, **options):
    """All episodes in one video, whose frames are numbered through, and one parquet."""
    camera = CAMERAS[0]
    paths = dict(
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )
    lerobot_info(root, "v3.0", [camera], **paths)
    lerobot_table(root / "data/chunk-000/file-000.parquet", lengths)
    write_video(root / f"videos/{camera}/chunk-000/file-000.mp4", grey(range(sum(lengths.values()))), **options)
    ends = np.cumsum([0, *lengths.values()])
    table = dict(episode_index=list(lengths), tasks=[[f"task {n}"] for n in lengths], length=list(lengths.values()))
    for name in ("data", f"videos/{camera}"):
        table |= {f"{name}/chunk_index": [0] * len(lengths), f"{name}/file_index": [0] * len(lengths)}
    table[f"videos/{camera}/from_timestamp"] = (ends[:-1] / 10).tolist()
    table[f"videos/{camera}/to_timestamp"] = (ends[1:] / 10).tolist()
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table(table), root / "meta/episodes/chunk-000/file-000.parquet")


@pytest.fixture
def example(monkeypatch):
    """tf.train.Example, in the package `tfrecord` if it is installed, else in a stand-in made by protobuf itself."""
    try:
        from tfrecord.example_pb2 import Example
    except ImportError:
        Example = build_example()
        package, module = ModuleType("tfrecord"), ModuleType("tfrecord.example_pb2")
        module.Example = Example
        monkeypatch.setitem(sys.modules, "tfrecord", package)
        monkeypatch.setitem(sys.modules, "tfrecord.example_pb2", module)
    return Example


def build_example():
    """The message as tensorflow/core/example/{example,feature}.proto define it."""
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    F = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example_test.proto", package="laqtest", syntax="proto3")

    def message(name, *fields):
        made = file.message_type.add(name=name)
        for number, (field, kind, label, of) in enumerate(fields, 1):
            made.field.add(name=field, number=number, type=kind, label=label, type_name=of and f".laqtest.{of}")
        return made

    one, many = F.LABEL_OPTIONAL, F.LABEL_REPEATED
    message("BytesList", ("value", F.TYPE_BYTES, many, None))
    message("FloatList", ("value", F.TYPE_FLOAT, many, None))
    message("Int64List", ("value", F.TYPE_INT64, many, None))
    lists = [("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")]
    feature = message("Feature", *((name, F.TYPE_MESSAGE, one, of) for name, of in lists))
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message("Features", ("feature", F.TYPE_MESSAGE, many, "Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=F.TYPE_STRING, label=one)
    entry.field.add(name="value", number=2, type=F.TYPE_MESSAGE, label=one, type_name=".laqtest.Feature")
    message("Example", ("features", F.TYPE_MESSAGE, one, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("laqtest.Example"))


def write_tfrecord(path, Example, records):
    """records: {feature: list of bytes, floats or ints}. The checksums are zeros: nobody here reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for record in records:
            made = Example()
            for key, values in record.items():
                kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(values[0])]
                getattr(made.features.feature[key], kind).value.extend(values)
            data = made.SerializeToString()
            file.write(struct.pack("<Q", len(data)) + bytes(4) + data + bytes(4))


# --- videos and pictures


def test_kinds_of_video(laq, tmp_path):
    """Every container and codec keeps its frames and its fps."""
    data, kinds = tmp_path / "data", {"a.avi": "mpeg4", "b.webm": "libvpx-vp9", "c.mkv": "libx264", "d.mov": "libx264"}
    for name, codec in kinds.items():
        write_video(data / "deep" / "er" / name, grey(range(12)), codec)
    write_video(data / "AV1.MP4".lower(), grey(range(12)), "libsvtav1", fps=5)
    write_video(data / "loop.gif", grey(range(12)), "gif", pix_fmt="gray")
    write_video(data / "ein Tisch, grün 桌.mp4", grey(range(12)), sound=True)
    (data / "notes.txt").write_text("no video")
    (data / "._a.mp4").write_bytes(b"left by a Mac")
    clips, summary = run(laq, tmp_path / "out", "--data", f"web={data}")
    assert len(clips) == 7 and not summary["web"]["broken"]
    for clip in clips.values():
        assert numbers(clip.frames()) == list(range(12)), clip
        assert clip.meta["fps"] == (5 if clip.meta["episode"] == "av1" else 10)
        assert (clip.meta["source"], clip.meta["camera"], clip.meta["instruction"]) == ("web", "video", "")
        assert "actions" not in clip.meta and set(clip.members) == {"mp4", "json"}
        with av.open(io.BytesIO(clip.read("mp4"))) as video:
            assert [stream.type for stream in video.streams] == ["video"]
    names = {clip.meta["episode"] for clip in clips.values()}
    assert names == {"deep/er/a", "deep/er/b", "deep/er/c", "deep/er/d", "av1", "loop", "ein Tisch, grün 桌"}
    assert summary["web"]["clips"] == 7 and summary["web"]["frames"] == 84
    assert summary["web"]["hours"] == pytest.approx((6 * 1.2 + 2.4) / 3600)


def test_sidecars(laq, tmp_path):
    """What lies beside a video goes with its clip; of the json plain values only, and flags win."""
    data = tmp_path / "data"
    for name in ("one", "two"):
        write_video(data / f"{name}.mp4", grey(range(6)))
        np.savez(data / f"{name}.npz", actions=rows(range(6)), state=rows(range(6), 2))
        (data / f"{name}.txt").write_text(f"open drawer {name}\n")
    about = dict(episode=7, camera="left", fps=3, actions="absolute", operator="B", joints=[1, 2], source="x", length=1)
    (data / "two.json").write_text(json.dumps(about))
    clips, summary = run(laq, tmp_path / "out", "--data", f"lab={data}")
    one, two = clips["lab-one-video"], clips["lab-7-left"]
    np.testing.assert_array_equal(one.array("actions.npy"), rows(range(6)))
    np.testing.assert_array_equal(two.array("state.npy"), rows(range(6), 2))
    assert one.meta["instruction"] == "open drawer one" and one.meta["actions"] == "delta" and one.meta["fps"] == 10
    assert two.meta == dict(
        instruction="open drawer two",
        fps=3,
        source="lab",
        episode="7",
        camera="left",
        length=6,
        actions="absolute",
        operator="B",
    )
    assert (summary["lab"]["with_actions"], summary["lab"]["with_instruction"]) == (2, 2)
    clips, _ = run(laq, tmp_path / "flag", "--data", f"lab={data}", "--actions", "lab=absolute", "--fps", "30")
    assert {(clip.meta["actions"], clip.meta["fps"]) for clip in clips.values()} == {("absolute", 30.0)}


@pytest.mark.parametrize(
    "name, options, size, words, copied",
    [
        ("a.mp4", dict(g=250), (48, 64), [], True),
        ("a.mp4", dict(g=2), (48, 64), ["--recode"], False),
        ("a.mov", {}, (48, 64), [], False),
        ("a.mp4", {}, (96, 130), [], False),
        ("a.mkv", dict(pix_fmt="yuv444p"), (47, 63), [], False),
    ],
)
def test_what_is_copied(laq, tmp_path, name, options, size, words, copied):
    """A small h264 mp4 is copied, byte for byte; all else becomes one with a keyframe every 10 frames."""
    write_video(tmp_path / "data" / name, grey(range(30), *size), "libx264", **options)
    clips, _ = run(laq, tmp_path / "out", "--data", tmp_path / "data", "--height", 48, *words)
    (clip,) = clips.values()
    assert (clip.read("mp4") == (tmp_path / "data" / name).read_bytes()) == copied
    assert numbers(clip.frames()) == [n % 20 for n in range(30)]
    height, width = clip.frames().shape[1:3]
    assert height == 48 and width % 2 == 0 and abs(width / height - size[1] / size[0]) < 0.03
    if not copied:
        with av.open(io.BytesIO(clip.read("mp4"))) as video:
            packets = [packet for packet in video.demux(video=0) if packet.size]
        keyframes = [n for n, packet in enumerate(packets) if packet.is_keyframe]
        assert len(packets) == 30 and max(np.diff([*keyframes, 30])) <= 10
        assert [packet.pts for packet in packets] == [packet.dts for packet in packets]


CODECS = dict(
    ours=("libx264", dict(g=10, bf=0)),
    b_frames=("libx264", dict(g=12, bf=3, preset="medium")),
    one_keyframe=("libx264", dict(g=250, bf=3)),
    open_gop=("libx264", {"g": 8, "bf": 3, "x264-params": "open-gop=1:b-adapt=0:scenecut=0"}),
    no_keyframes=("libx264", {"g": 12, "intra-refresh": 1}),
    all_keyframes=("libx264", dict(g=1)),
    h265=("libx265", {"g": 8, "x265-params": "log-level=none:bframes=3"}),
    av1=("libsvtav1", dict(g=8, preset=12)),
)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_a_part_is_the_same_as_of_the_whole(laq, tmp_path, name, uneven):
    """Any rows of a clip are those of the whole, bit for bit, wherever its keyframes are."""
    codec, options = CODECS[name]
    rng, steps = np.random.default_rng(0), [1] * 11 + [3, 1] * 8 + [2] * 12 + [1] * 10
    frames = np.kron(rng.integers(40, 200, (12, 16, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    frames = np.stack([np.roll(frames, (t, 3 * t), (0, 1)) for t in range(len(steps))])
    times = np.cumsum(steps) if uneven else np.arange(len(steps))
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as video:
        stream = video.add_stream(codec, rate=10, options={key: str(value) for key, value in options.items()})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for time_, frame in zip(times, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame.pts, frame.time_base = int(time_), Fraction(1, 10)
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    with av.open(io.BytesIO(file.getvalue())) as video:
        true = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    clip = write_clip(laq, tmp_path, len(steps), mp4=file.getvalue())
    T, whole = len(steps), clip.frames()
    assert T == len(true) and np.array_equal(whole, np.stack(true))
    for start, stop in [(0, 1), (0, 7), (5, 9), (10, 20), (11, 12), (17, 31), (23, 24), (29, T), (T - 1, T)]:
        assert np.array_equal(clip.frames(None, range(start, stop)), whole[start:stop]), (start, stop)


def test_only_what_a_part_needs_is_decoded(laq, tmp_path):
    """The packets outside of a part are not decoded: here they are zeros."""
    write_video(tmp_path / "data/a.avi", grey(range(60)), "mpeg4")
    (clip,) = run(laq, tmp_path / "out", "--data", tmp_path / "data")[0].values()
    data, whole = bytearray(clip.read("mp4")), clip.frames()
    with av.open(io.BytesIO(bytes(data))) as video:
        for number, packet in enumerate(video.demux(video=0)):
            if packet.size and number and not 20 <= number < 28:
                data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    seen = laq.shards.decode(bytes(data), "k", range(24, 28), laq.shards.to_rgb())
    assert np.array_equal(list(seen.values()), whole[24:28])


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.05])
def test_a_clip_that_is_cut_off_is_named(laq, tmp_path, keep):
    """A truncated clip is an error of one line with its name."""
    write_video(tmp_path / "a.mp4", grey(range(40)), g=10)
    data = (tmp_path / "a.mp4").read_bytes()
    clip = write_clip(laq, tmp_path, 40, mp4=data[: int(keep * len(data))])
    for rows_ in [None, range(16, 40), [39, 2]]:
        with pytest.raises(DataError, match="a.tar:k: .*(is beyond the end|not a readable video)") as error:
            clip.frames(16, rows_)
        assert "\n" not in str(error.value)


def test_a_turned_phone(laq, tmp_path):
    """A video that players turn upright is upright in the clip."""
    frames = grey(range(4), 48, 64)
    frames[:, :, :16] = 250  # what a quarter turn clockwise brings to the top
    write_video(tmp_path / "data/a.mp4", frames)
    data = bytearray((tmp_path / "data/a.mp4").read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the display matrix of the track's header
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "data/a.mp4").write_bytes(data)
    clips, _ = run(laq, tmp_path / "out", "--data", tmp_path / "data")
    seen = next(iter(clips.values())).frames()
    assert seen.shape == (4, 64, 48, 3) and seen[:, :12].min() > 230 > seen[:, 20:].max()


def test_pictures(laq, tmp_path):
    """A folder of pictures is a clip in natural order; its frame rate must be given; folders may be cameras."""
    for episode, write in (("run 1/cam", picture), ("run 2/cam", jpeg)):
        (tmp_path / "data" / episode).mkdir(parents=True)
        for n in range(12):
            name = f"frame{n}.{'png' if write is picture else 'jpg'}"
            (tmp_path / "data" / episode / name).write_bytes(write(grey([n])[0]))
    (tmp_path / "data/run 1/cam.txt").write_text("stack")
    np.savez(tmp_path / "data/run 1/cam.npz", actions=rows(range(12)))
    with pytest.raises(DataError, match="does not tell its frame rate: give --fps im=X"):
        run(laq, tmp_path / "out", "--data", f"im={tmp_path / 'data'}")
    words = ("--data", f"im={tmp_path / 'data'}", "--fps", 4, "--group-cameras", "im")
    clips, _ = run(laq, tmp_path / "out", *words)
    assert {(clip.meta["episode"], clip.meta["camera"]) for clip in clips.values()} == {
        ("run 1", "cam"),
        ("run 2", "cam"),
    }
    for clip in clips.values():
        assert numbers(clip.frames()) == list(range(12)) and clip.meta["fps"] == 4
    first = next(clip for clip in clips.values() if clip.meta["episode"] == "run 1")
    assert first.meta["instruction"] == "stack" and len(first.array("actions.npy")) == 12


# --- LeRobot


def test_lerobot_v21(laq, tmp_path):
    """Each clip has the frames of its camera, and the rows and the task of its episode."""
    lerobot_v21(tmp_path / "data", {0: 6, 1: 7, 2: 5})
    clips, _ = run(laq, tmp_path / "out", "--data", f"g1={tmp_path / 'data'}")
    assert list(clips) == [f"g1-{n}-{camera}" for n in range(3) for camera in ("top", "wrist")]
    for key, clip in clips.items():
        first, length = 3 * key.endswith("wrist"), {0: 6, 1: 7, 2: 5}[int(clip.meta["episode"])]
        assert numbers(clip.frames()) == list(range(first, first + length))
        np.testing.assert_array_equal(clip.array("actions.npy"), rows(range(length)))
        np.testing.assert_array_equal(clip.array("state.npy")[:, 0], np.arange(length))
        about = clip.meta["instruction"], clip.meta["fps"], clip.meta["actions"]
        assert about == (f"task {clip.meta['episode']}", 10.0, "absolute")
    clips, _ = run(laq, tmp_path / "one", "--data", f"g1={tmp_path / 'data'}", "--cameras", CAMERAS[1])
    assert list(clips) == ["g1-0-wrist", "g1-1-wrist", "g1-2-wrist"]
    with pytest.raises(DataError, match="--cameras rear: g1 has top, wrist"):
        run(laq, tmp_path / "none", "--data", f"g1={tmp_path / 'data'}", "--cameras", "rear")
    with pytest.raises(DataError, match="holds LeRobotDatasets: give each"):
        run(laq, tmp_path / "none", "--data", tmp_path)


@pytest.mark.parametrize("options", [dict(g=100, bf=3), dict(g=2, bf=0), dict(g=14, bf=3, sc_threshold=0)])
def test_lerobot_v30_is_cut_exactly(laq, tmp_path, options):
    """Each episode has its own frames, with B-frames and keyframes anywhere."""
    lengths = {0: 13, 1: 1, 2: 28, 3: 18}
    lerobot_v30(tmp_path / "data", lengths, **options)
    clips, summary = run(laq, tmp_path / "out", "--data", f"r={tmp_path / 'data'}")
    ends = np.cumsum([0, *lengths.values()])
    for n, clip in enumerate(clips.values()):
        assert numbers(clip.frames()) == [i % 20 for i in range(ends[n], ends[n + 1])]
        np.testing.assert_array_equal(clip.array("actions.npy"), rows(range(lengths[n])))
        assert clip.meta["instruction"] == f"task {n}"
    assert summary["r"]["clips"] == 4


def test_lerobot_that_disagrees(laq, tmp_path):
    """An episode with a missing or contradictory file is left out and named."""
    data, times = tmp_path / "data", np.arange(6) / 10
    lerobot_v21(data, dict.fromkeys(range(7), 6))
    lerobot_table(data / "data/chunk-000/episode_000000.parquet", {0: 5})
    (data / f"videos/chunk-000/{CAMERAS[1]}/episode_000001.mp4").unlink()
    (data / "data/chunk-001/episode_000002.parquet").write_bytes(b"PAR1 but not really")
    bad = [rows([n])[0].tolist() for n in range(6)]
    bad[4] = [1.0, float("nan"), 2.0]
    lerobot_table(data / "data/chunk-001/episode_000003.parquet", {3: 6}, action=bad)
    for n, factor in ((4, 0.0), (5, 1e3), (6, 1e9)):  # none, in ms, in ns
        path = data / f"data/chunk-{n // 2:03d}/episode_{n:06d}.parquet"
        lerobot_table(path, {n: 6}, timestamp=(factor * times).tolist())
    clips, summary = run(laq, tmp_path / "out", "--data", f"g1={data}", "--shard-clips", 2)
    broken = summary["g1"]["broken"]
    assert list(clips) == ["g1-1-top"] and len(broken) == 13
    assert "has 5 rows, meta says 6" in broken["g1-0-top"]
    assert broken["g1-1-wrist"].endswith("episode_000001.mp4: no such file")
    assert broken["g1-2-top"].startswith(f"{data}/data/chunk-001/episode_000002.parquet: ")
    assert (
        broken["g1-3-wrist"] == f"{data}/data/chunk-001/episode_000003.parquet: actions of row 4 holds NaN or infinity"
    )
    assert all("are they in seconds?" in broken[f"g1-{n}-top"] for n in (4, 5, 6))


# --- RLDS


def record(steps, **more):
    """An episode of Open X as TFDS flattens it."""
    black = jpeg(np.zeros((48, 64, 3), np.uint8))
    depth = picture(np.zeros((48, 64, 3), np.uint8), pix_fmt="rgb48be")
    return {
        "steps/observation/image": [jpeg(frame) for frame in grey(steps)],
        "steps/observation/black": [black] * len(steps),
        "steps/observation/depth": [depth] * len(steps),
        "steps/observation/state": rows(steps, 2).ravel().tolist(),
        "steps/is_first": [1] + [0] * (len(steps) - 1),
    } | more


def test_rlds(laq, tmp_path, example):
    """Actions, language in three spellings, and cameras; depth and dead cameras are left out."""
    words = b"push the blue block"
    letters = list(words) + [0] * (32 - len(words))
    records = [
        record(
            range(5), **{"steps/action": rows(range(5)).ravel().tolist(), "steps/language_instruction": [words] * 5}
        ),
        record(
            range(7),
            **{"steps/action/world_vector": rows(range(7)).ravel().tolist(), "steps/action/gripper": [0.5] * 7},
            **{"steps/observation/natural_language_instruction": [b"", *[words] * 6]},
        ),
        record(range(4), **{"steps/action": [0.0] * 8, "steps/observation/instruction": letters * 4}),
    ]
    write_tfrecord(tmp_path / "oxe/1.0.0/oxe-train.tfrecord-00000-of-00002", example, records)
    write_tfrecord(tmp_path / "oxe/1.0.0/oxe-train.tfrecord-00001-of-00002", example, records[:1])
    clips, summary = run(laq, tmp_path / "out", "--data", f"oxe={tmp_path / 'oxe'}", "--fps", "oxe=5")
    assert list(clips) == [f"oxe-oxe-train-{name}-image" for name in ("00000-0", "00000-1", "00000-2", "00001-0")]
    first, second, third, _ = clips.values()
    assert numbers(first.frames()) == list(range(5)) and first.meta["fps"] == 5 and first.meta["actions"] == "delta"
    np.testing.assert_array_equal(first.array("actions.npy"), rows(range(5)))
    np.testing.assert_array_equal(first.array("state.npy"), rows(range(5), 2))
    assert second.meta["actions_parts"] == ["gripper", "world_vector"]
    np.testing.assert_array_equal(second.array("actions.npy")[:, 1:], rows(range(7)))
    assert {clip.meta["instruction"] for clip in clips.values()} == {words.decode()}
    assert third.array("actions.npy").shape == (4, 2)
    assert (
        len(summary["oxe"]["broken"]) == 4
        and "every frame is black" in summary["oxe"]["broken"]["oxe-oxe-train-00001-0-black"]
    )


def test_rlds_faults(laq, tmp_path, example, monkeypatch):
    """A tfrecord that was cut off loses its last record; another format is named; so is a package that is missing."""
    first, second = tmp_path / "x/x-train.tfrecord-00000-of-00003", tmp_path / "x/x-train.tfrecord-00001-of-00003"
    write_tfrecord(first, example, [record(range(3)), record(range(3))])
    first.write_bytes(first.read_bytes()[:-200])
    second.write_bytes(struct.pack("<Q", 20) + bytes(4) + b"\xff" * 20 + bytes(4))
    (tmp_path / "x/x-train.tfrecord-00002-of-00003").touch()
    clips, summary = run(laq, tmp_path / "out", "--data", f"x={tmp_path / 'x'}", "--fps", 5)
    broken = summary["x"]["broken"]
    assert list(clips) == ["x-x-train-00000-0-image"] and "actions" not in clips["x-x-train-00000-0-image"].meta
    assert "truncated" in broken[laq.shards.key_of("x", "x-train-00000-1", "")]
    assert "not a tfrecord of tf.train.Example" in broken[laq.shards.key_of("x", "x-train-00001-0", "")]
    assert "an empty file" in broken[laq.shards.key_of("x", "x-train-00002-0", "")]
    monkeypatch.setitem(sys.modules, "tfrecord", None)
    monkeypatch.setitem(sys.modules, "tfrecord.example_pb2", None)
    with pytest.raises(DataError, match="pip install tfrecord"):
        run(laq, tmp_path / "no", "--data", tmp_path / "x", "--fps", 5)


# --- faults


def test_broken_clips_are_named_counted_and_left_out(laq, tmp_path, capsys):
    """Each bad file is left out and named with the reason."""
    data = tmp_path / "data"
    write_video(data / "good.mp4", grey(range(30)), "mpeg4")
    write_video(data / "head.mp4", grey(range(30)))
    write_video(data / "tail.mp4", grey(range(30)), head=False)
    write_video(data / "cut.mkv", grey(range(30)))
    for name in ("head.mp4", "tail.mp4", "cut.mkv"):
        whole = (data / name).read_bytes()
        (data / name).write_bytes(whole[: len(whole) * 2 // 3])
    (data / "empty.mp4").touch()
    (data / "text.mp4").write_text("not a video " * 50)
    write_video(data / "black.mp4", np.zeros((8, 48, 64, 3), np.uint8))
    write_video(data / "rows.mp4", grey(range(8)))
    np.savez(data / "rows.npz", actions=rows(range(10)))
    write_video(data / "pickle.mp4", grey(range(8)))
    np.savez(data / "pickle.npz", actions=np.array([{}], object))
    write_video(data / "zip.mp4", grey(range(8)))
    (data / "zip.npz").write_bytes(b"PK\x03\x04 no archive")
    write_video(data / "json.mp4", grey(range(8)))
    (data / "json.json").write_text("{")
    write_video(data / "kind.mp4", grey(range(8)))
    (data / "kind.json").write_text('{"actions": "relative"}')
    (data / "mixed").mkdir()
    (data / "mixed/0.png").write_bytes(picture(grey([0])[0]))
    (data / "mixed/1.png").write_bytes(picture(grey([1], 48, 32)[0]))
    (data / "torn").mkdir()
    (data / "torn/0.png").write_bytes(picture(grey([0])[0]))
    (data / "torn/1.png").write_bytes(picture(grey([1])[0])[:40])
    (data / "jpeg").mkdir()
    (data / "jpeg/0.jpg").write_bytes(jpeg(grey([0])[0]))
    (data / "jpeg/1.jpg").write_bytes(jpeg(grey([1])[0])[:-30])
    clips, summary = run(laq, tmp_path / "out", "--data", f"d={data}", "--fps", 10, "--shard-clips", 4)
    broken = summary["d"]["broken"]
    said = dict(
        head="not a readable video",
        tail="no video stream",
        cut="truncated: its frames end at",
        empty="an empty file",
        text="not a readable video",
        black="every frame is black",
        rows="8 frames, but actions of shape (10, 3)",
        pickle="pickle.npz: expected the arrays",
        zip="zip.npz: expected the arrays actions and state",
        json="json.json",
        kind="expected delta or absolute",
        mixed="frame 1 is 32x48, those before 64x48",
        torn="not a complete picture",
        jpeg="not a complete picture",
    )
    said = {f"d-{name}-video": why for name, why in said.items()}
    assert list(clips) == ["d-good-video"] and set(broken) == set(said)
    for key, part in said.items():
        assert part in broken[key] and str(data) in broken[key] and "\n" not in broken[key], broken[key]
    shown = capsys.readouterr().out
    assert "d: 1 clips (video 1), 30 frames" in shown and "14 broken and left out" in shown


def test_bit_rot(laq, tmp_path):
    """Most damaged videos are found out. (Some damage no decoder can notice.)"""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (8, 10, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    write_video(tmp_path / "data/whole.mp4", np.stack([np.roll(texture, 3 * n, 1) for n in range(60)]), threads=1)
    whole = (tmp_path / "data/whole.mp4").read_bytes()
    first = whole.index(b"mdat") + 200
    for n, at in enumerate(rng.integers(first, len(whole) - 200, 6)):
        (tmp_path / f"data/{n}.mp4").write_bytes(whole[:at] + rng.bytes(60) + whole[at + 60 :])
    _, summary = run(laq, tmp_path / "out", "--data", f"d={tmp_path / 'data'}")
    assert sum("damaged at" in why for why in summary["d"]["broken"].values()) >= 2
    assert len(summary["d"]["broken"]) >= 4


def test_twins(laq, tmp_path):
    """Equal names of different endings are told apart; two clips of one name are an error."""
    for name in ("a.mp4", "a.mkv", "b.mp4"):
        write_video(tmp_path / "data" / name, grey(range(3)))
    clips, _ = run(laq, tmp_path / "out", "--data", f"d={tmp_path / 'data'}")
    assert {clip.meta["episode"] for clip in clips.values()} == {"a.mp4", "a.mkv", "b"}
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.json").write_text('{"episode": "x"}')
    with pytest.raises(DataError, match="both are episode x, camera video"):
        run(laq, tmp_path / "no", "--data", f"d={tmp_path / 'data'}")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data", "d={data}", "--fps", "e=5"], "--fps e=5: no source is called e"),
        (["--data", "d={data}", "--fps", "fast"], "--fps fast: expected a number above 0"),
        (["--data", "d={data}", "--actions", "d=relative"], "--actions relative: expected delta or absolute"),
        (["--data", "d={data}", "d={data}"], "two sources are called d"),
        (["--data", "d={data}/nowhere"], "nowhere: no such file or folder"),
        (["--data", "d={empty}"], "nothing to read: no videos, pictures, LeRobotDataset or tfrecords$"),
        (["--data", "d={other}"], "nothing to read: no videos, .*; ignored files of other kinds: 1 .hdf5"),
        (["--data", "d={slow}"], "info.json: fps is 0.0, expected a number above 0"),
        (["--data", "d={old}"], "codebase_version is v1.6, expected v2.x or v3.x"),
        (["--data", "d={bare}"], "no 'features'"),
    ],
)
def test_wrong_flags(laq, tmp_path, words, message):
    """A mistyped flag, or a folder that cannot be read, is an error before anything is written."""
    write_video(tmp_path / "data/a.mp4", grey(range(3)))
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other/a.hdf5").touch()
    lerobot_info(tmp_path / "slow", "v2.1", CAMERAS)
    edit_info(tmp_path / "slow", fps=0)
    lerobot_info(tmp_path / "old", "v1.6", CAMERAS)
    (tmp_path / "bare/meta").mkdir(parents=True)
    (tmp_path / "bare/meta/info.json").write_text('{"codebase_version": "v2.1", "fps": 10}')
    paths = {name: tmp_path / name for name in ("data", "empty", "old", "bare", "other", "slow")}
    with pytest.raises(DataError, match=message):
        run(laq, tmp_path / "out", *(word.format(**paths) for word in words))
    assert not (tmp_path / "out").exists()


# --- stops


def files_of(out):
    """{name: bytes} of everything that readers look at."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix in (".tar", ".json")}


def many(folder, clips, frames, *size):
    for n in range(clips):
        write_video(folder / f"{n}.avi", grey(range(n, n + frames), *size), "mpeg4")
    return "--data", f"d={folder}", "--shard-clips", 3


def test_a_rerun_goes_on(laq, tmp_path):
    """The same command makes just what is missing; other flags are refused."""
    words, out = many(tmp_path / "data", 7, 4), tmp_path / "out"
    run(laq, out, *words)
    before, times = files_of(out), {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / "d-000001.tar").unlink()
    (out / ".d-000001.tar.123.tmp").write_bytes(b"left by a killed run")
    run(laq, out, *words)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert files_of(out) == before and {name for name in after if after[name] != times[name]} == {"d-000001.tar"}
    assert not list(out.glob(".*"))
    with pytest.raises(DataError, match="--crf was 23 and is now 30"):
        run(laq, out, *words, "--crf", 30)
    with pytest.raises(DataError, match="--shard-clips was 3 and is now 2"):
        run(laq, out, *words[:2], "--shard-clips", 2)
    assert files_of(out) == before
    (out / "plan.json").unlink()
    with pytest.raises(DataError, match="holds shards but no plan.json"):
        run(laq, out, *words)
    with pytest.raises(DataError, match="0.avi/out: Not a directory"):
        run(laq, tmp_path / "data/0.avi/out", *words)


def state(pid):
    """A process's letter in /proc (Z: dead, not yet collected), None if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_kill_9(laq, tmp_path):
    """After kill -9 the workers end too, and the same command goes on to the same bytes."""
    words, out, workers = many(tmp_path / "data", 4, 20, 128, 160), tmp_path / "out", []
    for n in range(4, 40):
        shutil.copy(tmp_path / f"data/{n % 4}.avi", tmp_path / f"data/{n}.avi")
    run(laq, tmp_path / "whole", *words)
    command = [str(word) for word in (VERB, *words, "--out", out, "--workers", 2)]
    while not 0 < len(list(out.glob("*.tar"))) < 14:  # a busy machine may wake this test too late
        shutil.rmtree(out, ignore_errors=True)
        with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL) as process:
            while not list(out.glob("*.tar")) and process.poll() is None:
                time.sleep(0.005)
            if process.poll() is None:
                workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.kill()
    assert len(workers) == 2
    end = time.monotonic() + 10
    while any(state(pid) not in ("Z", None) for pid in workers):
        assert time.monotonic() < end, "the workers live on"
        time.sleep(0.02)
    done = launch(*command)
    assert done.returncode == 0 and done.stderr == "" and "of them there already" in done.stdout
    assert files_of(out) == files_of(tmp_path / "whole")


# --- real recordings


def test_real_v30(laq, tmp_path):
    """Two G1 episodes in one AV1 file, against the frames and rows read one by one."""
    root = shared("g1_lerobot_v21") / "converted"
    clips, _ = run(laq, tmp_path / "out", "--data", f"g1={root / 'lerobot_v30'}", "--height", 64)
    assert [clip.meta["length"] for clip in clips.values()] == [221, 277]
    with av.open(str(next(root.rglob("file-000.mp4")))) as video:
        true = np.stack(
            [frame.reformat(86, 64, "rgb24", interpolation="AREA").to_ndarray() for frame in video.decode(video=0)]
        )
    for first, (number, clip) in zip((0, 221), zip((29, 30), clips.values(), strict=True), strict=True):
        seen, length = clip.frames().astype(float), clip.meta["length"]
        right = ((seen - true[first : first + length]) ** 2).mean((1, 2, 3))
        assert right.max() < 100  # 28 dB
        late = ((seen[:-1] - true[first + 1 : first + length]) ** 2).mean()
        assert late > 2 * right.mean(), "one frame off is no worse"
        with np.load(root / f"g1_ep{number:03d}.npz") as rows:
            np.testing.assert_array_equal(clip.array("actions.npy"), rows["actions"])
            np.testing.assert_array_equal(clip.array("state.npy"), rows["obs.state"])


def test_real_bridge(laq, tmp_path, example):
    """25 episodes of Bridge as TFDS wrote them."""
    root = shared("bridge_octo")
    words = ("--data", f"bridge={root / 'original'}", "--fps", 5, "--cameras", "image_0")
    clips, _ = run(laq, tmp_path / "out", *words)
    assert len(clips) == 25
    for n, clip in enumerate(clips.values()):
        with np.load(root / f"converted/ep{n:02d}.npz") as rows:
            np.testing.assert_array_equal(clip.array("actions.npy"), rows["actions"])
            np.testing.assert_array_equal(clip.array("state.npy"), rows["obs.state"])
            assert clip.meta["instruction"] == str(rows["instruction"])
        assert clip.frames().shape == (10, 64, 64, 3)


# --- which frame, which colour, which text: what recordings of others hold


def cut(path, out, *words):
    """ffmpeg -c copy of a part of a video."""
    if not shutil.which("ffmpeg"):
        pytest.skip("needs ffmpeg")
    subprocess.run(["ffmpeg", "-v", "error", "-y", *words, "-i", path, "-c", "copy", out], check=True)


def test_a_video_cut_without_encoding_has_the_frames_that_a_player_shows(laq, tmp_path):
    """Its edit list hides packets: it is not copied, and a shard that others made of it is read rightly too."""
    write_video(tmp_path / "whole.mp4", grey(range(20)), g=20, bf=2)
    (tmp_path / "data").mkdir()
    cut(tmp_path / "whole.mp4", tmp_path / "data/cut.mp4", "-ss", "0.7")
    (clip,) = run(laq, tmp_path / "out", "--data", f"d={tmp_path / 'data'}")[0].values()
    assert numbers(clip.frames()) == list(range(7, 20)) and numbers(clip.frames(None, [12, 3])) == [19, 10]
    data = (tmp_path / "data/cut.mp4").read_bytes()
    assert clip.read("mp4") != data
    assert numbers(np.stack(list(laq.shards.decode(data, "k", [0, 5, 12], laq.shards.to_rgb()).values()))) == [
        7,
        12,
        19,
    ]


def uneven(path, times, rate=100):
    """A video whose frame n is shown from times[n] seconds on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as video:
        stream = video.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for when, frame in zip(times, grey(range(len(times))), strict=True):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame.pts, frame.time_base = round(when * rate), Fraction(1, rate)
            video.mux(stream.encode(frame))
        video.mux(stream.encode())


def test_uneven_times_become_even_ones(laq, tmp_path, capsys):
    """A pause of a second in a 10 fps video lasts ten frames; with rows beside it the frames stay, and that is said."""
    uneven(tmp_path / "data/pause.mp4", [0, 0.1, 0.2, 1.2, 1.3, 1.4])
    uneven(tmp_path / "data/rows.mp4", [0, 0.1, 0.2, 1.2, 1.3, 1.4])
    np.savez(tmp_path / "data/rows.npz", actions=rows(range(6)))
    clips, _ = run(laq, tmp_path / "out", "--data", f"d={tmp_path / 'data'}")
    pause, kept = clips["d-pause-video"], clips["d-rows-video"]
    assert pause.meta["fps"] == 10 and numbers(pause.frames()) == [0, 1, *[2] * 10, 3, 4, 5]
    assert numbers(kept.frames()) == list(range(6)) and len(kept.array("actions.npy")) == 6
    said = capsys.readouterr().out
    assert "as a player does" in said and "rows go with frames" in said


def test_one_row_or_frame_more_is_cut_and_said_once(laq, tmp_path, capsys):
    for name, count in (("a", 9), ("b", 11), ("c", 10)):
        write_video(tmp_path / f"data/{name}.mp4", grey(range(10)))
        np.savez(tmp_path / f"data/{name}.npz", action=rows(range(count)))
    clips, _ = run(laq, tmp_path / "out", "--data", f"d={tmp_path / 'data'}")
    assert [len(clip) for clip in clips.values()] == [9, 10, 10]
    for clip in clips.values():
        assert numbers(clip.frames()) == clip.array("actions.npy")[:, 0].tolist() == list(range(len(clip)))
    assert "2 x one row more than frames, or one frame more than rows" in capsys.readouterr().out


@pytest.mark.parametrize("tags, kr, kb", [((1, 1), 0.2126, 0.0722), ((1, 2), 0.2126, 0.0722), ((9, 1), 0.2627, 0.0593)])
def test_colours_are_those_of_the_tags(laq, tmp_path, tags, kr, kb):
    """Red (220, 20, 20) in BT.709, limited and full range, and BT.2020, as converted and as a shard of others."""
    red, green, blue = (c / 255 for c in (220, 20, 20))
    y = kr * red + (1 - kr - kb) * green + kb * blue
    yuv, full = (y, (blue - y) / (2 * (1 - kb)), (red - y) / (2 * (1 - kr))), tags[1] == 2
    scales, zeros = (255,) * 3 if full else (219, 224, 224), (0 if full else 16, 128, 128)
    values = [round(v * scale + zero) for v, scale, zero in zip(yuv, scales, zeros, strict=True)]
    (tmp_path / "data").mkdir()
    with av.open(str(tmp_path / "data/a.mp4"), "w") as video:
        stream = video.add_stream("libx264", rate=10, options=dict(crf="5"))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = tags
        for n in range(4):
            frame = av.VideoFrame(64, 48, "yuv420p")
            for plane, value in zip(frame.planes, values, strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            frame.pts, frame.colorspace, frame.color_range = n, *tags
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    for name, more in (("copied", []), ("encoded", ["--recode"])):
        (clip,) = run(laq, tmp_path / name, "--data", f"d={tmp_path / 'data'}", *more)[0].values()
        for size in (None, 16):
            assert np.abs(clip.frames(size)[0, 8, 8].astype(int) - [220, 20, 20]).max() <= 5


def test_photos_lie_as_their_exif_says_and_depth_is_no_colour(laq, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "data/photos").mkdir(parents=True)
    (tmp_path / "data/rgbd").mkdir()
    for n in range(4):
        image = Image.fromarray(grey([n])[0])
        exif = image.getexif()
        exif[274] = 6  # turn by a quarter
        image.save(tmp_path / f"data/photos/{n}.jpg", exif=exif)
        image.save(tmp_path / f"data/rgbd/frame-{n}.color.png")
        Image.fromarray(np.full((48, 64), 1000 * n, np.uint16)).save(tmp_path / f"data/rgbd/frame-{n}.depth.png")
        (tmp_path / f"data/rgbd/frame-{n}.pose.txt").write_text("1 0 0 0")
    clips, summary = run(laq, tmp_path / "out", "--data", f"d={tmp_path / 'data'}", "--fps", 10)
    by_name = {(clip.episode, clip.meta["camera"]): clip for clip in clips.values()}
    assert set(by_name) == {("photos", "video"), ("rgbd", "frame-.color")}
    assert by_name["photos", "video"].frames().shape[1:3] == (64, 48)
    assert numbers(by_name["rgbd", "frame-.color"].frames()) == [0, 1, 2, 3]
    assert "a depth map" in next(iter(summary["d"]["broken"].values()))


def test_texts_in_every_encoding_and_arrays_of_other_names(laq, tmp_path, capsys):
    texts = dict(bom="\ufeffpush".encode(), utf16="push".encode("utf-16"), latin1="schließe".encode("latin-1"))
    texts |= dict(many=b"one\ntwo\n\nthree\n")
    for name, text in texts.items():
        write_video(tmp_path / f"data/{name}.mp4", grey(range(3)))
        (tmp_path / f"data/{name}.txt").write_bytes(text)
    np.savez(tmp_path / "data/bom.npz", velocity=rows(range(3)))
    clips, _ = run(laq, tmp_path / "out", "--data", f"d={tmp_path / 'data'}")
    told = {clip.episode: clip.meta["instruction"] for clip in clips.values()}
    assert told == dict(bom="push", utf16="push", latin1="schließe", many="one")
    many = next(clip for clip in clips.values() if clip.episode == "many")
    assert many.meta["instructions"] == ["one", "two", "three"]
    assert "no actions or state in bom.npz, which holds velocity" in capsys.readouterr().out


def test_links_pointers_and_names(laq, tmp_path, capsys):
    """A link to a folder is followed, one in a circle once; a Git LFS pointer is named with its cure; files of other
    kinds are counted; a name need not be UTF-8."""
    write_video(tmp_path / "elsewhere/b.MP4", grey(range(3)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    (tmp_path / "data/a.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "data/x.H5").write_bytes(b"h5")
    names = ["linked/b"]
    with contextlib.suppress(OSError):  # a file system that wants UTF-8
        shutil.copy(tmp_path / "elsewhere/b.MP4", os.fsencode(tmp_path / "data") + b"/caf\xe9.mp4")
        names.insert(0, "caf\\udce9")
    clips, summary = run(laq, tmp_path / "out", "--data", f"d={tmp_path / 'data'}")
    assert [clip.episode for clip in clips.values()] == names
    assert "git lfs pull" in summary["d"]["broken"]["d-a-video"]
    assert "ignored files of other kinds: 1 .h5" in capsys.readouterr().out


# --- what LeRobotDatasets of others say


def edit_info(root, **more):
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | more))


def test_lerobot_of_other_names(laq, tmp_path, capsys):
    """openpi's `actions`, `state`, `image`; a depth map is left out and named; features without actions are listed."""
    path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    root = tmp_path / "data"
    lerobot_info(root, "v2.1", ["image"], "image", data_path=path, video_path=None)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["actions"], features["state"] = features.pop("action"), features.pop("observation.state")
    features["depth"] = dict(dtype="video", shape=[48, 64, 1], info={"video.is_depth_map": True})
    edit_info(root, features=features)
    (root / "meta/episodes.jsonl").write_text(json.dumps(dict(episode_index=0, tasks="press", length=5)))
    cells = [dict(bytes=picture(frame), path=None) for frame in grey(range(5))]
    table = dict(image=cells, actions=[[float(n)] for n in range(5)], state=[[2.0 * n] for n in range(5)])
    lerobot_table(root / "data/chunk-000/episode_000000.parquet", {0: 5}, **table)
    data = root / "data/chunk-000/episode_000000.parquet"
    kept = pyarrow.parquet.read_table(data).drop_columns(["action", "observation.state"])
    pyarrow.parquet.write_table(kept, data)
    (clip,) = run(laq, tmp_path / "out", "--data", f"d={root}")[0].values()
    assert clip.meta["instruction"] == "press" and clip.array("state.npy")[:, 0].tolist() == [0, 2, 4, 6, 8]
    assert clip.array("actions.npy").shape == (5, 1)
    assert "left out depth: a depth map" in capsys.readouterr().out
    features["velocity"] = features.pop("actions")
    edit_info(root, features=features)
    run(laq, tmp_path / "again", "--data", f"d={root}")
    assert "no actions: its features are depth, image, state, velocity" in capsys.readouterr().out


def test_lerobot_tasks_are_told_per_row(laq, tmp_path, capsys):
    """task_index tells what episodes.jsonl leaves out; where the task changes, there is a clip of each."""
    root = tmp_path / "data"
    lerobot_v21(root, {0: 6, 1: 6})
    (root / "meta/episodes.jsonl").write_text(
        "\n".join(json.dumps(dict(episode_index=n, length=6)) for n in range(2)) + "\n"
    )
    lines = [dict(task_index=n, task=text) for n, text in enumerate(("open", "close"))]
    (root / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    for n, index in enumerate(([1] * 6, [0, 0, 0, 0, 1, 1])):
        lerobot_table(root / f"data/chunk-000/episode_{n:06d}.parquet", {n: 6}, task_index=index)
    clips, _ = run(laq, tmp_path / "out", "--data", f"d={root}", "--cameras", "top")
    found = {key: (clip.meta["instruction"], numbers(clip.frames())) for key, clip in clips.items()}
    assert found["d-0-top"] == ("close", list(range(6)))
    assert found["d-1-top-0"] == ("open", [0, 1, 2, 3]) and found["d-1-top-4"] == ("close", [4, 5])
    assert clips["d-1-top-4"].array("actions.npy")[:, 0].tolist() == [4, 5]
    assert "the task changes within an episode" in capsys.readouterr().out


def edit_episodes(root, **columns):
    """Replace columns of a v3.0 data set's meta/episodes."""
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    pyarrow.parquet.write_table(pyarrow.table(pyarrow.parquet.read_table(file).to_pydict() | columns), file)


def test_lerobot_that_lacks_something(laq, tmp_path, capsys):
    """A camera that an episode lacks, an episode without rows, actions that are no numbers, indices for texts."""
    root, video = tmp_path / "v3", f"videos/{CAMERAS[0]}"
    lerobot_v30(root, {0: 3, 1: 4})
    edit_episodes(root, **{f"{video}/{name}": [0, None] for name in ("chunk_index", "file_index")})
    edit_episodes(root, tasks=[[0], [0]])
    pyarrow.parquet.write_table(pyarrow.table(dict(task=["open"], task_index=[0])), root / "meta/tasks.parquet")
    clips, _ = run(laq, tmp_path / "out", "--data", f"d={root}")
    assert [clip.meta["instruction"] for clip in clips.values()] == ["open"]
    assert f"left out {CAMERAS[0]}: meta/episodes names no video of it" in capsys.readouterr().out
    lerobot_v21(root / "v2", {0: 3, 1: 3})
    lerobot_table(root / "v2/data/chunk-000/episode_000000.parquet", {0: 3}, action=[None, [1.0], [2.0]])
    lerobot_table(root / "v2/data/chunk-000/episode_000001.parquet", {5: 3})
    with pytest.raises(DataError, match="none of the 4 recordings"):
        run(laq, tmp_path / "out2", "--data", f"d={root / 'v2'}")
    told = capsys.readouterr().out
    assert "episode_000000.parquet: actions: not rows of numbers" in told and "no rows of episode 1" in told
    shutil.rmtree(root / "meta/episodes")
    with pytest.raises(DataError, match="meta/episodes: no episodes"):
        run(laq, tmp_path / "out3", "--data", f"d={root}")


def test_lerobot_v30_spans_of_other_converters(laq, tmp_path):
    """to_timestamp may be the last frame's time; spans that do not hold the rows, or overlap, are errors."""
    root = tmp_path / "data"
    lerobot_v30(root, {0: 6, 1: 9})
    file, video = root / "meta/episodes/chunk-000/file-000.parquet", f"videos/{CAMERAS[0]}"
    table = pyarrow.parquet.read_table(file).to_pydict()

    def write(start, end):
        told = {f"{video}/from_timestamp": start, f"{video}/to_timestamp": end}
        pyarrow.parquet.write_table(pyarrow.table(table | told), file)

    write([0.0, 0.6], [0.5, 1.4])
    clips, _ = run(laq, tmp_path / "last", "--data", f"d={root}")
    assert [numbers(clip.frames()) for clip in clips.values()] == [list(range(6)), list(range(6, 15))]
    for start, end, said in (
        ([0.0, 0.0], [0.0, 0.0], "has 6 rows, but"),
        ([0.0, 0.6], [1.7, 1.5], "has 6 rows, but"),
        ([0.0, 0.0], [0.6, 0.9], "episodes 0 and 1 overlap"),
    ):
        write(start, end)
        with pytest.raises(DataError, match=said):
            run(laq, tmp_path / "no", "--data", f"d={root}")


def test_lerobot_whose_fps_is_not_its_videos(laq, tmp_path):
    """Rows at 5 Hz of a 10 fps video have every second frame."""
    root = tmp_path / "data"
    lerobot_v21(root, {0: 6})
    write_video(root / f"videos/chunk-000/{CAMERAS[0]}/episode_000000.mp4", grey(range(12)))
    edit_info(root, fps=5)
    clips, summary = run(laq, tmp_path / "out", "--data", f"d={root}")
    assert numbers(clips["d-0-top"].frames()) == [0, 2, 4, 6, 8, 10] and clips["d-0-top"].meta["fps"] == 5
    assert "6 frames, but 6 rows at 5 fps" in summary["d"]["broken"]["d-0-wrist"]


# --- shards that others made


def test_shards_with_folders_and_of_a_mac(laq, tmp_path):
    """A folder in the tar is part of the key; ._NAME is no member; a member that is there twice is an error."""
    import tarfile

    meta = dict(instruction="", fps=5, source="s", episode="e", camera="c", length=2)
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    members = [("a/0001", frames), ("b/0001", frames + 9), ("./c.x/0002", frames), ("a/._0001", None)]

    def add(tar, name, data):
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))

    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for key, array in members:
            add(tar, f"{key}.json", json.dumps(meta).encode() if array is not None else b"\0mac")
            if array is not None:
                add(tar, f"{key}.frames.npy", laq.shards.npy(array))
    clips = laq.shards.read_clips(tmp_path)
    assert [clip.key for clip in clips] == ["a/0001", "b/0001", "c.x/0002"]
    assert [clip.frames(4).max() for clip in clips] == [0, 9, 0]
    with tarfile.open(tmp_path / "s.tar", "a") as tar:
        add(tar, "a/0001.json", b"{}")
    said = []
    with pytest.raises(DataError, match="no clip of its shards can be used"):
        laq.shards.read_clips(tmp_path, say=said.append)
    assert "a/0001.json is there twice" in said[0]
    (tmp_path / "s.tar").write_bytes(gzip.compress((tmp_path / "s.tar").read_bytes()))
    with pytest.raises(DataError, match="not a complete WebDataset shard"):  # it would be read at the wrong places
        laq.shards.open_shard(tmp_path / "s.tar")
    clip = write_clip(laq, tmp_path, 3, actions_npy=laq.shards.npy(np.arange(3)))
    assert clip.array("actions.npy").tolist() == [[0], [1], [2]]


def test_one_broken_clip_costs_one_clip(laq, tmp_path):
    meta = dict(instruction="", fps=5, source="s", episode="e", camera="c", length=2)
    frames, said = laq.shards.npy(np.zeros((2, 8, 8, 3), np.uint8)), []
    texts = [json.dumps(meta), json.dumps(meta | dict(fps=0)), "{", json.dumps({}), json.dumps(meta | dict(length="2"))]
    laq.shards.write_shard(
        tmp_path / "s.tar",
        [{"__key__": str(n), "json": text.encode(), "frames.npy": frames} for n, text in enumerate(texts)],
    )
    assert [clip.key for clip in laq.shards.read_clips(tmp_path, say=said.append)] == ["0"] and len(said) == 4


def test_stored_frames_are_read_one_by_one(laq, tmp_path):
    """A clip of 200 MB in .frames.npy costs no such memory to stream."""
    import tracemalloc

    array = np.zeros((1000, 256, 256, 3), np.uint8)
    array[:, 0, 0, 0] = np.arange(1000) % 256
    clip = write_clip(laq, tmp_path, 1000, frames_npy=laq.shards.npy(array))
    del array
    tracemalloc.start()
    seen = list(clip.stream(lambda frame: int(frame[0, 0, 0])))
    assert seen == [n % 256 for n in range(1000)] and tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert clip.frames(None, [700, 3])[:, 0, 0, 0].tolist() == [700 % 256, 3]


def test_a_picture_beside_two_series(laq, tmp_path, capsys):
    """The series stay apart, and the picture is named as ignored."""
    (tmp_path / "d").mkdir()
    for name, n in [("cover", 9), *((f"{side}{n}", n + 10 * (side == "r")) for side in "lr" for n in range(4))]:
        (tmp_path / f"d/{name}.png").write_bytes(picture(grey([n])[0]))
    clips, _ = run(laq, tmp_path / "out", "--data", f"d={tmp_path / 'd'}", "--fps", 5)
    assert [numbers(clip.frames()) for clip in clips.values()] == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert "ignored pictures beside videos or other series: 1" in capsys.readouterr().out


def test_texts_of_other_encodings(laq, tmp_path):
    """Windows-1252 is read; UTF-16 without a mark and UTF-32 are named."""
    for name, text, encoding in (("a", "push", "utf-16-le"), ("b", "push", "utf-32"), ("c", "don’t …", "cp1252")):
        write_video(tmp_path / f"d/{name}.mp4", grey(range(3)))
        (tmp_path / f"d/{name}.txt").write_bytes(text.encode(encoding))
    clips, summary = run(laq, tmp_path / "out", "--data", f"d={tmp_path / 'd'}")
    assert [clip.meta["instruction"] for clip in clips.values()] == ["don’t …"]
    assert all("zero bytes" in why for why in summary["d"]["broken"].values())


def test_packets_without_times(laq, tmp_path):
    """As in a bare stream of h264: every frame is read."""
    write_video(tmp_path / "a.mkv", grey(range(20)), g=8, bf=2)
    (tmp_path / "d").mkdir()
    words = f"ffmpeg -v error -i {tmp_path}/a.mkv -c copy -f h264 {tmp_path}/d/a.mpeg"
    subprocess.run(words.split(), check=True)
    (clip,) = run(laq, tmp_path / "out", "--data", f"d={tmp_path / 'd'}")[0].values()
    assert numbers(clip.frames()) == list(range(20))


def test_a_depth_video_is_no_colour_video(laq, tmp_path):
    write_video(tmp_path / "d/a.mkv", grey(range(4)), "ffv1", pix_fmt="gray16le")
    with pytest.raises(DataError, match="none of the 1"):
        run(laq, tmp_path / "out", "--data", f"d={tmp_path / 'd'}")


def test_rows_of_another_task_than_the_episode(laq, tmp_path):
    lerobot_v21(tmp_path, {0: 4})
    lines = [dict(task_index=n, task=text) for n, text in enumerate(("task 0", "close"))]
    (tmp_path / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lerobot_table(tmp_path / "data/chunk-000/episode_000000.parquet", {0: 4}, task_index=[0, 0, 1, 1])
    with pytest.raises(DataError, match="none of the 2"):
        run(laq, tmp_path / "out", "--data", f"d={tmp_path}")


def test_rlds_says_what_it_does_not_read(laq, tmp_path, example, capsys):
    """A file that is no tfrecord, a camera with an empty picture, actions under another name."""
    path, frames = tmp_path / "x/b.tfrecord", [b"", *map(jpeg, grey(range(3)))]
    write_tfrecord(path, example, [record(range(4), **{"steps/observation/wrist": frames, "steps/actions": [0.0] * 4})])
    (tmp_path / "x/a.tfrecord").write_bytes(b"\xff" * 64)
    clips, summary = run(laq, tmp_path / "out", "--data", f"x={tmp_path / 'x'}", "--fps", 5)
    broken = " ".join(summary["x"]["broken"].values())
    assert len(clips) == 1 and "truncated" in broken and "wrist" in broken
    assert "no actions: its features are steps/actions" in capsys.readouterr().out
