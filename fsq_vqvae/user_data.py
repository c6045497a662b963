"""A user's own loaders: `--data module:path.py`, where path.py has `prepare_dataloaders(batch_size)`.

It returns an example action tensor (T, A), a training loader, and {data set name: validation loader}. A batch is a
tensor (B, T, A), a tuple that starts with one, or a dict with `actions` and, where chunks are padded, `mask` (B, T).
Under torchrun each process calls it, with its share of the batch, and should yield its own samples (RANK, WORLD_SIZE).
"""

import importlib.util
from pathlib import Path

import torch
from data import Source, describe


def load_function(path):
    """prepare_dataloaders of the file at `path`. This runs the user's file, as asked."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--data module:{path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "prepare_dataloaders"):
        raise ValueError(f"{path}: has no function prepare_dataloaders(batch_size)")
    return module.prepare_dataloaders


def as_batch(item, shape):
    """Whatever the user's loader gives -> the dict of data.py."""
    item = item if isinstance(item, dict) else dict(actions=item[0] if isinstance(item, (tuple, list)) else item)
    actions = torch.as_tensor(item["actions"]).float()
    if actions.ndim != 3 or actions.shape[1:] != shape:
        raise ValueError(
            f"a batch has shape {tuple(actions.shape)}, expected (B, {shape[0]}, {shape[1]}) as the example"
        )
    mask = torch.as_tensor(item.get("mask", torch.ones(actions.shape[:2], dtype=torch.bool))).bool()
    if not actions[mask].isfinite().all():
        raise ValueError("a batch of the user's loader holds NaN or infinity")
    return dict(actions=actions, mask=mask, source=torch.zeros(len(actions), dtype=torch.int64))


class Batches:
    """The user's loader, item by item as the dict of data.py."""

    def __init__(self, loader, shape):
        self.loader, self.shape = loader, shape

    def __iter__(self):
        return (as_batch(item, self.shape) for item in self.loader)

    def endless(self, skip):
        """Epoch after epoch, without the first `skip` batches: a stream that cannot seek is read again."""
        while True:
            item = None
            for item in self.loader:
                if skip > 0:
                    skip -= 1
                else:
                    yield as_batch(item, self.shape)
            if item is None:
                raise ValueError("the user's training loader is used up: it must give its batches again in each epoch")


def prepare_user_data(path, batch_size, normalise="quantile", chunks=8192):
    """(what the model keeps of it, chunks to fit the skeleton to, train Batches, {name: validation Batches})."""
    example, train, validation = load_function(path)(batch_size)
    shape, parts, count = tuple(example.shape[-2:]), [], 0
    for batch in (train := Batches(train, shape)):
        parts.append(batch)
        count += len(batch["mask"])
        if count >= chunks:
            break
    if not parts:
        raise ValueError(f"{path}: its training loader is empty")
    sample = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    rows = sample["actions"][sample["mask"]].numpy()
    about = describe(Source.whole("actions", rows, chunk=shape[0]), normalise)
    return about, sample, train, {name: Batches(loader, shape) for name, loader in validation.items()}
