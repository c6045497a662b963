"""Write the demo data: latents in the original VVAE layout, where a blob moves in one of 8 hidden directions a frame.

Run:
  python vvae_lam/demo.py --out runs/demo/vvae_lam
"""

import json
import sys
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # common.py, one folder up
import common

ABOUT = dict(version=1, recordings=240, chunks=6, channels=16, height=16, width=16, latents=2, shift=4, seed=0)


def smooth(rng, shape, cutoff):
    """Noise of `shape` (..., H, W) whose frequencies above `cutoff` cycles per image are gone; unit deviation."""
    wave = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) * n for n in shape[-2:]), indexing="ij"))
    field = np.fft.ifft2(np.fft.fft2(rng.normal(size=shape)) * (wave <= cutoff)).real
    return field / field.std()


def recording(rng, blob):
    """Latents (T, C, H, W) of unit deviation, and the direction (T,) in which the blob moves after each frame."""
    H, W, frames = ABOUT["height"], ABOUT["width"], ABOUT["chunks"] * ABOUT["latents"]
    directions = rng.integers(0, 8, frames)
    angle = directions * np.pi / 4
    moves = np.rint(np.stack([np.sin(angle), np.cos(angle)], 1) * ABOUT["shift"]).astype(int)
    places = rng.integers(0, H, 2) + np.concatenate([[[0, 0]], np.cumsum(moves[:-1], 0)])
    y, x = np.mgrid[:H, :W]
    down = (y - places[:, 0, None, None] + H // 2) % H - H // 2  # the blob leaves on one side and enters on the other
    across = (x - places[:, 1, None, None] + W // 2) % W - W // 2
    shape = np.exp(-(down**2 + across**2) / (2 * 1.5**2))  # T H W
    latents = smooth(rng, (ABOUT["channels"], H, W), 3)[None] + 3 * blob[:, None, None] * shape[:, None]
    return (latents / latents.std()).astype(np.float16), directions


def write(folder):
    """Write the data unless it is there already, all of it or nothing. Another version is replaced, folder and all."""
    folder = Path(folder).resolve()
    about = folder / "demo.json"
    if about.exists() and common.read_json(about) == ABOUT:
        return
    if folder.is_file() or (any(folder.glob("*")) and not about.exists()):
        raise common.DataError(f"{folder}: is there, and is no demo's data; give another folder")
    rng = np.random.default_rng(ABOUT["seed"])
    blob = rng.choice([-1.0, 1.0], ABOUT["channels"])  # how the blob looks in each channel
    with common.atomic(folder, folder=True) as made:
        for number in range(ABOUT["recordings"]):
            latents, directions = recording(rng, blob)
            chunks = latents.reshape(ABOUT["chunks"], ABOUT["latents"], *latents.shape[1:]).swapaxes(1, 2)
            with h5py.File(made / f"recording_{number:03d}.h5", "w") as file:
                file["embeddings"], file["actions"] = chunks, directions
                file.attrs.update(vae="none: synthetic latents", fps=2.0, causal=True)  # each frame is drawn by itself
        (made / about.name).write_text(json.dumps(ABOUT))


def main(argv=None):
    parser = common.ArgumentParser(__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; another demo's data are replaced")
    write(parser.parse_args(argv).out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
