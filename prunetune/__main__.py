"""``python -m prunetune`` is the command line; ``accelerate launch -m prunetune`` runs it on many processes."""

from prunetune.cli.main import main

main()
