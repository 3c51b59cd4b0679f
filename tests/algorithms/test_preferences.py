"""DPO and its siblings: the losses of whole completions by hand, what they learn, resume, and what they refuse."""

import copy
import csv
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny import LORA, tiny_policy
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader

from lit_rlhf.algorithms import DPO, IPO, KTO, ORPO, RobustDPO
from lit_rlhf.errors import UserError
from lit_rlhf.loggers import CSVLogger
from lit_rlhf.metrics import lookup

EOS = 2
PROMPTS = ["a film", "the longer plot", "so", "one more"]
CHOSEN = [" is good", " ends well", " fine", " time"]
REJECTED = [" is bad and long", " ends", " dull", " bore, a big one"]
PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]
SIDES = ("chosen", "rejected")
LABELLED = [{"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"} for r in PAIRS for side in SIDES]
PAIRED = [DPO, RobustDPO, IPO, ORPO]
ROWS = {**dict.fromkeys(PAIRED, PAIRS), KTO: LABELLED}


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def adam(lr=1e-2):
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def loader(rows, batch_size=2, shuffle=False):
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle)


def logp(policy, prompt, completion):
    """(sum over the completion's tokens, their number) of a completion by itself, without padding: the oracle."""
    opening = policy.tokenizer(prompt)["input_ids"]
    ids = [*opening, *policy.tokenizer(completion)["input_ids"], EOS]
    with torch.no_grad():
        logprobs = policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    steps = range(len(opening), len(ids))
    return sum(float(logprobs[t - 1, ids[t]]) for t in steps), len(steps)


def moved(policy, seed=1):
    """Another policy near by: so that the ratios to the reference are not 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


def make(kind, **changes):
    """An algorithm whose policy has moved away from its reference, and the reference's policy."""
    policy = tiny_policy()
    start = copy.deepcopy(policy)
    algorithm = kind(policy=policy, **changes)
    moved(policy)
    return algorithm, start


def ratios(algorithm, start, rows, side):
    """Log-ratios of policy to reference, one a row."""
    return [
        logp(algorithm.policy, r["prompt"], r[side])[0] - logp(start, r["prompt"], r[side])[0] for r in rows
    ]


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("kind", "changes", "by_hand"),
    [
        (DPO, {"beta": 0.2}, lambda d: -math.log(sigmoid(0.2 * d))),
        (DPO, {"beta": 0.2, "label_smoothing": 0.3},
         lambda d: -0.7 * math.log(sigmoid(0.2 * d)) - 0.3 * math.log(sigmoid(-0.2 * d))),
        (RobustDPO, {"beta": 0.2, "label_smoothing": 0.3},
         lambda d: (-0.7 * math.log(sigmoid(0.2 * d)) + 0.3 * math.log(sigmoid(-0.2 * d))) / 0.4),
        (IPO, {"beta": 0.2, "length_normalize": False}, lambda d: (d - 2.5) ** 2),
    ],
)  # fmt: skip
def test_the_loss_compares_log_ratios_of_whole_completions(kind, changes, by_hand):
    algorithm, start = make(kind, **changes)
    micro = algorithm.collate(columns(PAIRS))
    loss, metrics = algorithm.loss(micro.inputs)
    chosen, rejected = (ratios(algorithm, start, PAIRS, side) for side in ("chosen", "rejected"))
    differences = [c - r for c, r in zip(chosen, rejected, strict=True)]
    assert max(map(abs, differences)) > 0.1
    assert float(loss) == pytest.approx(sum(map(by_hand, differences)) / 4, rel=1e-4)
    assert float(metrics["rewards/chosen"]) == pytest.approx(0.2 * sum(chosen) / 4, abs=1e-5)
    assert float(metrics["rewards/rejected"]) == pytest.approx(0.2 * sum(rejected) / 4, abs=1e-5)
    assert float(metrics["rewards/margins"]) == pytest.approx(0.2 * sum(differences) / 4, abs=1e-5)
    assert float(metrics["rewards/accuracies"]) == sum(d > 0 for d in differences) / 4
    written = sum(logp(algorithm.policy, r["prompt"], r["rejected"])[0] for r in PAIRS) / 4
    assert float(metrics["logps/rejected"]) == pytest.approx(written, rel=1e-5)
    assert (micro.terms, micro.sequences) == (4, 8)
    assert micro.tokens == sum(2 * len(r["prompt"]) + len(r["chosen"]) + len(r["rejected"]) + 2 for r in PAIRS)


