"""Frames of a video by time."""

import functools
import os
import resource

import av
import numpy as np

from common import DataError

# An open file costs a handle and its index. Random access over one file per episode and camera opens a file for every
# frame if the cache is smaller than the data set.
OPEN_FILES = min(512, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class VideoFrames:
    """`count` frames of a video file from the time `start` on, `fps` a second, by seeking; the file stays open."""

    def __init__(self, path, start, fps, count):
        self.path, self.start, self.fps, self.count = path, start, fps, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return open_video(str(self.path), os.getpid()).at(self.start + i / self.fps, 0.5 / self.fps)


class Video:
    """An open video that gives the frame of a time. It goes on decoding where the next frame is near."""

    def __init__(self, path):
        try:
            self.path, self.container = path, av.open(path)
            self.stream = self.container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            raise DataError(f"{path}: not a video ({error}); copy it again") from None
        self.stream.thread_type = "NONE"  # threads of a forked loader process would never come back
        self.decoder, self.time = None, 0.0

    def at(self, time, slack):
        """Frame (H, W, 3) uint8 whose time is within `slack` seconds."""
        if self.decoder is None or not self.time < time < self.time + 16 * slack:
            self.container.seek(int((time - slack) / self.stream.time_base), stream=self.stream)
            self.decoder = self.container.decode(self.stream)
        try:
            for frame in self.decoder:
                self.time = float(frame.pts * self.stream.time_base)
                if self.time >= time - slack:
                    if self.time > time + slack:
                        break
                    return to_rgb(frame)
        except av.FFmpegError as error:
            raise DataError(f"{self.path}: cannot be decoded at {time:.3f} s ({error})") from None
        finally:
            self.decoder = self.decoder if self.time <= time + slack else None
        raise DataError(f"{self.path}: has no frame at {time:.3f} s; the description promises one")


def to_rgb(frame):
    """av.VideoFrame -> (H, W, 3) uint8 by the matrix and range that the stream is tagged with."""
    matrix = {1: 1, 9: 9, 10: 9}.get(int(frame.colorspace), 5)  # swscale's numbers: 1 BT.709, 9 BT.2020, 5 BT.601
    full = int(frame.color_range) == 2
    kwargs = dict(src_colorspace=matrix, dst_colorspace=5, src_color_range=2 if full else 1, dst_color_range=2)
    try:
        return frame.reformat(format="rgb24", **kwargs).to_ndarray()
    except (TypeError, ValueError):  # a pixel format that swscale converts by itself, such as gray or rgb
        return np.asarray(frame.to_ndarray(format="rgb24"))


@functools.lru_cache(maxsize=OPEN_FILES)
def open_video(path, process):
    """An open Video. `process` keeps a forked process from sharing the file's position."""
    return Video(path)
