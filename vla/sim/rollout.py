"""Closed loop: a policy acts in environments, several episodes side by side."""

import math
import time

import av
import numpy as np


def wilson(successes, trials, z=1.96):
    """95 % interval of a success rate (Wilson 1927): (low, high) in [0, 1]."""
    p, n = successes / trials, trials
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def run(policy, envs, seeds, record=False):
    """One episode in each environment, side by side, so that the policy sees them as a batch.

    Returns a dict per environment: task, instruction, seed, success, steps, frames (what the policy saw and the last
    picture, if `record`). Images are rendered only where the policy plans.
    """
    instructions = [env.reset(seed) for env, seed in zip(envs, seeds, strict=True)]
    policy.reset(instructions)
    records = [
        dict(task=env.task, instruction=text, seed=seed, success=False, steps=0, frames=[])
        for env, text, seed in zip(envs, instructions, seeds, strict=True)
    ]
    running, images = [True] * len(envs), [None] * len(envs)
    for step in range(max(env.limit for env in envs)):
        plan = step % policy.n_action_steps == 0
        for i, env in enumerate(envs):
            if running[i] and (plan or record):
                images[i] = np.array(env.image())
                records[i]["frames"] += [images[i]] if record else []
        actions = policy.act(images, [env.state() for env in envs] if policy.state_dim else None)
        for i, env in enumerate(envs):
            if running[i]:
                success, over = env.step(actions[i])
                records[i].update(success=success, steps=step + 1)
                running[i] = not (success or over or step + 1 >= env.limit)
                if record and not running[i]:
                    records[i]["frames"].append(np.array(env.image()))
        if not any(running):
            break
    return records


def evaluate(policy, envs, episodes, seed=0, videos=0, say=print):
    """`episodes` episodes of each environment's task: (summary, videos).

    The seeds are seed * 1,000,000 + 0, 1, 2 ...: a policy compared with another under the same seed meets the same
    initial states. summary: success with its 95 % interval over all episodes, steps of the successes, the same per
    task, and a row for each episode.
    videos: (instruction and outcome, frames) of the first `videos` episodes.
    """
    records, shown, start = [], [], time.perf_counter()
    for number in range(episodes):
        batch = run(policy, envs, [seed * 1_000_000 + number] * len(envs), record=len(shown) < videos)
        for one in batch:
            frames = one.pop("frames")
            if frames and len(shown) < videos:
                shown.append((f"{one['instruction']}: {'success' if one['success'] else 'failure'}", frames))
        records += batch
        done, wins = number + 1, sum(one["success"] for one in records)
        left = (time.perf_counter() - start) / done * (episodes - done)
        if done % max(1, episodes // 5) == 0:
            say(f"{done} of {episodes} episodes a task: {wins} of {len(records)} succeed, {left:.0f} s left")
    limits = sorted({env.limit for env in envs})
    rule = f"An episode ends with its first success, or fails after {' or '.join(map(str, limits))} steps."
    return summarise(records) | dict(rule=rule, seed=seed, rows=records), shown


def summarise(records):
    """{success, low, high, successes, episodes, steps, tasks: {task: the same}}"""

    def rate(rows):
        wins = [row["steps"] for row in rows if row["success"]]
        low, high = wilson(len(wins), len(rows))
        steps = float(np.mean(wins)) if wins else None
        shares = dict(success=len(wins) / len(rows), low=low, high=high)
        return shares | dict(successes=len(wins), episodes=len(rows), steps_of_successes=steps)

    names = dict.fromkeys(row["task"] for row in records)
    tasks = {task: rate([row for row in records if row["task"] == task]) for task in names}
    return rate(records) | dict(tasks=tasks)


def write_video(path, clips, fps=10, scale=4):
    """Clips of frames (T, H, W, 3) side by side as one mp4, frozen at their last frames; enlarged `scale` times."""
    length = max(map(len, clips))
    with av.open(str(path), "w", format="mp4") as file:
        stream = None
        for step in range(length):
            row = np.concatenate([clip[min(step, len(clip) - 1)] for clip in clips], 1)
            row = row.repeat(scale, 0).repeat(scale, 1)
            row = row[: len(row) // 2 * 2, : row.shape[1] // 2 * 2]
            if stream is None:
                stream = file.add_stream("libx264", rate=fps)
                stream.height, stream.width, stream.pix_fmt = *row.shape[:2], "yuv420p"
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(row), "rgb24")))
        file.mux(stream.encode())
