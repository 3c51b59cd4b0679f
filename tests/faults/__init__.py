"""The fault campaign: runs of every algorithm that are killed, preempted or damaged, and restarted by the same command.

    python -m tests.faults                                     all algorithms, about a hundred faults
    python -m tests.faults --algorithms ppo sft --faults 4     four faults for each of these two

Every run is the command line's own (``lit_rlhf.cli.main``) in a process of its own, forked from one that has imported
everything. What it ends with is compared to the bit with a run that nothing happened to.
"""
