"""The console script: ``lit-rlhf COMMAND [Hydra overrides]``. Imports nothing heavy before it knows the command."""

import importlib
import sys

from lit_rlhf import __version__

COMMANDS = {
    "train": "one training run: lit-rlhf train algorithm=ppo kl.coef=0.1",
    "pipeline": "SFT, reward model, PPO and report in one go: lit-rlhf pipeline experiment=human_ratings",
    "eval": "a run or model on held-out data, compared with others: lit-rlhf eval run=outputs/human_ratings/ppo",
    "report": "report.html of a run, pipeline or evaluation, or of several: lit-rlhf report outputs/human_ratings",
    "sample": "completions of policies side by side: lit-rlhf sample policies=[smollm2] prompts=['A film that']",
    "export": "a run's model with a card, or its adapter: lit-rlhf export run=outputs/human_ratings/ppo output=mine",
    "estimate": "memory and time before a run: lit-rlhf estimate policy=llama_8b trainer=fsdp2 machine=8xh100",
    "fetch": "models and data into the cache: lit-rlhf fetch smollm2 minilm human_ratings",
}
_MODULES = {"train": "lit_rlhf.train_command", "eval": "lit_rlhf.evaluate"}

USAGE = "usage: lit-rlhf COMMAND [overrides]\n\n" + "\n".join(
    f"  {name:10} {text}" for name, text in COMMANDS.items()
) + "\n\nlit-rlhf COMMAND --help shows the config groups of a command and their members."


def main() -> None:
    """Runs the subcommand named first on the command line."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return
    if command in ("-V", "--version"):
        print(__version__)
        return
    if command not in COMMANDS:
        sys.exit(f"lit-rlhf: there is no command '{command}'\n\n{USAGE}")
    sys.argv = [f"lit-rlhf {command}", *sys.argv[2:]]
    importlib.import_module(_MODULES.get(command, f"lit_rlhf.{command}")).main()
