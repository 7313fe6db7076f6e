"""`nest augment`: noisy copies of a manifest's audio, mixed as training mixes them.

In come a manifest of speech and one of noise, out go audio files and their manifest. `run.py` is the file to open
first; it writes what `noisy_copy` makes of each utterance, and `preview` draws some of them.
"""
