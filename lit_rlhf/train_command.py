"""``lit-rlhf train``, without what a run needs: that is imported where the run is, not where a multirun is started.

The process that starts a multirun's jobs would else spend as long on importing as each of its workers, before them.
"""

from omegaconf import DictConfig

from lit_rlhf.config import command


@command("train")
def main(config: DictConfig) -> float | None:
    from lit_rlhf.train import run_job

    return run_job(config)
