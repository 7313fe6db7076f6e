"""Where bytes are: remote addresses, their fetching and caching, members of tars, and the folders that may be read.

In comes a path or an address, out goes a local file or its bytes. Nothing here knows audio or manifests. `addresses.py`
is the file to open first: it says which addresses are read, and calls `fetch` (servers, retries) and `cache` (copies on
this machine). `tar_members` reads members of shards in place, `allowed_folders` holds $NEST_JAIL, `file_kinds` names
files that are not what they should be.
"""
