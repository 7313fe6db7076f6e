"""Watch a run: skip bad steps, measure its health, write metrics.jsonl and bad_batches.jsonl, feed the display.

Start with monitors.py, which builds the callbacks in the order in which Lightning calls them.
"""
