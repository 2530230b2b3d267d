"""`python -m speed_async` runs the `speed-async` command."""

from speed_async.cli import main

if __name__ == "__main__":
    main()
