"""ILQL and deep Q-learning: the losses by hand, the values by dynamic programming, and decoding that they guide."""

import csv
import json
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import LORA, tiny_policy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lit_rlhf.algorithms import DQN, ILQL
from lit_rlhf.data.tokenize import tokenize_prompts
from lit_rlhf.errors import UserError
from lit_rlhf.loggers import CSVLogger
from lit_rlhf.metrics import lookup
from lit_rlhf.models.guided import GuidedModel
from lit_rlhf.models.policy import Policy
from lit_rlhf.rollout.sampler import Sampler

EOS = 2
ROWS = [
    {"prompt": "a film", "completion": " is good", "reward": 1.5},
    {"prompt": "the longer plot", "completion": " so", "reward": -2.0},
    {"prompt": "so", "completion": " dull", "reward": 0.0},
    {"prompt": "one more", "completion": " time, with more words", "reward": 3.0},
]
KINDS = [ILQL, DQN]


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def adam(lr=1e-2):
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def loader(rows, batch_size=2, shuffle=False):
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle)


def stir(module, seed=0):
    """Heads start at 0, which would hide most of a loss."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "heads" in name or "v_head" in name:
                parameter.normal_(std=0.3)
    return module


def states(policy, row):
    """(T + 1, d) hidden states of the choices of a row by itself, the one after the end included; and the tokens."""
    opening = policy.tokenizer(row["prompt"])["input_ids"]
    actions = [*policy.tokenizer(row["completion"])["input_ids"], EOS]
    output = policy.model(torch.tensor([opening + actions]), output_hidden_states=True)
    logprobs = output.logits[0, len(opening) - 1 : -1].log_softmax(-1)
    return output.hidden_states[-1][0, len(opening) - 1 :], actions, logprobs


def test_ilqls_loss_by_hand_token_by_token():
    settings = {"gamma": 0.9, "expectile": 0.8, "cql_coef": 0.3, "lm_coef": 0.5}
    ilql = stir(ILQL(policy=tiny_policy(), **settings))
    loss, metrics = ilql.loss(ilql.collate(columns(ROWS)).inputs)
    sums = dict.fromkeys(("q", "v", "cql", "lm"), 0.0)
    count = 0
    for row in ROWS:
        hidden, actions, logprobs = states(ilql.policy, row)
        v = ilql.v_head(hidden).squeeze(-1)
        online = [head(hidden) for head in ilql.q_heads.heads]
        target = torch.minimum(*(head(hidden) for head in ilql.q_heads.targets))
        for t, a in enumerate(actions):
            last = t + 1 == len(actions)
            wanted = row["reward"] if last else 0.9 * float(v[t + 1])
            sums["q"] += sum((float(q[t, a]) - wanted) ** 2 for q in online)
            u = float(target[t, a]) - float(v[t])
            sums["v"] += (0.8 if u > 0 else 0.2) * u**2
            sums["cql"] += sum(math.log(float(q[t].double().exp().sum())) - float(q[t, a]) for q in online)
            sums["lm"] -= float(logprobs[t, a])
            count += 1
    for name, total in sums.items():
        assert float(metrics[f"loss/{name}"]) == pytest.approx(total / count, rel=1e-4)
    expected = (sums["q"] + sums["v"] + 0.3 * sums["cql"] + 0.5 * sums["lm"]) / count
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_double_q_learnings_loss_by_hand_token_by_token():
    dqn = stir(DQN(policy=tiny_policy(), gamma=0.9))
    loss, metrics = dqn.loss(dqn.collate(columns(ROWS)).inputs)
    total, count = 0.0, 0
    for row in ROWS:
        hidden, actions, _ = states(dqn.policy, row)
        online, target = dqn.q_heads.heads[0](hidden), dqn.q_heads.targets[0](hidden)
        for t, a in enumerate(actions):
            following = 0.9 * float(target[t + 1, int(online[t + 1].argmax())])  # not the target's own maximum
            wanted = row["reward"] if t + 1 == len(actions) else following
            total, count = total + (float(online[t, a]) - wanted) ** 2, count + 1
    assert float(loss) == pytest.approx(total / count, rel=1e-4)
    assert set(metrics) == {"loss/q", "q/mean", "q/state_value"}


def test_no_gradient_flows_into_the_targets():
    ilql = stir(ILQL(policy=tiny_policy(), lm_coef=0.0, cql_coef=0.0, gamma=1.0))
    for parameter in ilql.q_heads.heads.parameters():
        parameter.requires_grad_(False)
    row = {name: column[:1] for name, column in columns(ROWS).items()}
    before = [ilql.v_head.outer.weight.grad]
    loss, _ = ilql.loss(ilql.collate(row).inputs)
    loss.backward()
    hidden, actions, _ = states(ilql.policy, ROWS[0])
    v = ilql.v_head(hidden[:-1]).squeeze(-1)
    target = torch.minimum(*(h(hidden[:-1]) for h in ilql.q_heads.targets))
    u = target[torch.arange(len(actions)), torch.tensor(actions)].detach() - v
    alone = (torch.where(u < 0, 0.3, 0.7) * u.square()).mean()
    (expected,) = torch.autograd.grad(alone, ilql.v_head.outer.weight)
    torch.testing.assert_close(ilql.v_head.outer.weight.grad, expected, rtol=1e-4, atol=1e-6)
    assert before == [None]


def test_the_targets_follow_at_the_polyak_rate(trainer):
    dqn = stir(DQN(policy=tiny_policy(), polyak=0.25, optimizer=adam()))
    before = dqn.q_heads.targets[0].outer.weight.clone()
    trainer(max_steps=1).fit(dqn, loader(ROWS))
    after = dqn.q_heads.heads[0].outer.weight
    torch.testing.assert_close(dqn.q_heads.targets[0].outer.weight, 0.75 * before + 0.25 * after.detach())


def guided(policy, *, beta, prior, seed=0):
    """A policy that random heads guide."""
    heads = stir(DQN(policy=policy), seed).q_heads.heads
    return Policy(model=GuidedModel(policy.model, heads, beta=beta, prior=prior), tokenizer=policy.tokenizer)


def complete(policy, texts, dtype=torch.float32, **settings):
    sampler = Sampler(**{"max_new_tokens": 6, **settings})
    rows = [{"prompt": text} for text in texts]
    batch = tokenize_prompts(
        rows, policy.tokenizer, episodes=torch.arange(len(rows)), max_new_tokens=6, context_length=None
    )
    return sampler.generate(policy.decoder(dtype), batch, seed=0, stop_ids=policy.stop_ids, pad_id=0)


def test_decoding_is_the_language_model_moved_by_the_advantages():
    """The sampler's own log-probabilities, with cache and padding, against a forward pass of each text alone."""
    policy = guided(tiny_policy(), beta=0.7, prior=1.0)
    rollout = complete(policy, ["a film", "the longer plot", "q"])
    inner, head = policy.model.model, policy.model.heads[0]
    for row in range(3):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        response = rollout.response_ids[row][rollout.response_mask[row]]
        output = inner(torch.cat([prompt, response])[None], output_hidden_states=True)
        choices = slice(len(prompt) - 1, -1)
        q = head(output.hidden_states[-1][0, choices])
        advantage = q - 123.0  # any V: it is the same for all tokens
        logprobs = (output.logits[0, choices].log_softmax(-1) + 0.7 * advantage).log_softmax(-1)
        expected = logprobs.gather(-1, response[:, None]).squeeze(-1)
        torch.testing.assert_close(rollout.logprobs[row][: len(response)], expected, rtol=1e-3, atol=1e-4)
    tokens = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask)
    said = torch.where(rollout.response_mask, policy(*tokens).logprobs, 0.0)  # what training and KL would see
    torch.testing.assert_close(said, rollout.logprobs, rtol=1e-3, atol=1e-4)


