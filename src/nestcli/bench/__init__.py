"""Measure speed and memory on this machine: the sections of `nest bench`.

A training configuration and the options of the call come in; a `BenchReport` with one `SectionReport` per section
comes out. Each measured side (nest, NeMo, plain file reads) is a separate process that answers requests: `ours.py` and
`side.py` are the two kinds of process, `peer.py` starts them. Start with `run.py`, which lists the sections.
"""
