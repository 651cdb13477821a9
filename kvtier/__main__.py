"""`python -m kvtier`: the command, where its script is not on the path."""

from kvtier.cli.main import main

if __name__ == "__main__":
    main()
