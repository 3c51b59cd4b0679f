"""``python -m lit_rlhf`` is ``lit-rlhf``."""

from lit_rlhf.cli import main

main()
