"""python -m hylo: the command line, for launchers that start a module (torchrun -m hylo distill ...)."""

from hylo.cli import main

main()
