"""Fetch the MechaLabs data set from the Hugging Face hub; warn and stop when it holds no episodes.

Run:
  python pi05_finetune/readers/download_mechalabs.py --out data/mechalabs

Exit code 1 if there is nothing to train on: the set has been seen with nothing but a README in it.
"""

import sys
from pathlib import Path

sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
import common  # noqa: E402

DATA = (".npz", ".parquet", ".hdf5", ".h5", ".tar")


def main(argv=None):
    parser = common.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder for its files; what is there already is not fetched again")
    add("--repo", default="CRPlab/MechaLabs", metavar="NAME", help="data set on the hub")
    add("--revision", metavar="NAME", help="branch, tag or commit; without it the newest")
    args = parser.parse_args(argv)
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = HfApi().list_repo_files(args.repo, repo_type="dataset", revision=args.revision)
        found = [name for name in names if name.endswith(DATA)]
        if not found:
            print(f"warning: {args.repo} holds no episodes, only {', '.join(names[:5])}; nothing was fetched")
            return 1
        snapshot_download(args.repo, repo_type="dataset", revision=args.revision, local_dir=args.out)
    except Exception as error:  # the hub's client raises its own kinds, and those of three libraries below it
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise common.DataError(f"{args.repo}: cannot be fetched from the hub ({reason})") from None
    print(f"{len(found)} files of episodes -> {args.out}; next: validate.py with specs/mechalabs.yaml")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except common.DataError as error:
        common.fail(error)
