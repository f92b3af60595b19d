"""Local data sets: recognises how their files are laid out."""
