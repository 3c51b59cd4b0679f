"""Reward model: the Bradley-Terry and regression losses of texts alone, and an export that scores as training did."""

import csv
import math

import pytest
import torch
from classifiers import save_classifier
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.algorithms import RewardModel
from lit_rlhf.errors import UserError
from lit_rlhf.loggers import CSVLogger
from lit_rlhf.metrics import lookup
from lit_rlhf.models.policy import byte_tokenizer
from lit_rlhf.rewards import ModelReward

CHOSEN = ["very good", "fine", "a long and winding good road", "oh"]
REJECTED = ["bad", "it is really rather bad", "so so", "badly bad"]
PAIRS = [{"chosen": c, "rejected": r} for c, r in zip(CHOSEN, REJECTED, strict=True)]
FAMILIES = ["bert", "llama", "gpt2"]


def adam(lr=1e-3):
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def loader(rows, batch_size=2, shuffle=False):
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle)


def alone(folder, texts):
    """The score of each text by itself, without padding: the oracle."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = None
    with torch.no_grad():
        return [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in texts]


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize("family", FAMILIES)
def test_bradley_terry_over_the_scores_of_texts_alone(tmp_path, family):
    folder = save_classifier(tmp_path, family)
    model = RewardModel(model_path=folder, max_length=64).eval()
    chosen, rejected = alone(folder, CHOSEN), alone(folder, REJECTED)
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    expected = sum(math.log1p(math.exp(-m)) for m in margins) / 4
    micro = model.collate(columns(PAIRS))
    loss, metrics = model.loss(micro.inputs)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["reward_model/loss"]) == float(loss)
    assert float(metrics["reward_model/accuracy"]) == sum(m > 0 for m in margins) / 4
    assert float(metrics["reward_model/margin"]) == pytest.approx(sum(margins) / 4, abs=1e-5)
    assert float(metrics["reward_model/mean_score"]) == pytest.approx(sum(chosen + rejected) / 8, abs=1e-5)
    assert (micro.terms, micro.sequences) == (4, 8)


def test_answers_of_chats_may_be_messages(tmp_path):
    algorithm = RewardModel(model_path=save_classifier(tmp_path), max_length=64)
    sides = {side: [[{"role": "assistant", "content": text}]] for side, text in (("chosen", "yes"), ("rejected", "no"))}
    messages = algorithm.collate(sides).inputs.pairs
    texts = algorithm.collate({"chosen": ["yes"], "rejected": ["no"]}).inputs.pairs
    assert torch.equal(messages.chosen_ids, texts.chosen_ids)
    assert torch.equal(messages.rejected_ids, texts.rejected_ids)


def test_a_chat_stands_before_its_answer_where_the_model_has_a_template(tmp_path):
    folder = save_classifier(tmp_path, template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [[{"role": "user", "content": "Hi"}]]
    batch = {"prompt": chat, "chosen": ["yes"], "rejected": ["no"]}
    pairs = RewardModel(model_path=folder, max_length=64).collate(batch).inputs.pairs
    texts = [tokenizer.decode(ids[0]) for ids in (pairs.chosen_ids, pairs.rejected_ids)]
    assert [text.rstrip("\n\0") for text in texts] == ["user: Hi\nassistant: yes", "user: Hi\nassistant: no"]


def test_margin_and_centre_enter_the_loss_with_their_coefficients(tmp_path):
    folder = save_classifier(tmp_path)
    chosen, rejected = alone(folder, CHOSEN), alone(folder, REJECTED)
    margin = [0.5, -1.0, 2.0, 0.0]
    model = RewardModel(model_path=folder, max_length=64, margin_coef=0.5, center_coef=0.1).eval()
    loss, metrics = model.loss(model.collate({"chosen": CHOSEN, "rejected": REJECTED, "margin": margin}).inputs)
    terms = list(zip(chosen, rejected, margin, strict=True))
    bradley_terry = sum(math.log1p(math.exp(-(c - r - 0.5 * m))) for c, r, m in terms) / 4
    centre = 0.1 * sum((c + r) ** 2 for c, r, _ in terms) / 4
    assert float(metrics["reward_model/loss"]) == pytest.approx(bradley_terry, rel=1e-4)
    assert float(loss) == pytest.approx(bradley_terry + centre, rel=1e-4)


def test_agreement_is_the_share_of_judges_that_pulls_each_way(tmp_path):
    folder = save_classifier(tmp_path)
    agreement = [1.0, 0.5, 0.75, 0.6]
    model = RewardModel(model_path=folder, max_length=64).eval()
    loss, _ = model.loss(model.collate({"chosen": CHOSEN, "rejected": REJECTED, "agreement": agreement}).inputs)
    margins = [c - r for c, r in zip(alone(folder, CHOSEN), alone(folder, REJECTED), strict=True)]
    judges = [
        a * math.log1p(math.exp(-m)) + (1 - a) * math.log1p(math.exp(m))
        for a, m in zip(agreement, margins, strict=True)
    ]
    assert float(loss) == pytest.approx(sum(judges) / 4, rel=1e-4)


def test_texts_with_scores_are_fitted_by_regression(tmp_path):
    folder = save_classifier(tmp_path)
    model = RewardModel(model_path=folder, max_length=64).eval()
    wanted = [1.0, -2.0, 0.5, 4.0]
    micro = model.collate({"text": CHOSEN, "score": torch.tensor(wanted)})
    loss, metrics = model.loss(micro.inputs)
    expected = sum((s - w) ** 2 for s, w in zip(alone(folder, CHOSEN), wanted, strict=True)) / 4
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert set(metrics) == {"reward_model/loss", "reward_model/mean_score"}
    assert (micro.terms, micro.sequences) == (4, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_the_company(tmp_path, family):
    """More texts than one forward pass takes, of every length, in any order."""
    folder = save_classifier(tmp_path, family)
    model = RewardModel(model_path=folder, max_length=64).eval()
    texts = [("ab c" * 13)[: 1 + (7 * i) % 50] for i in range(70)]
    scores = model.score(*model.scorer.pad(model.scorer.tokenize(texts)))
    torch.testing.assert_close(scores, torch.tensor(alone(folder, texts)), rtol=1e-3, atol=1e-4)


def test_gradient_does_not_depend_on_the_micro_batch_split(trainer, tmp_path):
    folder = save_classifier(tmp_path)
    gradients = []

    class Spy(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients.append([p.grad.clone() for p in pl_module.parameters()])

    for batch_size, accumulate in ((4, 1), (3, 2), (1, 4)):
        model = RewardModel(model_path=folder, max_length=64, optimizer=adam())
        settings = {"max_epochs": 1, "accumulate_grad_batches": accumulate}
        trainer(callbacks=[Spy()], **settings).fit(model, loader(PAIRS, batch_size))
    assert len(gradients) == 3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_what_people_prefer_and_the_export_scores_so(trainer, tmp_path, family):
    folder = save_classifier(tmp_path / "start", family, spread=0.1, head=False)
    model = RewardModel(model_path=folder, max_length=64, optimizer=adam(), log_every_n_steps=100)
    logger = CSVLogger(save_dir=tmp_path)
    trainer(max_epochs=30, logger=logger).fit(model, loader(PAIRS, 4, shuffle=True), loader(PAIRS, 3))
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["val/reward_model/loss"]) > 0.4
    assert float(rows[-1]["val/reward_model/loss"]) < 0.2
    assert float(rows[-1]["val/reward_model/accuracy"]) == 1.0
    for name in rows[-1]:
        lookup(name)

    model.export(tmp_path / "model")
    reward = ModelReward(path=str(tmp_path / "model"))
    good = reward(prompts=[""] * 4, completions=CHOSEN)
    bad = reward(prompts=[""] * 4, completions=REJECTED)
    assert (good > bad).all()
    torch.testing.assert_close(good, torch.tensor(alone(tmp_path / "model", CHOSEN)), rtol=1e-3, atol=1e-4)


def test_validation_accuracy_is_the_share_of_all_pairs(trainer, tmp_path):
    """Batches of 3 and 1 pairs: a mean of batch means would be another number."""
    folder = save_classifier(tmp_path)
    ranked = [text for _, text in sorted(zip(alone(folder, CHOSEN + REJECTED), CHOSEN + REJECTED, strict=True))]
    rows = [{"chosen": high, "rejected": low} for low, high in zip(ranked[:4], ranked[4:], strict=True)]
    rows[0] = {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}  # the only pair that is ranked wrongly
    model = RewardModel(model_path=folder, max_length=64, optimizer=adam(0.0))
    fit = trainer(max_epochs=1)
    fit.fit(model, loader([{"text": "x", "score": 1.0}], 1), loader(rows, 3))
    assert float(fit.callback_metrics["val/reward_model/accuracy"]) == pytest.approx(3 / 4)


def test_dropout_is_active_in_training_only_where_asked_for(tmp_path):
    folder = save_classifier(tmp_path)
    for dropout in (False, True):
        model = RewardModel(model_path=folder, max_length=64, dropout=dropout).train()
        inputs = model.scorer.pad(model.scorer.tokenize(CHOSEN))
        assert torch.equal(model.score(*inputs), model.score(*inputs)) is not dropout
        model.export(tmp_path / "model")
        exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
        assert exported.config.hidden_dropout_prob == 0.1  # who trains it further decides anew


def test_a_resumed_run_is_the_same_run_with_dropout(trainer, tmp_path):
    folder = save_classifier(tmp_path / "start")

    def run(place, ckpt=None):
        model = RewardModel(model_path=folder, max_length=64, dropout=True, optimizer=adam(), log_every_n_steps=1)
        save = ModelCheckpoint(dirpath=place, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit = trainer(max_epochs=2, callbacks=[save], enable_checkpointing=True, logger=CSVLogger(save_dir=place))
        fit.fit(model, loader(PAIRS, shuffle=True), ckpt_path=ckpt)
        return list(model.parameters()), (place / "metrics.csv").read_text()

    weights, rows = run(tmp_path / "whole")
    for step in (1, 2, 3):
        torch.manual_seed(step)  # the global generator has no say
        resumed, resumed_rows = run(tmp_path / str(step), str(tmp_path / "whole" / f"step={step}.ckpt"))
        assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))
        assert resumed_rows.splitlines()[1:] == rows.splitlines()[1 + step :]


def test_a_new_head_is_a_function_of_the_seed(tmp_path):
    folder = save_classifier(tmp_path, head=False)
    heads = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        heads.append(RewardModel(model_path=folder, max_length=64, seed=seed).scorer.model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_trained_head_is_kept_and_one_of_another_size_replaced(tmp_path):
    one = save_classifier(tmp_path / "one")
    two = save_classifier(tmp_path / "two", labels=2)
    kept = AutoModelForSequenceClassification.from_pretrained(one).classifier.weight
    assert torch.equal(RewardModel(model_path=one, max_length=64).scorer.model.classifier.weight, kept)
    assert RewardModel(model_path=two, max_length=64).scorer.model.classifier.weight.shape == (1, 32)


def test_a_tokenizer_without_pad_pads_with_eos(trainer, tmp_path):
    folder = save_classifier(tmp_path / "start", "gpt2", pad=False)
    left = AutoTokenizer.from_pretrained(folder, padding_side="left")
    left.save_pretrained(folder)
    model = RewardModel(model_path=folder, max_length=64).eval()
    scores = model.score(*model.scorer.pad(model.scorer.tokenize(CHOSEN)))
    torch.testing.assert_close(scores, torch.tensor(alone(folder, CHOSEN)), rtol=1e-3, atol=1e-4)
    model.export(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").padding_side == "right"
    reloaded = ModelReward(path=str(tmp_path / "model"))(prompts=[""] * 4, completions=CHOSEN)
    torch.testing.assert_close(reloaded, scores.detach(), rtol=1e-4, atol=1e-5)


def test_a_tokenizer_with_neither_pad_nor_eos_is_refused(tmp_path):
    folder = save_classifier(tmp_path, "gpt2")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="neither a pad nor an eos token"):
        RewardModel(model_path=folder, max_length=64)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (["a"], r"this one is a list with \[\]"),
        ({"prompt": ["a"]}, r"this one is a dict with \['prompt'\]"),
        ({"chosen": ["a", "b"], "rejected": ["a"]}, "2 chosen and 1 rejected"),
        ({"chosen": "ab", "rejected": "cd"}, "column 'chosen' of the batch must be a list of texts"),
        ({"chosen": ["a", ""], "rejected": ["a", "b"]}, "sample 1 of the batch has no text in 'chosen': ''"),
        ({"chosen": ["a"], "rejected": [3]}, "sample 0 of the batch has no text in 'rejected': 3"),
        ({"chosen": ["a"], "rejected": ["b"], "margin": ["x"]}, "column 'margin' of the batch is not numbers"),
        ({"chosen": ["a"], "rejected": ["b"], "margin": [1.0, 2.0]}, "column 'margin' .* for 1 rows"),
        ({"chosen": ["a"], "rejected": ["b"], "agreement": [1.2]}, "must be shares from 0 to 1"),
        ({"text": ["a", "b"], "score": [1.0, math.nan]}, "column 'score' of the batch is nan at sample 1"),
    ],
)
def test_bad_batches_are_refused(tmp_path, batch, message):
    model = RewardModel(model_path=save_classifier(tmp_path), max_length=64)
    with pytest.raises(UserError, match=message):
        model.collate(batch)


@pytest.mark.parametrize("bad", [{"margin_coef": -1.0}, {"center_coef": -0.1}])
def test_negative_coefficients_are_refused(tmp_path, bad):
    with pytest.raises(UserError, match=f"algorithm.{next(iter(bad))}"):
        RewardModel(model_path=save_classifier(tmp_path), max_length=64, **bad)
