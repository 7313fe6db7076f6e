"""From audio files to samples.

In comes the path of a local file, out go mono float32 samples at the rate that was asked for, or the reason why the
file cannot be used. `load.py` is the file to open first: it opens, decodes and resamples. `lengths` compares what was
decoded with what the header declares, with `containers` for formats of chunks; `sox` decodes formats that libsndfile
does not know; `inspect` decodes a whole file and reports every fault, for `nest prepare-data`.
"""
