"""Data for training: from manifests on disk to batches for the model.

The input is the blocks `model.train_ds` and `model.validation_ds`, the output `NoiseBatch` tensors. Start reading at
`dataset.py`, which makes one batch from one entry of the plan. Before it, `corpus` opens the data (`manifest_scan`,
`tarred`, `lhotse_cuts`), `batch_plan` forms the batches of an epoch, `sampler` assigns them to processes, and `loader/`
runs the data set in worker processes. Below it, `manifest` reads a line, `utterance_audio` its samples, and
`mixing` mixes. `datamodule` presents all this to Lightning. `make trace` prints the path of a batch.
"""
