"""Closed loop: a policy acts in the tabletop world or in any gymnasium environment."""

import math

import av
import numpy as np

from sim import world


def wilson(successes, trials, z=1.96):
    """95 % interval of a success rate (Wilson 1927): (low, high) in [0, 1]."""
    p, n = successes / trials, trials
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def told(instruction, success):
    """The caption of a film."""
    return f"{instruction}: {'done' if success else 'not done'}"


def on_tables(policy, seeds, body="disc", distractors=0, pixels=32, limit=70, films=0):
    """One episode per seed, side by side: (success (n,), steps (n,), the first `films` as (what happened, frames)).

    An episode ends when the task is done; steps is `limit` for those that never are.
    """
    tables = world.Tables(len(seeds), body, pixels, distractors, limit)
    frames = tables.reset(seeds)
    policy.reset(tables.words)
    won, steps = tables.success(), np.full(len(seeds), limit)
    film = [[frame] for frame in frames[:films]]
    for time in range(limit):
        actions = policy.act(frames, tables.effector.astype(np.float32))
        frames, success, _ = tables.step(actions)
        for i in range(films):
            if not won[i]:
                film[i].append(frames[i])
        steps = np.where(success & ~won, time + 1, steps)
        won |= success
        if won.all():
            break
    return won, steps, [(told(tables.words[i], won[i]), frames) for i, frames in enumerate(film)]


def in_gymnasium(policy, env, seeds, image_key=None, state_key=None, instruction=None, limit=1000, films=0):
    """As on_tables, one episode after another, in a gymnasium environment.

    The image is obs[image_key], or what env.render() gives; the state obs[state_key], or a plain array obs; the
    instruction is obs["instruction"] if there is one. Success: info "is_success" or "success", or a positive reward
    at the end.
    """
    won, steps, film = np.zeros(len(seeds), bool), np.full(len(seeds), limit), []

    def look(obs):
        named = isinstance(obs, dict)
        image = obs[image_key] if image_key else env.render()
        state = obs[state_key] if state_key else None if named else np.asarray(obs)
        if image is None:
            raise ValueError("the environment renders nothing: make it with render_mode rgb_array, or give --image-key")
        return np.asarray(image), state if policy.model.action["state"] else None

    for i, seed in enumerate(seeds):
        obs, info = env.reset(seed=int(seed))
        text = instruction or (obs.get("instruction") if isinstance(obs, dict) else None)
        if not text:
            raise ValueError("the environment gives no instruction: --instruction TEXT")
        policy.reset(text)
        frames = []
        taken, over = 0, False
        while not over and taken < limit:
            image, state = look(obs)
            frames += [image] if i < films else []
            obs, reward, terminated, truncated, info = env.step(policy.act(image, state))
            taken, over = taken + 1, terminated or truncated
        won[i] = bool(info.get("is_success", info.get("success", terminated and reward > 0)))
        steps[i] = taken if won[i] else limit
        film += [(told(text, won[i]), frames)] if i < films else []
    return won, steps, film


def write_film(path, films, fps=10, scale=4):
    """Rollouts (caption, frames) side by side as one mp4, frozen at their last frames; enlarged `scale` times."""
    films = [frames for _, frames in films]
    length = max(map(len, films))
    with av.open(str(path), "w", format="mp4") as file:
        stream = None
        for time in range(length):
            row = np.concatenate([film[min(time, len(film) - 1)] for film in films], 1)
            row = row.repeat(scale, 0).repeat(scale, 1)
            row = row[: len(row) // 2 * 2, : row.shape[1] // 2 * 2]
            if stream is None:
                stream = file.add_stream("libx264", rate=fps)
                stream.height, stream.width, stream.pix_fmt = *row.shape[:2], "yuv420p"
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(row), "rgb24")))
        file.mux(stream.encode())
