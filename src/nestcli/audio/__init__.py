"""Decoding of audio files into samples.

The input is the path of a local file. The output is mono float32 samples at the requested rate, or the reason why the
file cannot be used. Start reading at `load.py`, which opens, decodes and resamples. `lengths` compares the decoded
length with the one that the header declares, and uses `containers` for chunked formats. `sox` decodes formats that
libsndfile does not know. `inspect` decodes a whole file and reports its first fault, for `nest prepare-data`.
"""
