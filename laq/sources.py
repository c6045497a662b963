"""What the entries of --data name: the clips of each source, the range of its gap, and the episodes held out."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from shards import clip_marks, held_out, owner, read_clips

from common import DataError


@dataclass
class Source:
    """The clips of one --data word, split by episode, and the range of its gap."""

    name: str
    path: str
    clips: list = field(repr=False)
    low: float  # smallest and largest gap, in frames or (seconds=True) in seconds
    high: float
    seconds: bool

    def gaps(self, clip):
        """The smallest and the largest gap of a clip, in frames, at least 1."""
        rate = clip.meta["fps"] if self.seconds else 1
        low = max(1, round(self.low * rate))
        return low, max(low, round(self.high * rate))

    def gap(self, clip):
        """The middle of that range: the gap of validation, labels and reports."""
        return sum(self.gaps(clip)) // 2

    def split(self, names):
        """Hold out the episodes of these names. Clips shorter than the gap are in neither part."""
        self.held_out, names = sorted(names), set(names)
        long = [clip for clip in self.clips if len(clip) > self.gap(clip)]
        self.short = len(self.clips) - len(long)
        self.train = [clip for clip in long if clip.episode not in names]
        self.validation = [clip for clip in long if clip.episode in names]
        if not self.train:
            raise DataError(f"--data {self.path}: no clip to train on ({self.short} are shorter than the gap)")

    def spec(self):
        """What a checkpoint keeps of it."""
        unit, episodes = "s" if self.seconds else "", len({clip.episode for clip in self.clips})
        about = dict(path=str(Path(self.path).resolve()), clips=clip_marks(self.clips), episodes=episodes)
        return about | dict(gap=f"{self.low:g}{unit}-{self.high:g}{unit}", held_out=self.held_out)


# --- flags: NAME=PATH, gaps, split


def named_paths(data):
    """["g1=PATH", "PATH"] -> [(name, path)]; without a name it is the path's last part. A path may hold a `=`."""
    pairs = []
    for word in data:
        name, equals, path = word.partition("=")
        whole = not equals or "/" in name or Path(word).exists()
        pairs.append((re.split(r"[/\\]", word.rstrip("/"))[-1], word) if whole else (name, path))
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise DataError(f"--data: two sources are called {max(names, key=names.count)}: write NAME=PATH")
    return pairs


def named(values, names, flag):
    """["g1=30", "droid=15"] or ["30"] -> {name: "30"}; a bare value is for all other sources.

    Several values of one source are joined by commas: lists of episodes, and nothing else.
    """
    table = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if equals and name not in names:
            raise DataError(f"{flag} {value}: no source is called {name}; there are {', '.join(names)}")
        table.setdefault(name if equals else None, []).append(rest if equals else value)
    return {name: ",".join(found) for name in names if (found := table.get(name) or table.get(None))}


def parse_gap(text):
    """3 (frames), 0.6s, or a range 0.4s-1.2s -> (low, high, in seconds?)."""
    found = re.fullmatch(r"(\d+|\d*\.?\d+s)(?:-(\d+|\d*\.?\d+s))?", text)
    if not found or (found[2] and found[1].endswith("s") != found[2].endswith("s")):
        raise DataError(f"--gap {text}: expected frames (3), seconds (0.6s) or a range (0.4s-1.2s)")
    low, high = (float(part.rstrip("s")) for part in (found[1], found[2] or found[1]))
    if not 0 < low <= high:
        raise DataError(f"--gap {text}: must be above 0, the smaller number first")
    return low, high, found[1].endswith("s")


def read_sources(data, gap, val_share=0.1, val_episodes=(), say=print):
    """The sources that the flags name. data: NAME=PATH or PATH; gap: 0.6s, 3 or g1=18."""
    pairs, sources = named_paths(data), []
    names = [name for name, _ in pairs]
    held, gap = named(val_episodes, names, "--val-episodes"), named(gap, names, "--gap")
    for name, path in pairs:
        source = Source(name, path, read_clips(path, say=say), *parse_gap(gap.get(name, "0.6s")))
        rates = {clip.meta["fps"] for clip in source.clips}
        if len(rates) > 1 and not source.seconds:
            say(f"warning: {name}: {min(rates):g} to {max(rates):g} frames a second: give --gap in seconds")
        source.split(held_out(source.clips, val_share, held.get(name)))
        sources.append(source)
    return sources


def restore_split(sources, specs):
    """Hold out what the checkpoint held out, in place. Returns a line for each source that has changed since.

    A source is known by its name, or else by its clips.
    """
    lines = []
    for source in sources:
        now, unknown = source.spec(), dict(episodes=0, clips=[], held_out=[])
        before = specs.get(source.name) or owner(source.name, source.clips, specs) or unknown
        source.split(before["held_out"])
        if before.get("clips") != now["clips"]:
            episodes = f"{now['episodes']} episodes, {before['episodes']} when the run began"
            lines.append(f"{source.name}: its clips have changed: {episodes}; the same are held out")
    return lines
