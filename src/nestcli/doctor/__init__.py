"""Check the machine and the installation for `nest doctor`.

The results folder and the environment come in; a `Report` of `Check`s comes out, one row each, with a remedy for every
check that is not ok. Anything that may crash or hang, such as importing torch, is tried in a child process: `child.py`
runs the trials, `trials.py` starts it. Start with `run.py`, which lists the sections.
"""
