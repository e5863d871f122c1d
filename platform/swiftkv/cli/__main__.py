"""`python -m swiftkv.cli`: the `swiftkv` command of this very interpreter."""

from swiftkv.cli.main import main

main()