def test_guidance_of_zero_is_the_language_model_and_without_prior_q_alone():
    plain = complete(tiny_policy(), ["a film", "q"])
    assert torch.equal(complete(guided(tiny_policy(), beta=0.0, prior=1.0), ["a film", "q"]).response_ids,
                       plain.response_ids)  # fmt: skip
    policy = guided(tiny_policy(), beta=2.0, prior=0.0)
    greedy = complete(policy, ["a film"], temperature=0.0)
    hidden = policy.model.model(greedy.prompt_ids, output_hidden_states=True).hidden_states[-1][0, -1]
    assert int(greedy.response_ids[0, 0]) == int(policy.model.heads[0](hidden).argmax())


def test_a_guided_policy_decodes_in_bf16():
    rollout = complete(guided(tiny_policy(), beta=1.0, prior=1.0), ["a film", "q"], torch.bfloat16)
    assert rollout.response_mask.any()


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("kind", KINDS)
def test_the_export_decodes_as_the_trained_policy_does_and_its_model_loads_alone(trainer, tmp_path, kind, lora):
    algorithm = kind(policy=tiny_policy(lora=lora), optimizer=adam(), polyak=0.5)
    trainer(max_epochs=3).fit(algorithm, loader(ROWS))
    algorithm.export(tmp_path)
    loaded = Policy.from_pretrained(path=str(tmp_path))
    assert isinstance(loaded.model, GuidedModel)
    beta, prior = (1.0, 1.0) if kind is ILQL else (1.0, 0.0)
    inner = algorithm.policy.merged().eval()
    model = GuidedModel(inner, algorithm.q_heads.targets, beta=beta, prior=prior)
    here = Policy(model=model, tokenizer=algorithm.policy.tokenizer)
    texts = ["a film", "so"]
    assert torch.equal(complete(loaded, texts).response_ids, complete(here, texts).response_ids)
    ids = torch.tensor([[5, 6, 7]])
    alone = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(alone(ids).logits, inner(ids).logits, rtol=1e-4, atol=1e-5)
    loaded.save(tmp_path / "again")
    again = Policy.from_pretrained(path=str(tmp_path / "again"))
    assert torch.equal(complete(again, texts).response_ids, complete(loaded, texts).response_ids)


