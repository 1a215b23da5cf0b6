"""Several processes as one job: how they join, what must be the same in all, and how the others end when one is lost.

joining.py begins a job, agreeing.py is what its processes tell each other, ending.py ends it; last_line.py is a program
of its own, beside each process, that makes one line of what JAX's coordination service writes when it ends one.
"""
