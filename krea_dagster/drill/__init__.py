"""Proves on this machine that nothing is bought twice or lost, whenever a process is killed.

The drill starts an emulator of EvoLink's API with durable state, and buys from it with worker
processes that run the engine as it is in production. The workers are killed with SIGKILL, at
chosen edges of the state machine and at random times. At the end the emulator's books are
compared with the journal and with the files on disk.

``edges``
    where a worker can be killed. Pure
``job``
    what a worker is told. Pure
``worker``
    the worker process: the engine, and the places where it kills itself
``workers``
    starts and kills worker processes
``server``
    the emulator's process
``reckoning``
    books, journal and files to figures and a verdict. Pure
``run``
    the drill, and the storm of faults
``command``
    the command line
"""

from __future__ import annotations
