"""Speech recognition with CTC on frozen speech encoders."""
