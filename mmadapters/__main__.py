"""`python -m mmadapters`: what torchrun and accelerate launch start."""

from mmadapters.tasks.cli import app

app(prog_name="mmadapters")