def test_ipo_takes_means_over_tokens_by_default():
    algorithm, start = make(IPO, beta=0.5)
    loss, _ = algorithm.loss(algorithm.collate(columns(PAIRS)).inputs)
    chosen, rejected = (
        [x / (len(r[side]) + 1) for x, r in zip(ratios(algorithm, start, PAIRS, side), PAIRS, strict=True)]
        for side in ("chosen", "rejected")
    )
    expected = sum((c - r - 1) ** 2 for c, r in zip(chosen, rejected, strict=True)) / 4
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_orpo_needs_no_reference_and_adds_the_odds_ratio_to_the_likelihood():
    algorithm = ORPO(policy=tiny_policy(), beta=0.3)
    loss, metrics = algorithm.loss(algorithm.collate(columns(PAIRS)).inputs)
    terms = []
    for row in PAIRS:
        sums = [logp(algorithm.policy, row["prompt"], row[side]) for side in SIDES]
        chosen, rejected = (total / count for total, count in sums)
        log_odds = [p - math.log(1 - math.exp(p)) for p in (chosen, rejected)]
        terms.append(-chosen - 0.3 * math.log(sigmoid(log_odds[0] - log_odds[1])))
    assert float(loss) == pytest.approx(sum(terms) / 4, rel=1e-5)
    assert algorithm.reference is None
    nll = -sum(s / n for s, n in (logp(algorithm.policy, r["prompt"], r["chosen"]) for r in PAIRS)) / 4
    assert float(metrics["loss/nll"]) == pytest.approx(nll, rel=1e-5)


def test_kto_compares_each_completion_with_the_kl_of_mismatched_ones():
    algorithm, start = make(KTO, beta=0.2, desirable_weight=0.5, undesirable_weight=2.0)
    rows = LABELLED[:5]
    loss, metrics = algorithm.loss(algorithm.collate(columns(rows)).inputs)
    mismatched = [{**row, "completion": rows[i - 1]["completion"]} for i, row in enumerate(rows)]
    kl = max(0.0, sum(ratios(algorithm, start, mismatched, "completion")) / 5)
    terms = [
        0.5 * (1 - sigmoid(0.2 * (x - kl))) if row["label"] else 2.0 * (1 - sigmoid(0.2 * (kl - x)))
        for x, row in zip(ratios(algorithm, start, rows, "completion"), rows, strict=True)
    ]
    assert float(loss) == pytest.approx(sum(terms) / 5, rel=1e-4)
    assert float(metrics["kto/kl"]) == pytest.approx(kl, abs=1e-5)
    means = algorithm.derived({name: float(x) for name, x in metrics.items()})
    good = [x for x, row in zip(ratios(algorithm, start, rows, "completion"), rows, strict=True) if row["label"]]
    assert means["rewards/chosen"] == pytest.approx(0.2 * sum(good) / len(good), abs=1e-5)


def test_kto_takes_pairs_apart():
    algorithm, _ = make(KTO)
    pairs = algorithm.collate(columns(PAIRS))
    taken = sorted(LABELLED, key=lambda row: not row["label"])
    rows = algorithm.collate(columns(taken))
    assert torch.equal(pairs.inputs.completions.response_ids, rows.inputs.completions.response_ids)
    assert torch.equal(pairs.inputs.desirable, rows.inputs.desirable)


@pytest.mark.parametrize("rows", [LABELLED[:1], PAIRS[:1]])
def test_a_prompt_alone_has_no_mismatched_completion_and_a_reference_point_of_zero(rows):
    algorithm, _ = make(KTO)
    inputs = algorithm.collate(columns(rows)).inputs
    assert len(inputs.mismatched) == 1
    for scale in (0.3, 3):  # one of them lets the policy like its own completion more than the reference does
        algorithm.policy.model.get_output_embeddings().weight.data *= scale
        _, metrics = algorithm.loss(inputs)
        assert float(metrics["kto/kl"]) == 0


def test_without_prompts_whole_texts_are_compared_from_their_second_token():
    algorithm, start = make(DPO)
    batch = {"chosen": CHOSEN, "rejected": REJECTED}
    loss, _ = algorithm.loss(algorithm.collate(batch).inputs)
    rows = [{"prompt": " ", "chosen": c[1:], "rejected": r[1:]} for c, r in zip(CHOSEN, REJECTED, strict=True)]
    chosen, rejected = (ratios(algorithm, start, rows, side) for side in ("chosen", "rejected"))
    differences = torch.tensor(chosen) - torch.tensor(rejected)
    assert float(loss) == pytest.approx(-float(logsigmoid(0.1 * differences).mean()), rel=1e-4)


