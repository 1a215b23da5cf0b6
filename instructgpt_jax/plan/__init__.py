"""Before the launch: does a configuration fit, how fast is it, what does it cost; `--plan=TOPOLOGY` of main.

`topology.py` describes the devices, `shapes.py` and `programs.py` make a stage's programs from its configuration alone,
`cost.py` reads what the compiler made of them, `answer.py` adds it up and `command.py` tells it.
"""
