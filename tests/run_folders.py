"""Writes run folders like those of real runs, with made-up numbers, and completions that try to break a page."""

import json
import math
import random
from pathlib import Path

import yaml

from lit_rlhf.loggers import CSVLogger
from lit_rlhf.run_folder import write_summary

PPO_CONFIG = {
    "task_name": "ppo",
    "tags": [],
    "seed": 0,
    "ckpt_path": None,
    "algorithm": {
        "_target_": "lit_rlhf.algorithms.PPO",
        "rollout_batch_size": 32,
        "minibatch_size": 16,
        "ppo_epochs": 2,
        "gamma": 1.0,
        "lam": 0.95,
        "value_coef": 0.1,
        "target_kl": None,
        "scores": {"_target_": "lit_rlhf.rewards.ScoreShaper", "normalize": False, "scale": 1.0, "clip": None},
    },
    "policy": {
        "_target_": "lit_rlhf.models.Policy.from_pretrained",
        "path": "smollm2",
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "gradient_checkpointing": False,
    },
    "reward": {"_target_": "lit_rlhf.rewards.ModelReward", "path": "outputs/human_ratings/reward_model/model"},
    "gold": {"_target_": "lit_rlhf.rewards.VaderReward"},
    "kl": {"_target_": "lit_rlhf.kl.FixedKL", "coef": 0.05, "estimator": "k1"},
    "clip": {"_target_": "lit_rlhf.clip.SymmetricClip", "range": 0.2, "value_range": 0.2},
    "entropy": {},
    "data": {"_target_": "lit_rlhf.data.HumanRatingsPrompts", "domain": "movies"},
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 3e-4, "weight_decay": 0.0},
    "trainer": {"_target_": "lightning.Trainer", "max_epochs": 20, "precision": "auto", "gradient_clip_val": 1.0},
    "precision_used": "bf16-mixed",
}

HOSTILE = [
    "<script>alert(1)</script> was the best part",
    "</td></tr></table></main><h1>broken out</h1>",
    "",
    "so much fun 🎬🍿 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2028 and a line separator",
    "فيلم رائع \u202eevil\u202c جدا, said everybody",
    "a very long one: " + "really " * 200 + "x" * 300,
    "quotes \" ' & ampersands &amp; {{ 7 * 7 }} {% raw %} $x^2$",
    "two\nlines\n\n\tand a tab",
    "a lone \ud800 surrogate, a \x00 NUL and \x1b[31m an escape",
    '"><img src=x onerror=alert(1)>',
]
WORDS = "a film of rare charm that never quite finds its feet but holds you to the end with warmth and wit".split()


def completion(rng: random.Random, length: int) -> str:
    return " " + " ".join(rng.choice(WORDS) for _ in range(length)) + rng.choice([".", "", " , and"])


def held_out_rows(iteration: int, progress: float, n: int, gold: bool) -> list[dict]:
    rows, rng = [], random.Random(iteration)
    for i in range(n):
        base = random.Random(1000 + i)
        taste = base.gauss(0.1, 0.5)
        length = min(20, max(1, round(rng.gauss(17 + 2 * progress, 3))))
        row = {
            "iteration": iteration,
            "split": "validation",
            "prompt": " ".join(base.choice(WORDS).capitalize() if k == 0 else base.choice(WORDS) for k in range(6)),
            "completion": HOSTILE[i] if i < len(HOSTILE) and iteration else completion(rng, length),
            "score": math.tanh(taste + 1.1 * progress + rng.gauss(0, 0.25)),
            "components": {"model": math.tanh(taste + 1.1 * progress)},
            "gold": {"vader": max(-1.0, min(1.0, 0.3 * taste + 0.55 * progress + rng.gauss(0, 0.3)))} if gold else {},
            "kl": max(-0.5, 9.5 * progress + rng.gauss(0, 2) * progress),
            "length": length,
        }
        rows.append(row)
    return rows


def write_samples(folder: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "samples.jsonl").write_bytes(text.encode("utf-8", "replace"))