def test_a_chats_answer_may_be_a_message():
    algorithm, _ = make(DPO)
    algorithm.policy.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    chat = [[{"role": "user", "content": "hi"}]]
    sides = {side: [[{"role": "assistant", "content": text}]] for side, text in (("chosen", "yes"), ("rejected", "no"))}
    messages = algorithm.collate({"prompt": chat, **sides}).inputs
    texts = algorithm.collate({"prompt": ["<user>hi<bot>"], "chosen": ["yes"], "rejected": ["no"]}).inputs
    assert torch.equal(messages.completions.prompt_ids, texts.completions.prompt_ids)
    assert torch.equal(messages.completions.response_ids, texts.completions.response_ids)


def test_a_completion_in_several_pairs_passes_the_model_once_and_changes_nothing():
    algorithm, _ = make(DPO)
    order = [" a", " good film", " dull"]
    rows = [{"prompt": "so", "chosen": order[i], "rejected": order[j]} for i, j in ((0, 1), (0, 2), (1, 2), (2, 0))]
    rows.append({"prompt": "other", "chosen": " a", "rejected": " dull"})  # the same texts, behind another prompt
    micro = algorithm.collate(columns(rows))
    assert len(micro.inputs.completions) == 5
    alone = [float(algorithm.loss(algorithm.collate(columns([row])).inputs)[0]) for row in rows]
    assert float(algorithm.loss(micro.inputs)[0]) == pytest.approx(sum(alone) / 5, rel=1e-5)


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("kind", [DPO, RobustDPO, IPO, KTO])
def test_at_the_start_policy_and_reference_agree(kind, lora):
    """So that the first loss is the one of a ratio of 1, dropout or not."""
    policy = tiny_policy(lora=lora and {**lora, "lora_dropout": 0.5}, attention_dropout=0.5).train()
    algorithm = kind(policy=policy, label_smoothing=0.1) if kind is RobustDPO else kind(policy=policy)
    loss, metrics = algorithm.loss(algorithm.collate(columns(ROWS[kind])).inputs)
    start = {DPO: math.log(2), RobustDPO: math.log(2), IPO: 25.0, KTO: 0.5}[kind]
    assert float(loss) == pytest.approx(start, rel=1e-5)
    assert float(metrics["rewards/chosen"]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("kind", [*PAIRED, KTO])
def test_it_learns_what_was_preferred_and_the_reference_stays(trainer, tmp_path, kind, lora):
    policy = tiny_policy(spread=0.1, lora=lora)
    algorithm = kind(policy=policy, optimizer=adam(), beta=0.5, log_every_n_steps=5)
    identity = None if kind is ORPO else algorithm.reference.fingerprint()
    fit = trainer(max_epochs=10, logger=CSVLogger(save_dir=tmp_path))
    fit.fit(algorithm, loader(ROWS[kind], 4), loader(ROWS[kind], 3))
    rows = rows_of(tmp_path)
    assert float(rows[-1]["val/rewards/margins"]) > 0.3
    if kind is not KTO:
        assert float(rows[-1]["val/rewards/accuracies"]) == 1.0
    for name in rows[-1]:
        lookup(name)
    if identity:
        assert algorithm.reference.fingerprint() == identity


@pytest.mark.parametrize("kind", PAIRED)
def test_gradient_does_not_depend_on_the_micro_batch_split(trainer, kind):
    gradients = []

    class Spy(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])

    for batch_size in (4, 3, 1):
        algorithm = kind(policy=tiny_policy(), optimizer=adam())
        settings = {"max_epochs": 1, "accumulate_grad_batches": math.ceil(4 / batch_size)}
        trainer(callbacks=[Spy()], **settings).fit(algorithm, loader(PAIRS, batch_size))
    assert len(gradients) == 3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [*PAIRED, KTO])
def test_a_resumed_run_is_the_same_run(trainer, tmp_path, kind):
    def run(folder, ckpt=None):
        algorithm = kind(policy=tiny_policy(lora=LORA), optimizer=adam(), log_every_n_steps=1)
        save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit = trainer(max_epochs=2, callbacks=[save], enable_checkpointing=True, logger=CSVLogger(save_dir=folder))
        fit.fit(algorithm, loader(ROWS[kind], 2, shuffle=True), ckpt_path=ckpt)
        return [p for p in algorithm.parameters() if p.requires_grad], rows_of(folder)

    weights, rows = run(tmp_path / "whole")
    for step in (1, 2, 3):
        resumed, resumed_rows = run(tmp_path / str(step), str(tmp_path / "whole" / f"step={step}.ckpt"))
        assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))
        assert resumed_rows == rows[step:]


def test_a_checkpoint_against_another_reference_is_refused(trainer, tmp_path):
    fit = trainer(max_epochs=1)
    fit.fit(DPO(policy=tiny_policy(lora=LORA), optimizer=adam()), loader(PAIRS))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    other = DPO(policy=tiny_policy(lora=LORA, seed=1), optimizer=adam())
    with pytest.raises(UserError, match="another reference"):
        trainer(max_epochs=2).fit(other, loader(PAIRS), ckpt_path=str(tmp_path / "x.ckpt"))


