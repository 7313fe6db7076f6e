"""`nest prepare-data`: turn folders, lists and manifests of audio into checked manifests and, on request, shards.

The input is paths in any supported form. The output is train and validation manifests, a list of rejected files with
reasons, and a summary. Start with `pipeline.py`, which calls the stages in order: `inputs` (with `kaldi`) collects
utterances, `check` decodes every file, `select` accepts or rejects, `segment` cuts and converts, `split` takes the
validation part, `write_shards` writes tars, `summary` counts the result and `summary_picture` draws it.
"""
