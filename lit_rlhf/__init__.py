"""PyTorch Lightning modules for RLHF experiments. The public names; each is imported when it is first used."""

import os

from lit_rlhf.imports import lazily as _lazily

__version__ = "0.1.0"

# The OpenMP that torch brings lets idle threads spin. On a machine with other work each barrier then waits for threads
# that have no core: with its default, a chain of matrix products on two busy cores took ten times as long as with short
# spins. With spins of 1,000 threads fall asleep between the steps of a model that has the machine to itself, which made
# PPO iterations a fifth longer than with 10,000. Read when torch is first imported; a value that the user set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_HOME = {
    # algorithms
    "PPO": "algorithms",
    "TRPO": "algorithms",
    "A2C": "algorithms",
    "Reinforce": "algorithms",
    "ReinforcePP": "algorithms",
    "RLOO": "algorithms",
    "GRPO": "algorithms",
    "DrGRPO": "algorithms",
    "DAPO": "algorithms",
    "GSPO": "algorithms",
    "OnlineDPO": "algorithms",
    "RAFT": "algorithms",
    "ExpertIteration": "algorithms",
    "SFT": "algorithms",
    "RewardModel": "algorithms",
    "DPO": "algorithms",
    "RobustDPO": "algorithms",
    "IPO": "algorithms",
    "KTO": "algorithms",
    "ORPO": "algorithms",
    "ILQL": "algorithms",
    "DQN": "algorithms",
    # models and sampling
    "Policy": "models",
    "ValueHead": "models",
    "SeparateCritic": "models",
    "Sampler": "rollout",
    # controllers and schedules
    "FixedKL": "kl",
    "AdaptiveKL": "kl",
    "LinearKL": "kl",
    "NoKL": "kl",
    "SymmetricClip": "clip",
    "AsymmetricClip": "clip",
    "LinearClip": "clip",
    "DualClip": "clip",
    "NoClip": "clip",
    "AdaptiveKLPenalty": "clip",
    "NoBaseline": "baseline",
    "BatchMeanBaseline": "baseline",
    "ValueBaseline": "baseline",
    "NoEntropy": "entropy",
    "ConstantEntropy": "entropy",
    "LinearEntropy": "entropy",
    "TargetEntropy": "entropy",
    # rewards
    "CompositeReward": "rewards",
    "ConstrainedReward": "rewards",
    "DistinctReward": "rewards",
    "EnsembleReward": "rewards",
    "FunctionReward": "rewards",
    "JsonReward": "rewards",
    "JudgeComparison": "rewards",
    "JudgeReward": "rewards",
    "KeywordReward": "rewards",
    "LengthReward": "rewards",
    "ModelReward": "rewards",
    "PrefixReward": "rewards",
    "RegexReward": "rewards",
    "RemoteReward": "rewards",
    "RepetitionPenalty": "rewards",
    "ScoreShaper": "rewards",
    "VaderReward": "rewards",
    "VerifierReward": "rewards",
    # data
    "ArithmeticPrompts": "data",
    "ChatModel": "chat",
    "ConstitutionalPreferences": "constitutional",
    "ConstitutionalRevisions": "constitutional",
    "DatasetPrompts": "data",
    "HumanRatingsCompletions": "data",
    "HumanRatingsPairs": "data",
    "HumanRatingsPrompts": "data",
    "HumanRatingsScores": "data",
    "HumanRatingsText": "data",
    "ListPrompts": "data",
    # several processes
    "FSDP2Strategy": "distributed",
    # what watches a run
    "CSVLogger": "loggers",
    "TensorBoardLogger": "loggers",
    "WandbLogger": "loggers",
    "Samples": "callbacks",
    "Checkpoints": "callbacks",
    "Distributions": "callbacks",
    "Evaluation": "callbacks",
    "HackingMonitor": "callbacks",
    "KLGuard": "callbacks",
    "Progress": "callbacks",
    "Detector": "hacking",
    "Collapse": "hacking",
    "Disagreement": "hacking",
    "EntropyFalls": "hacking",
    "GoldFalls": "hacking",
    "KLSpeed": "hacking",
    "LengthGain": "hacking",
    "Novelty": "hacking",
    "Phrase": "hacking",
    "Repetition": "hacking",
    "Sweep": "sweep",
    "build_report": "report",
    # how far a policy is from the best possible one
    "ExactProblem": "exact",
    # what says whether a policy became better
    "DistinctN": "evaluation",
    "EmptyRate": "evaluation",
    "PairAccuracy": "evaluation",
    "PassAtK": "evaluation",
    "Perplexity": "evaluation",
    "RefusalRate": "evaluation",
    "SelfBLEU": "evaluation",
    "WinRate": "evaluation",
    # what a run takes before it starts
    "Machine": "estimation",
    "ThisMachine": "estimation",
    "UserError": "errors",
}
__all__ = [*_HOME]


__getattr__ = _lazily(__name__, _HOME)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
