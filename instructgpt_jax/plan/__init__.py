"""Before the launch: does a configuration fit, how fast is it, what does it cost; `--plan=TOPOLOGY` of main.

`topology.py` describes the devices, `shapes.py` and `programs.py` make a stage's programs from its configuration alone,
`cost.py` reads what the compiler made of them (`hlo.py` its text, `work.py` products, `rings.py` collectives),
`answer.py` adds it up, `search.py` mends what does not fit and `command.py` tells it; `flags.py` is what was asked.
"""
