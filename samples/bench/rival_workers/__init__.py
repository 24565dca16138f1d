"""One module per rival of ../rivals.py, and the protocol they share."""
