"""Work in many processes: pools, their journal, and what is known about a process from outside.

In go functions and tasks, out come results in order, or the task that killed or blocked its process. `pool.py` is the
file to open first; `ray_pool` offers the same on a Ray cluster. `journal` keeps finished results for the next start,
`patience` says how long a file may take, `prefetch_thread` works one item ahead, `activity` notes what a loader process
is reading.
"""
