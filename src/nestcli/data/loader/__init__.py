"""The training loader: processes that make batches, and the memory that carries them to the trainer.

In come a data set, which makes the batch of a place, and a sampler, which names the places. Out come the batches, in
the sampler's order, the same for any number of processes.

Open `loader.py` first: it starts the processes, hands out places and delivers batches. `worker.py` is one such
process. `ring.py` is the shared memory that batches lie in. `watch.py` tells which process died or hangs, and over
which file.
"""
