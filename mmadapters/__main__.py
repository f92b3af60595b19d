"""`python -m mmadapters`: what torchrun and accelerate launch start.

The command is found as the one that the distribution installs: the library does not know the
application that is built on it.
"""

from importlib.metadata import entry_points

(command,) = entry_points(group="console_scripts", name="mmadapters")
command.load()(prog_name="mmadapters")
