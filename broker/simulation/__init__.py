"""The broker against a lying cloud, in virtual time: histories from a seed, a referee who knows the truth.

`history` draws what happens from a seed, `stage` runs the real broker and plays the clients, the operator and
the crashes, `referee` compares what was promised with what the simulated cloud knows to be true, `shrink`
makes a history that broke a promise as short as it gets, `campaign` runs many.
"""