def test_the_reference_is_neither_trained_nor_in_the_checkpoint(trainer, tmp_path):
    algorithm = DPO(policy=tiny_policy(), optimizer=adam())
    fit = trainer(max_epochs=1)
    fit.fit(algorithm, loader(PAIRS))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("policy.model.") for name in saved)
    assert len(saved) == len(list(tiny_policy().model.parameters()))


ONE = {"prompt": ["a"], "chosen": [" b"], "rejected": [" c"]}


@pytest.mark.parametrize("kind", [*PAIRED, KTO])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": [" b"]}, "sample 0 of the batch has the same text in 'chosen' and 'rejected': ' b'"),
        ({"chosen": [None]}, "sample 0 of the batch has no text in '.*chosen.*': None"),
        ({"rejected": ["  "]}, "sample 0 of the batch has no text in '.*rejected'"),
        ({"rejected": []}, "column 'rejected' of the batch must be a list"),
        ({"rejected": [" c", " d"]}, "differ in length"),
        ({"chosen": " b"}, "column 'chosen' of the batch must be a list"),
        ({"prompt": ["b" * 200]}, "its prompt has 200 tokens, which leaves none of algorithm.max_length=100"),
        ({"prompt": [[{"role": "user", "content": "hi"}]]}, "no chat template"),
        ({"prompt": [{"role": ["user"], "content": ["hi"]}]}, "turned inside out"),
    ],
)
def test_bad_pairs_are_refused(kind, changes, message):
    with pytest.raises(UserError, match=message):
        kind(policy=tiny_policy(), max_length=100).collate({**ONE, **changes})


@pytest.mark.parametrize(("kind", "side"), [(kind, side) for kind in PAIRED for side in ("chosen", "rejected")])
def test_a_batch_without_a_side_is_refused_by_its_column(kind, side):
    batch = {name: column for name, column in ONE.items() if name != side}
    with pytest.raises(UserError, match=f"needs the column '{side}'; this one has"):
        kind(policy=tiny_policy()).collate(batch)


@pytest.mark.parametrize("label", [1, "true", None, 0.5])
def test_a_label_that_is_not_true_or_false_is_refused(label):
    batch = {"prompt": ["a", "b"], "completion": ["c", "d"], "label": [True, label]}
    with pytest.raises(UserError, match=f"'label' of the batch must be true or false, got {label!r} at sample 1"):
        KTO(policy=tiny_policy()).collate(batch)


def test_a_label_may_be_a_tensor_as_the_default_collate_makes_it():
    micro = KTO(policy=tiny_policy()).collate(next(iter(loader(LABELLED, 3))))
    assert micro.inputs.desirable.tolist() == [True, False, True]


@pytest.mark.parametrize(("labels", "told"), [([True] * 8, "desirable"), ([False] * 8, "undesirable"),
                                              ([True, False] * 4, None)])  # fmt: skip
def test_kto_says_when_its_rows_have_one_label(trainer, caplog, labels, told):
    rows = [{"prompt": "q", "completion": f"film {n}", "label": label} for n, label in enumerate(labels)]
    kto = KTO(policy=tiny_policy(), log_every_n_steps=1)
    trainer(max_epochs=2).fit(kto, DataLoader(rows, batch_size=2))
    assert {"loss/total", "kto/kl", "kto/desirable", "optim/grad_norm"} <= set(kto.last_row)
    said = [r.getMessage() for r in caplog.records if "KTO learns from both" in r.getMessage()]
    assert [text.split(";")[0] for text in said] == ([f"the first 8 rows are all {told}"] if told else [])


def test_kto_refuses_batches_of_one_row(trainer):
    with pytest.raises(UserError, match=r"data\.batch_size=1"):
        trainer(max_epochs=1).fit(KTO(policy=tiny_policy()), loader(LABELLED, 1))


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        *((kind, "beta", (0, -0.1, math.inf, "big")) for kind in (*PAIRED, KTO)),
        *((kind, "label_smoothing", (0.5, 0.7, -0.1)) for kind in (DPO, RobustDPO)),
        *((kind, "max_length", (1, 129)) for kind in (*PAIRED, KTO)),
        (IPO, "length_normalize", ("off", 1)),
        (KTO, "desirable_weight", (0, -1)),
        (KTO, "undesirable_weight", (0, -1)),
    ],
)
def test_values_out_of_their_range_are_refused_by_name(kind, name, values):
    policy = tiny_policy()
    for value in values:
        with pytest.raises(UserError, match=rf"algorithm\.{name}.*{value}"):
            kind(policy=policy, **{name: value})
