"""One module for each command or family of commands; each imports what it needs when it runs."""
