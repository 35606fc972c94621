"""Random inputs to all that takes inputs from outside: ops, configs, files, models.

`make test` runs a few examples of each test, always the same ones; `make fuzz` runs many, other ones each time, until
its time is over (`python -m tests.fuzz`). Where a bug could end the process, the work is done in another one.
"""
