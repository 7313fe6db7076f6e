"""Access to bytes: remote addresses, downloads and their cache, members of tars, and the folders that may be read.

The input is a path or an address, the output a local file or its bytes. Nothing here knows about audio or manifests.
Start reading at `addresses.py`, which decides which addresses are read and calls `fetch` (servers, retries) and `cache`
(copies on this machine). `tar_members` reads members of shards in place, `allowed_folders` applies $NEST_JAIL, and
`file_kinds` recognises files that are not what they should be.
"""
