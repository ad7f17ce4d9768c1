"""The stream of tasks: shuffled without end, and resumable to the exact position."""

from __future__ import annotations

from collections.abc import Sequence

import grain
from grain import DatasetIterator

from ppojax.envs import Task


def task_stream(tasks: Sequence[Task], prompts: int, seed: int) -> DatasetIterator:
    """Iterate over batches (lists) of `prompts` tasks, reshuffled every epoch.

    `get_state()` gives a JSON-able position and `set_state()` goes back to it.
    """
    # Reading is a dictionary lookup: threads would only add an order that is not reproducible.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    data = grain.MapDataset.source(tasks).seed(seed).shuffle().repeat()
    return iter(data.batch(prompts, batch_fn=list).to_iter_dataset(options))
