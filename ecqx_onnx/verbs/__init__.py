"""One file a verb: what the command line and Python users call."""
