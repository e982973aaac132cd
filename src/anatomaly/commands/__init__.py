"""The verbs of the command line: options, and what is done with them; whatever is heavy is imported inside."""
