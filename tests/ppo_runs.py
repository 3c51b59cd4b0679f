"""Runs of PPO on a tiny policy, and what they leave to look at."""

import lightning as L
import torch
from tiny import Prompts, letters, tiny_policy

from lit_rlhf.algorithms import PPO
from lit_rlhf.data.tokenize import tokenize_prompts
from lit_rlhf.rollout.sampler import Sampler


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def make(policy=None, *, lr=0.05, steps=6, sampler=None, algorithm=PPO, **changes):
    settings = {
        "reward": letters, "rollout_batch_size": 8, "minibatch_size": 4, "ppo_epochs": 2, "seed": 3,
        "optimizer": sgd(lr),
    }  # fmt: skip
    return algorithm(
        policy=policy or tiny_policy(),
        sampler=sampler or Sampler(max_new_tokens=steps),
        **{**settings, **changes},
    )


class Watch(L.Callback):
    """Keeps rows, samples and experience."""

    def __init__(self):
        self.rows, self.samples, self.batches, self.logits = [], [], [], []

    def on_row(self, _trainer, _module, row):
        self.rows.append(row)

    def on_samples(self, _trainer, _module, _iteration, rows):
        self.samples += rows

    def on_train_batch_start(self, _trainer, module, batch, _index):
        self.batches.append(batch)
        with torch.no_grad():
            self.logits.append(module.policy(*tokens_of(batch), keep_logits=True).logits)


def fit(trainer, ppo, *, data=None, ckpt_path=None, **settings):
    watch = Watch()
    settings = {"max_epochs": 2, **settings}
    callbacks = [watch, *settings.pop("callbacks", [])]
    trainer(callbacks=callbacks, **settings).fit(ppo, datamodule=data or Prompts(), ckpt_path=ckpt_path)
    return watch


def prompts_of(policy, texts=Prompts.texts, **columns):
    rows = [{"prompt": text, **{k: v[i] for k, v in columns.items()}} for i, text in enumerate(texts)]
    return tokenize_prompts(
        rows, policy.tokenizer, episodes=torch.arange(len(rows)), max_new_tokens=6, context_length=None
    )


def rollout_of(policy, **settings):
    sampler = Sampler(**{"max_new_tokens": 6, **settings})
    return sampler.generate(policy.decoder(), prompts_of(policy), seed=0, stop_ids=policy.stop_ids, pad_id=0)


def tokens_of(rollout):
    return rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask
