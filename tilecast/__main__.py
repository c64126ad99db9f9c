"""`python -m tilecast` is the `tilecast` command."""

from tilecast.cli import main

if __name__ == "__main__":
    main()
