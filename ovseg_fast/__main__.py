"""`python -m ovseg_fast`: the command line, also for launchers of several processes: `torchrun -m ovseg_fast train`."""

from .cli import main

main(prog_name="ovseg-fast")
