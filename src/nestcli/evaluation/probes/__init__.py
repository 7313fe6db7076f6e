"""Probes ask the frozen features of an encoder questions, and ask baselines the same.

In: a manifest with labels, and a checkpoint. Out: a `ProbeResult`, and pictures of it. Open `run.py` first: it lists
the tasks. `systems.py` computes the features of the pretrained encoder and of the baselines; `asked.py` chooses the
lines and their labels; `classify.py`, `ctc.py`, `verify.py` and `abx.py` each hold one task.
"""
