"""`python -m visionlora`: the same as the `visionlora` command, for `accelerate launch -m visionlora`."""

from visionlora.cli.main import main

if __name__ == "__main__":
    main()
