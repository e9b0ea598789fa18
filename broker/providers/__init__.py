"""One file per cloud, one port: base.py."""
