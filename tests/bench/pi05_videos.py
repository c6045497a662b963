"""Frames per CPU second of pi05_finetune's video reader, in order and at random: one file per episode and camera.

Run:
  python tests/bench/pi05_videos.py
"""

import argparse
import tempfile
from pathlib import Path

import av
import numpy as np
from timing import interleaved, load

video = load("pi05_finetune", "readers.video")
video = vars(video)["readers.video"]


def write(path, seed, frames, pixels=224):
    """A video of moving squares, with a keyframe every second frame as LeRobot writes them."""
    base = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    base = base.repeat(pixels // 8, 0).repeat(pixels // 8, 1)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30, options=dict(g="2", crf="30", preset="ultrafast"))
        stream.width = stream.height = pixels
        for t in range(frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(base, t, 0), format="rgb24")))
        file.mux(stream.encode(None))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=200, help="episodes [200]")
    parser.add_argument("--frames", type=int, default=40, help="frames of each video [40]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cameras = {}
        for episode in range(args.episodes):
            for name in ("top", "wrist"):
                path = Path(folder) / f"{episode}_{name}.mp4"
                write(path, episode, args.frames)
                cameras[episode, name] = video.VideoFrames(path, 0.0, 30, args.frames)
        places = [(e, t) for e in range(args.episodes) for t in range(0, args.frames, 10)]
        drawn = np.random.default_rng(0).integers(0, len(places), len(places))

        def read(order):
            for episode, t in order:
                for name in ("top", "wrist"):
                    cameras[episode, name][t]

        orders = dict(sorted=places, random=[places[i] for i in drawn])
        seconds = interleaved({name: lambda order=order: read(order) for name, order in orders.items()}, 3)
    rate = {name: 2 * len(places) / value for name, value in seconds.items()}
    print(f"{args.episodes} episodes x 2 cameras, cache of {video.OPEN_FILES} files")
    print(f"sorted {rate['sorted']:.0f} frames/s, random {rate['random']:.0f}: {rate['random'] / rate['sorted']:.2f}")


if __name__ == "__main__":
    main()
