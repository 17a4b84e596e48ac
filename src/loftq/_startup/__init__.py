"""A folder for PYTHONPATH: the interpreters that a tool starts import loftq as they begin."""
