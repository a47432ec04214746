"""Proves on this machine that nothing is bought twice or lost when processes are killed.

The drill starts an emulator of EvoLink's API with durable state. Worker processes buy from it over
a socket as a run does in production, by the application ``Krea``, with its checks, its client and
its transport. The workers are killed with SIGKILL, at chosen edges of the state machine and at
random times. At the end the emulator's records are compared with the journal and the files.

A drill can be held in a world (``worlds``) in which something outside the package is wrong: two
hosts, a clock that is set, a restored journal, an unmounted storage root, another account's key, a
full disk. In most worlds one worker between the others meets it. That worker may refuse to work,
with a clear error and before it requests a purchase. The workers after it must finish everything.
"""
