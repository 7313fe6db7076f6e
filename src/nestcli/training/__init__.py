"""Run `nest pretrain`: checks, the Lightning trainer with its callbacks, and the files of an experiment's folder.

A configuration comes in, with overrides applied. Out goes a folder with checkpoints, a .nemo file, metrics.jsonl,
bad_batches.jsonl and curves, and a `RunResult`. Batches come from `nestcli.data`; the model, its loss and its
optimiser from `nestcli.model`; checkpoint files are written and read by `nestcli.checkpoint`.

Open run.py first: `Pretraining` names every other file in the order in which a run needs it.
"""
