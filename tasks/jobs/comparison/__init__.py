"""`mmadapters compare`: methods beside each other on one job."""
