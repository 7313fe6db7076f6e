"""What training reads: from manifests on disk to batches for the model.

In come the blocks `model.train_ds` and `model.validation_ds`, out go `NoiseBatch` tensors. Open `dataset.py` first: it
makes one batch from one place of the plan. Before it, `corpus` opens the data (`manifest_scan`, `tarred`,
`lhotse_cuts`), `batch_plan` forms the batches of an epoch, `sampler` deals them out, and `loader/` runs the data set in
other processes. Below it, `manifest` reads a line, `utterance_audio` its samples, `noise_pool` draws noise and `mixing`
mixes. `datamodule` is Lightning's view of all this. `make trace` prints the way of a batch.
"""
