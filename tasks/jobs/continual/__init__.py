"""`mmadapters continual`: jobs learned one after another."""
