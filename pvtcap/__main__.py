"""``python -m pvtcap`` is the ``pvtcap`` command; torchrun starts it this way."""

from pvtcap.cli import main

if __name__ == "__main__":
    main()
