"""Proves on this machine that nothing is bought twice or lost, whenever a process is killed.

The drill starts an emulator of EvoLink's API with durable state, and buys from it over a socket
with worker processes that do what a run does in production: ``KreaResource.carry``, with its
checks, its client and its transport. The workers are killed with SIGKILL, at chosen edges of the
state machine and at random times. At the end the emulator's books are compared with the journal
and with the files on disk.

It can be held in worlds that are odd: on two hosts, with clocks that are set, with a journal that
is older than its images, with a storage root that is not mounted, with another account's key, on a
disk that is full. What is odd is outside of the package, which is not changed for it: the hosts
are namespaces of Linux, the disk is a small one. In most worlds one worker between the others meets
it. It may refuse, with a clear error and before it asks for a purchase; the workers after it, in
the mended world, must end everything.

``edges``
    where a worker can be killed. Pure
``job``
    what a worker is told. Pure
``drilled``
    the resource and what depends on it, with the places where a worker kills itself
``worker``, ``again``
    the worker process, as a run and as the command ``materialize --again``
``workers``
    starts and kills worker processes
``server``
    the emulator's process
``plan``
    how many requests, kills and faults. Pure
``worlds``
    every world as data, and what happens in it between workers
``series``, ``wishes``
    one worker after another, of requests and of wishes for other pictures
``reckoning``
    books, journal and files to figures and a verdict. Pure
``run``
    one drill, from the first process to the verdict
``command``
    the command line
"""

from __future__ import annotations
