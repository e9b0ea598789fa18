"""The benchmark: the real broker against its peers, on one machine, in one run. See README.md beside this."""