def write_ppo(
    folder: Path,
    *,
    iterations: int = 20,
    validate_every: int = 5,
    prompts: int = 200,
    gold: bool = True,
    status: str | None = "completed",
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(PPO_CONFIG, sort_keys=False))
    logger, rng, samples = CSVLogger(save_dir=folder), random.Random(1), []
    for i in range(iterations + 1):
        progress, row = i / 20, {"episode": 32 * i, "tokens": 560 * i}
        noise = lambda scale: rng.gauss(0, scale)  # noqa: E731
        if i:
            kl = 9.8 * progress**1.3 + abs(noise(0.4))
            row |= {
                "objective/scores": 0.11 + 0.62 * progress + noise(0.04),
                "objective/kl": kl,
                "objective/kl_coef": 0.05,
                "objective/entropy": 52 - 14 * progress + noise(1.5),
                "objective/non_score_reward": -0.05 * kl,
                "reward/model": 0.11 + 0.62 * progress + noise(0.04),
                "policy/entropy": 3.1 - 1.1 * progress + noise(0.06),
                "policy/approxkl": 0.004 + abs(noise(0.002)),
                "policy/clipfrac": 0.05 + abs(noise(0.02)),
                "policy/ratio_max": 1.9 + abs(noise(0.5)),
                "loss/policy": -0.02 + noise(0.01),
                "loss/value": 0.3 * math.exp(-2 * progress) + abs(noise(0.02)),
                "value/explained_variance": 0.7 * (1 - math.exp(-3 * progress)) + noise(0.05),
                "rollout/response_length": 17 + 2 * progress + noise(0.3),
                "rollout/eos_rate": 0.3 - 0.2 * progress,
                "rollout/logprob_gap": 0.011 + abs(noise(0.002)),
                "rollout/tokens_per_second": 190 + noise(9),
                "optim/lr": 3e-4,
                "optim/grad_norm": 1.2 + abs(noise(0.3)),
                "time/rollout": 3.1 + abs(noise(0.2)),
                "time/score": 0.2,
                "time/anchor": 1.7,
                "time/advantage": 0.01,
                "time/update": 7.2 + abs(noise(0.3)),
                "time/iteration": 12.3 + abs(noise(0.4)),
            }
            row |= {"gold/vader": 0.16 + 0.52 * progress + noise(0.05)} if gold else {}
        if i % validate_every == 0:
            rows = held_out_rows(i, progress, prompts, gold)
            samples += rows
            row |= {
                "val/objective/scores": sum(r["score"] for r in rows) / prompts,
                "val/objective/kl": sum(r["kl"] for r in rows) / prompts,
                "val/objective/entropy": 52 - 14 * progress,
                "val/rollout/response_length": sum(r["length"] for r in rows) / prompts,
            }
            row |= {"val/gold/vader": sum(r["gold"]["vader"] for r in rows) / prompts} if gold else {}
        logger.log_metrics(row, step=i)
    write_samples(folder, samples)
    if status:
        write_summary(folder, status=status, wall_seconds=412.3, peak_memory_gb=3.871)
    return folder


def write_offline(folder: Path, stage: str, *, status: str | None = "completed") -> Path:
    folder.mkdir(parents=True)
    target = {"sft": "SFT", "reward_model": "RewardModel"}[stage]
    config = {
        "task_name": stage,
        "seed": 0,
        "algorithm": {"_target_": f"lit_rlhf.algorithms.{target}", "batch_size": 16},
        "data": {"domain": "movies"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    logger, rng = CSVLogger(save_dir=folder), random.Random(2)
    for step in range(10, 251, 10):
        done = step / 250
        row = {"episode": step * 16, "tokens": step * 400, "optim/lr": 1e-4 * (1 - done)}
        if stage == "sft":
            loss = 3.3 + 0.9 * math.exp(-4 * done) + rng.gauss(0, 0.05)
            row |= {"loss/total": loss, "sft/perplexity": math.exp(loss), "sft/token_accuracy": 0.33 + 0.05 * done}
            held = {"val/sft/perplexity": math.exp(3.4 + 0.8 * math.exp(-4 * done)), "val/sft/token_accuracy": 0.36}
        else:
            loss = 0.25 + 0.45 * math.exp(-4 * done) + rng.gauss(0, 0.03)
            row |= {"loss/total": loss, "reward_model/accuracy": 0.9 - 0.4 * math.exp(-5 * done) + rng.gauss(0, 0.02)}
            row |= {"reward_model/margin": 2 * done}
            held = {"val/reward_model/accuracy": 0.899 - 0.1 * abs(done - 0.8), "val/reward_model/loss": 0.3}
        logger.log_metrics(row | (held if step % 50 == 0 else {}), step=step)
    if status:
        write_summary(folder, status=status, wall_seconds=137.0, peak_memory_gb=2.1)
    return folder


def write_pipeline(folder: Path) -> Path:
    write_offline(folder / "sft", "sft")
    write_offline(folder / "reward_model", "reward_model")
    write_ppo(folder / "ppo")
    return folder
