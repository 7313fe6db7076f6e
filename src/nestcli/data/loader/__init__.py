"""Training loader: worker processes that make batches, and shared memory that carries the batches to the trainer.

The input is a data set and a sampler. The sampler yields places (a `Place` of `data/sampler.py` describes one batch of
a run), and the data set makes the batch of a place. The output is the batches in the sampler's order, the same for any
number of processes.

Start with `loader.py`: it starts the processes, sends them places and delivers batches. `worker.py` is one such
process. `ring.py` is the shared memory. `device_copies.py` takes batches on to a GPU. `watch.py` reports a process that
died or hangs, and the file it was reading.
"""
