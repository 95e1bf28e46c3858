"""What people meet on a terminal: help, completion, the end of a run, and talking with a model."""
