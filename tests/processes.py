"""Runs for one process and for several: what each process of theirs has at the end is saved to a folder."""

import math
import os
import signal
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ppo_runs import Watch, make
from tiny import LORA, Prompts, letters, tiny_policy
from torch.utils.data import DataLoader

from lit_rlhf.algorithms import DPO, DQN, GRPO, PPO, SFT, TRPO, OnlineDPO, RewardModel
from lit_rlhf.callbacks.checkpoints import Checkpoints
from lit_rlhf.clip import AdaptiveKLPenalty
from lit_rlhf.distributed import FSDP2Strategy, first_decides, rank, require_everywhere, whole, world_size
from lit_rlhf.errors import UserError
from lit_rlhf.kl import AdaptiveKL
from lit_rlhf.models.critic import SeparateCritic
from lit_rlhf.rewards.shaping import ScoreShaper
from lit_rlhf.rollout.sampler import Sampler

TEXTS = ["hello there", "a b c", "the fox", "xyz", "zebra", "one two three", "q", "lorem ipsum", "last"]


def two_parts(prompts, completions, **columns):
    return {"letters": letters(prompts, completions), "words": [float(len(text.split())) for text in completions]}


def momentum(parameters):
    """Proportional to the gradient, so that what differs in the weights is what differs in the gradients."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.5)


def ppo(lora=None, **changes):
    settings = {
        "kl": AdaptiveKL(init_coef=0.1, target=0.01, horizon=50), "scores": ScoreShaper(normalize=True),
        "optimizer": momentum, "reward": two_parts, "gold": letters,
    }  # fmt: skip
    return make(tiny_policy(lora=lora), **{**settings, **changes})


class Texts(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([{"text": text} for text in TEXTS], batch_size=2, shuffle=True)  # the last has one row

    def val_dataloader(self):
        return DataLoader([{"text": text} for text in TEXTS[:5]], batch_size=2)


class Rewarded(L.LightningDataModule):
    def train_dataloader(self):
        rows = [{"completion": text, "reward": float(len(text) % 3)} for text in TEXTS]
        return DataLoader(rows, batch_size=3, shuffle=True)


class Pairs(L.LightningDataModule):
    def train_dataloader(self):
        rows = [{"chosen": good, "rejected": bad} for good, bad in zip(TEXTS[1:], TEXTS[:-1], strict=True)]
        return DataLoader(rows, batch_size=4, shuffle=True)


def group(algorithm, **changes):
    settings = {
        "policy": tiny_policy(), "reward": letters, "sampler": Sampler(max_new_tokens=5), "rollout_batch_size": 8,
        "group_size": 4, "minibatch_size": 4, "optimizer": momentum, "seed": 3,
    }  # fmt: skip
    return algorithm(**{**settings, **changes})


class Spoiled(PPO):
    """One loss of two steps is NaN, and only that of one process."""

    def loss(self, *args):
        loss, metrics = super().loss(*args)
        bad = rank() == world_size() - 1 and self.trainer.global_step in (1, 2)
        return (loss * math.nan if bad else loss), metrics

#: Half of all bytes end a completion, so that the completions of some processes are done long before others'.
SHORT = Sampler(max_new_tokens=12, stop_tokens=list(range(3, 131)))

#: name -> (algorithm, datamodule, settings of the trainer)
RUNS = {
    "full": (lambda _: ppo(), lambda: Prompts(validation=True), {"accumulate_grad_batches": 2, "max_epochs": 3}),
    "lora": (lambda _: ppo(LORA), Prompts, {}),
    "separate": (lambda _: ppo(critic=SeparateCritic, clip=AdaptiveKLPenalty()), Prompts, {}),
    "spoiled": (lambda _: ppo(algorithm=Spoiled), Prompts, {}),
    "stopped": (lambda _: ppo(target_kl=1e-4), Prompts, {}),
    "grpo": (lambda _: group(GRPO, sampler=SHORT), Prompts, {}),
    "gemma3": (lambda _: group(GRPO, policy=tiny_policy("gemma3")), Prompts, {"max_epochs": 1}),  # no image
    "online_dpo": (lambda _: group(OnlineDPO), Prompts, {}),
    "trpo": (lambda _: group(TRPO), Prompts, {"max_epochs": 1}),
    "dpo": (lambda _: DPO(policy=tiny_policy(), optimizer=momentum, log_every_n_steps=1), Pairs, {}),
    "dqn": (lambda _: DQN(policy=tiny_policy(), optimizer=momentum, log_every_n_steps=1), Rewarded, {}),
    "sft": (
        lambda _: SFT(policy=tiny_policy(), optimizer=momentum, log_every_n_steps=1),
        Texts,
        {"accumulate_grad_batches": 2},
    ),
    "reward_model": (
        lambda model: RewardModel(model_path=str(model), optimizer=momentum, max_length=16, log_every_n_steps=1),
        Pairs,
        {},
    ),
}  # fmt: skip

#: By FSDP2; what has a path of its own through it.
SHARDED = ["full", "lora", "separate", "spoiled", "grpo", "gemma3", "sft", "reward_model"]


class FirstGradient(Watch):
    """Keeps the gradient of the first optimiser step, too."""

    gradient = None

    def on_train_batch_start(self, *_):
        pass

    def on_before_optimizer_step(self, _trainer, module, _optimizer):
        if self.gradient is None:
            found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
            self.gradient = {n: whole(x).clone() for n, x in found.items()}


def controllers_of(module):
    """The state of everything that is adapted from iteration to iteration."""
    if not module.online:
        return {}
    state = module.state()
    return {name: state[name] for name in ("controllers", "scores", "minibatch_kl", "last_kl", "tokens")}


def run(folder, name, *, model=None, strategy="auto", devices=1, saved=None, ckpt_path=None, every=None, **settings):
    """Runs ``RUNS[name]`` and leaves ``<saved or name>.<rank>.pt``: weights, rows and samples of this process."""
    algorithm, data, options = RUNS[name]
    module, watch = algorithm(model), FirstGradient()
    checkpoints = ModelCheckpoint(
        dirpath=folder / f"{saved or name}_checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=every
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder, check_val_every_n_epoch=1,
        callbacks=[watch, *([checkpoints] if every else [])], enable_checkpointing=bool(every),
        **{"max_epochs": 2, **options, **settings},
    )  # fmt: skip
    trainer.fit(module, datamodule=data(), ckpt_path=ckpt_path)
    module.export(folder / f"{saved or name}_model")
    result = {
        "weights": {n: whole(p.detach()).clone() for n, p in module.named_parameters() if p.requires_grad},
        "rows": [{n: x for n, x in row.items() if not n.startswith("time/") and "per_second" not in n}
                 for row in watch.rows],
        "samples": watch.samples,
        "gradient": watch.gradient,
        "controllers": controllers_of(module),
    }  # fmt: skip
    torch.save(result, folder / f"{saved or name}.{rank()}.pt")


class Faulty:
    """Letters, but in the second process ``raises`` in a validation, or scores NaN in the second rollout."""

    name = "letters"

    def __init__(self, raises=None, on_failure=None, spoiled=False):
        self.raises, self.spoiled, self.rollouts = raises, spoiled, 0
        if on_failure:
            self.on_failure = on_failure

    def __call__(self, prompts, completions, **columns):
        training = len(prompts) > 1  # each process has one prompt of a validation batch, and four of a rollout
        self.rollouts += training
        if rank() == 1 and not training and self.raises is not None:
            raise self.raises
        scores = letters(prompts, completions)
        return [math.nan, *scores[1:]] if rank() == 1 and self.spoiled and self.rollouts == 2 else scores


#: name -> a reward that fails in one of two processes
FAULTY = {
    "mistake": lambda: Faulty(KeyError("careless")),
    "stop": lambda: Faulty(UserError("gone"), "stop"),
    "skip_batch": lambda: Faulty(UserError("gone"), "skip_batch"),
    "nan": lambda: Faulty(spoiled=True),
}


def run_faulty(folder, name):
    """Leaves ``<name>.<rank>.pt``: the rows, and what ended the run."""
    watch, said = Watch(), ""
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False, max_epochs=2,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[watch, Checkpoints(dirpath=folder / name)],
    )  # fmt: skip
    try:
        trainer.fit(ppo(reward=FAULTY[name](), gold=None), datamodule=Prompts(validation=True))
    except (UserError, KeyError) as error:
        said = "\n".join([str(error), *getattr(error, "__notes__", [])])
    torch.save({"rows": watch.rows, "said": said}, folder / f"faulty_{name}.{rank()}.pt")


def decide_together(folder):
    """What each process gets to know of a decision, a refusal and a file that only one of them has."""
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=False)  # fmt: skip

    def refuse():
        raise UserError(f"refused by {rank()}")

    said = [first_decides(trainer, lambda: f"decided by {rank()}")]
    for refused in (lambda: first_decides(trainer, refuse), lambda: require_everywhere(folder / f"only{rank()}")):
        try:
            (folder / "only0").touch()
            refused()
        except UserError as error:
            said.append(str(error))
    require_everywhere(folder)
    torch.save(said, folder / f"decided.{rank()}.pt")


def run_all(folder, model):
    """Everything that two processes do in the tests: starting them takes longer than the runs."""
    decide_together(folder)
    for name in FAULTY:
        run_faulty(folder, name)
    for kind, strategy in (("ddp", lambda: "ddp"), ("fsdp2", FSDP2Strategy)):
        two = {"model": model, "devices": 2}
        for name in RUNS if kind == "ddp" else SHARDED:
            every = 3 if name == "full" else None
            run(folder, name, strategy=strategy(), saved=f"{kind}_{name}", every=every, **two)
        checkpoint = folder / f"{kind}_full_checkpoints" / "step=9.ckpt"  # within the third iteration
        run(folder, "full", strategy=strategy(), saved=f"{kind}_resumed", ckpt_path=checkpoint, **two)
        run(folder, "lora", strategy=strategy(), saved=f"{kind}_lora_first", every=2, max_epochs=1, **two)
        checkpoint = folder / f"{kind}_lora_first_checkpoints" / "step=4.ckpt"
        run(folder, "lora", strategy=strategy(), saved=f"{kind}_lora_resumed", ckpt_path=checkpoint, **two)



def run_part(folder, kind, saved, checkpoint=None):
    """``RUNS["full"]`` in as many processes as there are, from ``checkpoint``; from its start, with checkpoints."""
    strategy = FSDP2Strategy() if kind == "fsdp2" else "ddp"
    devices, every = int(os.environ["WORLD_SIZE"]), None if checkpoint else 3
    run(folder, "full", strategy=strategy, devices=devices, saved=saved, every=every, ckpt_path=checkpoint)


def broken_in_the_second(prompts, completions, **columns):
    if rank() == 1:
        raise UserError("planted in the second process")
    return letters(prompts, completions)


def die():
    """Notes the time, and is killed."""
    Path(os.environ["KILLED_AT"]).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


class KilledInUpdate(L.Callback):
    """The second process, at its second minibatch."""

    def on_train_batch_start(self, _trainer, _module, _batch, number):
        if rank() == 1 and number == 1:
            die()


def killed_in_the_second(prompts, completions, **columns):
    if rank() == 1:
        die()
    return letters(prompts, completions)
