"""``python -m ifkv``: the command line, where its script is not on the path."""

from ifkv.cli import main

if __name__ == "__main__":
    main()
