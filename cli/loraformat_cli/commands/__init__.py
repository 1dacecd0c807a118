"""One file per command; the file's name is the command's, its attribute `command` the command itself."""
