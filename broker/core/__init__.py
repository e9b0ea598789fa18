"""The pure heart: no sockets, clocks, files or logging in here; time comes in as an argument."""
