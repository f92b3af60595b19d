"""The application on top of the library: tasks, their data and the command line."""
