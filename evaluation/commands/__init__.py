"""The command lines of experiments/, one module a script; --help is answered without torch."""
