"""Run `nest pretrain`: checks, the Lightning trainer with its callbacks, and the files of an experiment's folder.

A configuration comes in. A `RunResult` and a folder come out, with config.yaml, checkpoints, a .nemo file,
metrics.jsonl, bad_batches.jsonl and the loggers' curves. Batches come from `nestcli.data`; the model, its loss and its
optimiser from `nestcli.model`; `nestcli.checkpoint` reads and writes checkpoint files.

Start with run.py: `Pretraining` uses the other files in the order in which a run needs them.
"""
