"""The command line: one thin file per verb; each parses, calls the library and prints."""
