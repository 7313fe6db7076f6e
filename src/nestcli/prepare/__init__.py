"""`nest prepare-data`: from folders, lists and manifests of audio to checked manifests, and shards if wanted.

In come paths in any supported form, out go train and validation manifests, a list of rejected files with reasons, and a
summary. `pipeline.py` is the file to open first; it calls the stages in order: `inputs` (with `kaldi`) collects
utterances, `check` decodes every file, `select` accepts or rejects, `segment` cuts and converts, `split` takes the
validation part, `write_shards` writes tars, `summary` counts the result and `summary_picture` draws it.
"""
