"""Speed and memory on this machine: the sections of `nest bench`."""
