"""From a command line to a checked config, and from its nodes to objects."""
