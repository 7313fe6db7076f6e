"""`nest augment`: write noisy copies of a manifest's audio, mixed as in training.

The input is a manifest of speech and one of noise; the output is audio files and their manifest. Start with `run.py`:
it calls `noisy_copy` for each utterance, and `preview` draws some of the copies.
"""
