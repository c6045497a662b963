"""Fetch the MechaLabs data set from the Hugging Face hub; warn and stop when it holds no episodes.

Run:
  python pi05_finetune/readers/download_mechalabs.py --out data/mechalabs

Exit code 1 if there is nothing to train on: the set has been seen with nothing but a README in it.
"""

import sys
from pathlib import Path

sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
import common  # noqa: E402

REPO = "CRPlab/MechaLabs"
DATA = (".npz", ".parquet", ".hdf5", ".h5", ".tar")


def main(argv=None):
    parser = common.ArgumentParser(__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder; what is there is not fetched again")
    args = parser.parse_args(argv)
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = HfApi().list_repo_files(REPO, repo_type="dataset")
        found = [name for name in names if name.endswith(DATA)]
        if not found:
            print(f"warning: {REPO} holds no episodes, only {', '.join(names[:5])}; nothing was fetched")
            return 1
        snapshot_download(REPO, repo_type="dataset", local_dir=args.out)
    except Exception as error:  # the hub's client raises its own kinds, and those of three libraries below it
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise common.DataError(f"{REPO}: cannot be fetched from the hub ({reason})") from None
    print(f"{len(found)} files of episodes -> {args.out}; next: validate.py with specs/mechalabs.yaml")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
