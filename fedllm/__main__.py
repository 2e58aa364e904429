"""`python -m fedllm` is the command line."""

from fedllm.cli.main import main

main()