def falling(optimizer, num_training_steps):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, num_training_steps)


def test_a_better_rewarded_token_is_written_more_often_where_the_data_write_both(trainer):
    """Half the data say "b" for 1, half "c" for 0; the language model learns both, guidance prefers the first."""
    rows = [{"prompt": "a ", "completion": text, "reward": r} for text, r in (("b", 1.0), ("c", 0.0))] * 120
    settings = {"polyak": 0.5, "gamma": 1.0, "beta": 3.0, "cql_coef": 0.0}
    ilql = ILQL(policy=tiny_policy(spread=0.1), optimizer=adam(2e-2), scheduler=falling, **settings)
    trainer(max_epochs=1).fit(ilql, loader(rows, 2))
    policy = ilql.policy
    first, second = (policy.tokenizer(letter)["input_ids"][0] for letter in ("b", "c"))
    prompt = torch.tensor([policy.tokenizer("a ")["input_ids"]])
    with torch.no_grad():
        plain = policy.model(prompt, output_hidden_states=True)
        moved = GuidedModel(policy.model, ilql.q_heads.targets, beta=3.0, prior=1.0)(input_ids=prompt).logits
        v = ilql.v_head(plain.hidden_states[-1])[0, -1]
    odds = float(plain.logits[0, -1, first] - plain.logits[0, -1, second])
    assert odds == pytest.approx(0, abs=0.1)
    assert float(moved[0, -1, first] - moved[0, -1, second]) == pytest.approx(odds + 3.0, abs=0.3)
    # expectile .7 of 1 and 0: .7 (1 - v) = .3 v
    assert float(v) == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_run_with_its_targets(trainer, tmp_path, kind):
    def run(folder, ckpt=None):
        algorithm = kind(policy=tiny_policy(lora=LORA), optimizer=adam(), log_every_n_steps=1, polyak=0.3)
        save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit = trainer(max_epochs=2, callbacks=[save], enable_checkpointing=True, logger=CSVLogger(save_dir=folder))
        fit.fit(algorithm, loader(ROWS, 2, shuffle=True), loader(ROWS, 3), ckpt_path=ckpt)
        with open(folder / "metrics.csv", newline="") as file:
            rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
        assert all(lookup(name) for row in rows for name in row)
        trained = [p for p in algorithm.parameters() if p.requires_grad]
        return [*trained, *algorithm.q_heads.targets.parameters()], rows

    weights, rows = run(tmp_path / "whole")
    for step in (1, 2, 3):
        resumed, resumed_rows = run(tmp_path / str(step), str(tmp_path / "whole" / f"step={step}.ckpt"))
        assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))
        # the validation of an epoch's last step is made up for after a resume
        assert resumed_rows[-1] == rows[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": None}, r"needs the column 'reward'; this one has \['completion', 'prompt'\]"),
        ({"completion": None}, "needs the column 'completion'"),
        ({"reward": [1.0, None]}, "sample 1 of the batch has no 'reward'"),
        ({"reward": [1.0, math.nan]}, "column 'reward' of the batch is nan at sample 1"),
        ({"reward": ["good", "bad"]}, "column 'reward' of the batch is not numbers"),
        ({"completion": ["a", ""]}, "sample 1 of the batch has no text in 'completion'"),
    ],
)
def test_bad_batches_are_refused(kind, changes, message):
    batch = {"prompt": ["a", "b"], "completion": ["c", "d"], "reward": [1.0, 2.0], **changes}
    batch = {name: column for name, column in batch.items() if column is not None}
    with pytest.raises(UserError, match=message):
        kind(policy=tiny_policy()).collate(batch)


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        *((kind, "gamma", (-0.1, 1.1)) for kind in KINDS),
        *((kind, "polyak", (0, 1.5)) for kind in KINDS),
        (ILQL, "beta", (-1, math.inf)),
        (ILQL, "expectile", (0, 1)),
        (ILQL, "cql_coef", (-1,)),
        (ILQL, "lm_coef", (-1,)),
        (DQN, "temperature", (0, -1)),
    ],
)
def test_values_out_of_their_range_are_refused_by_name(kind, name, values):
    policy = tiny_policy()
    for value in values:
        with pytest.raises(UserError, match=rf"algorithm\.{name} .*{value}"):
            kind(policy=policy, **{name: value})


def test_guidance_that_does_not_fit_or_would_be_lost_is_refused(tmp_path):
    guided(tiny_policy(), beta=1.0, prior=1.0).save(tmp_path)
    with pytest.raises(UserError, match=r"needs policy\.lora=null"):
        Policy.from_pretrained(path=str(tmp_path), lora=LORA)
    (tmp_path / "guidance.json").write_text(json.dumps({"beta": 1.0, "prior": 1.0, "heads": 2}))
    with pytest.raises(UserError, match=r"policy\.path=.*: its Q heads cannot be loaded"):
        Policy.from_pretrained(path=str(tmp_path))
