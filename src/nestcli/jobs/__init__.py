"""Run tasks in many processes, keep their results, and watch the processes.

The input is a function and its tasks; the output is the results in order, with a note in place of the result if a task
killed or blocked its process. Start with `pool.py`; `ray_pool` does the same on a Ray cluster. `journal` keeps finished
results for the next start, `patience` sets the time limit of a file, `prefetch_thread` fetches one item ahead,
`activity` records what each loader process is reading.
"""
