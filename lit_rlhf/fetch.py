"""Brings models and data into the cache: ``lit-rlhf fetch [NAME ...] [--force]``."""

from lit_rlhf.config import plain_command
from lit_rlhf.errors import UserError
from lit_rlhf.models.sources import ARTEFACTS, fetch

USAGE = f"lit-rlhf fetch [{' | '.join(sorted(ARTEFACTS))}] [--force]: without a name, everything"


@plain_command(USAGE)
def main(arguments: list[str]) -> None:
    """Fetches the named things, or all; ``--force`` makes them anew."""
    names = [argument for argument in arguments if not argument.startswith("-")] or sorted(ARTEFACTS)
    if unknown := [a for a in arguments if a.startswith("-") and a != "--force"]:
        raise UserError(f"there is no option {unknown[0]}; usage: {USAGE}")
    for name in names:
        print(f"{name}: {fetch(name, force='--force' in arguments)}")


if __name__ == "__main__":
    main()
