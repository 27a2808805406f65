"""`python -m undervisor`."""

from undervisor.cli.main import main

if __name__ == "__main__":
    main()
