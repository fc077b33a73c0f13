"""`python -m ovseg_fast`: the command line, also for `torchrun -m ovseg_fast train`."""

from .cli import main

main(prog_name="ovseg-fast")
