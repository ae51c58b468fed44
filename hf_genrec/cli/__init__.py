"""The `genrec` command line: thin, every command is a function of the library."""
