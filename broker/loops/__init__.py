"""The loops: each is a tick() that returns when it wants to run next; runner.py keeps them alive."""
