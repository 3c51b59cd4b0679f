"""ModelReward gives each text the score that the classifier gives it alone."""

import copy
import math
import pickle

import pytest
import torch
from classifiers import SHAPES, save_classifier
from ppo_runs import fit, make
from tiny import tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import ModelReward
from lit_rlhf.rewards.scoring import freeze, score

PROMPTS = ["A fine ", "It ", "What a long and winding ", "x"]
COMPLETIONS = ["film.", "was so very boring that I slept", "road", ""]
TEXTS = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


def alone(folder, texts):
    """The logits of each text by itself, without padding: the oracle."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = None
    with torch.no_grad():
        return torch.stack([model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts])


@pytest.mark.parametrize("model_type", SHAPES)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_the_texts_alone(tmp_path, model_type, batch_size):
    folder = save_classifier(tmp_path, model_type)
    scores = ModelReward(path=folder, batch_size=batch_size)(prompts=PROMPTS, completions=COMPLETIONS)
    torch.testing.assert_close(scores, alone(folder, TEXTS)[:, 0], rtol=1e-4, atol=1e-5)
    assert scores.std() > 0.01


@pytest.mark.parametrize(("model_type", "length"), [("bert", 64), ("roberta", 63)])
def test_a_text_longer_than_the_model_reads_loses_its_end(tmp_path, model_type, length):
    """RoBERTa's 64 positions begin with one for padding; its tokenizer often does not say so."""
    reward = ModelReward(path=save_classifier(tmp_path, model_type), on="completion")
    text = "".join(chr(97 + i % 26) for i in range(100))
    long, cut, shorter = reward(prompts=[""] * 3, completions=[text, text[:length], text[: length - 1]]).tolist()
    assert long == pytest.approx(cut, rel=1e-5)
    assert long != pytest.approx(shorter, rel=1e-3)


def test_a_tokenizer_without_pad_token_pads_with_eos(tmp_path):
    folder = save_classifier(tmp_path, "gpt2", pad=False)
    scores = ModelReward(path=folder)(prompts=PROMPTS, completions=COMPLETIONS)
    torch.testing.assert_close(scores, alone(folder, TEXTS)[:, 0], rtol=1e-4, atol=1e-5)


def test_on_completion_leaves_the_prompt_out_and_without_a_template_so_does_a_chat(tmp_path):
    folder = save_classifier(tmp_path)
    reward = ModelReward(path=folder, on="completion")
    expected = alone(folder, ["good", "bad"])[:, 0]
    torch.testing.assert_close(reward(prompts=["a", "b"], completions=["good", "bad"]), expected)
    chat = [{"role": "user", "content": "how was it?"}]
    torch.testing.assert_close(ModelReward(path=folder)(prompts=[chat] * 2, completions=["good", "bad"]), expected)


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "how was it?"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_a_chat_is_scored_as_the_models_template_renders_it_with_the_answer(tmp_path):
    folder = save_classifier(tmp_path, template=TEMPLATE)
    rendered = "<system>Be brief.<user>how was it?<assistant>good"
    scores = ModelReward(path=folder)(prompts=[CHAT, "A "], completions=["good", "film"])
    torch.testing.assert_close(scores, alone(folder, [rendered, "A film"])[:, 0], rtol=1e-4, atol=1e-5)
    scores = ModelReward(path=folder, on="completion")(prompts=[CHAT], completions=["good"])
    torch.testing.assert_close(scores, alone(folder, ["good"])[:, 0], rtol=1e-4, atol=1e-5)


def test_a_conversation_that_is_too_long_loses_its_beginning(tmp_path):
    folder = save_classifier(tmp_path, template=TEMPLATE)
    scores = ModelReward(path=folder, max_length=16)(prompts=[CHAT], completions=["good"])
    torch.testing.assert_close(scores, alone(folder, [" it?<assistant>good"[-16:]])[:, 0], rtol=1e-4, atol=1e-5)


def test_a_special_token_that_opens_a_long_conversation_stays(tmp_path):
    folder = save_classifier(tmp_path, template="{{ eos_token }}" + TEMPLATE)
    opening = AutoTokenizer.from_pretrained(folder).eos_token
    scores = ModelReward(path=folder, max_length=16)(prompts=[CHAT], completions=["good"])
    expected = alone(folder, [opening + " it?<assistant>good"[-15:]])[:, 0]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("template", ["", "{% for m in messages if m.role == 'tool' %}x{% endfor %}"])
def test_the_answer_alone_is_scored_where_a_template_renders_nothing_or_there_is_no_chat(tmp_path, template):
    folder = save_classifier(tmp_path, template=template)
    scores = ModelReward(path=folder)(prompts=[CHAT, None], completions=["good", "bad"])
    torch.testing.assert_close(scores, alone(folder, ["good", "bad"])[:, 0], rtol=1e-4, atol=1e-5)


def test_a_template_that_refuses_a_conversation_is_named(tmp_path):
    folder = save_classifier(tmp_path, template="{{ raise_exception('no system messages') }}")
    with pytest.raises(UserError, match=r"reward model's chat template fails on .*no system messages"):
        ModelReward(path=folder)(prompts=[CHAT], completions=["good"])


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_an_empty_completion_has_a_finite_score(tmp_path, model_type):
    folder = save_classifier(tmp_path, model_type, pad=False)
    reward = ModelReward(path=folder, on="completion")
    scores = reward(prompts=["a", "b"], completions=["", "ok"])
    assert scores.isfinite().all()
    torch.testing.assert_close(scores[1:], reward(prompts=["b"], completions=["ok"]))


@pytest.mark.parametrize("wanted", ["POSITIVE", "positive", 2, "2"])
def test_several_labels_give_the_log_odds_of_the_wanted_one(tmp_path, wanted):
    folder = save_classifier(tmp_path, labels=3, names=["negative", "2" if wanted == "2" else "neutral", "POSITIVE"])
    logits = alone(folder, TEXTS)
    label = 1 if wanted == "2" else 2
    odds = [p / (1 - p) for p in logits.double().softmax(-1)[:, label].tolist()]
    scores = ModelReward(path=folder, positive_label=wanted)(prompts=PROMPTS, completions=COMPLETIONS)
    assert scores.tolist() == pytest.approx([math.log(x) for x in odds], rel=1e-3, abs=1e-4)


def test_two_labels_give_the_difference_of_their_logits(tmp_path):
    folder = save_classifier(tmp_path, labels=2, names=["bad", "good"])
    logits = alone(folder, TEXTS)
    scores = ModelReward(path=folder, positive_label="good")(prompts=PROMPTS, completions=COMPLETIONS)
    torch.testing.assert_close(scores, logits[:, 1] - logits[:, 0], rtol=1e-4, atol=1e-5)


def test_labels_must_be_named_and_exist(tmp_path):
    several = save_classifier(tmp_path / "several", labels=2, names=["bad", "good"])
    one = save_classifier(tmp_path / "one")
    with pytest.raises(UserError, match=r"2 labels: set reward.positive_label to one of 0 \(bad\), 1 \(good\)"):
        ModelReward(path=several)
    with pytest.raises(UserError, match=r"positive_label=fine: .* has the labels 0 \(bad\), 1 \(good\)"):
        ModelReward(path=several, positive_label="fine")
    with pytest.raises(UserError, match="has one output"):
        ModelReward(path=one, positive_label="good")


def test_it_is_frozen_without_dropout_and_in_fp32_whatever_surrounds_it(tmp_path):
    reward = ModelReward(path=save_classifier(tmp_path))
    assert not any(p.requires_grad for p in reward.scorer.parameters())
    first = reward(prompts=PROMPTS, completions=COMPLETIONS)
    with torch.autocast("cpu", torch.bfloat16):
        again = reward(prompts=PROMPTS, completions=COMPLETIONS)
    assert first.requires_grad is False
    assert torch.equal(first, again)


@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("labels", [1, 2])
def test_in_bfloat16_a_score_is_near_that_in_fp32_and_its_head_is_in_fp32(tmp_path, model_type, labels):
    several = labels > 1
    folder = save_classifier(tmp_path, model_type, labels=labels, names=["bad", "good"] if several else None)
    reward = ModelReward(path=folder, positive_label="good" if several else None)
    exact = reward(prompts=PROMPTS, completions=COMPLETIONS)
    freeze(reward, "cpu", torch.bfloat16)
    rough = reward(prompts=PROMPTS, completions=COMPLETIONS)
    assert not torch.equal(rough, exact)
    near = {"rtol": 0, "atol": 0.1 * float(exact.std())}
    torch.testing.assert_close(rough, exact, **near)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, rough.bfloat16().float())  # else the logits were rounded to 8 bits
    linear = [m for m in reward.scorer.model.base_model.modules() if type(m) is torch.nn.Linear]
    assert all(m.weight.dtype == torch.bfloat16 for m in linear)
    assert linear or model_type == "gpt2"  # its layers are no nn.Linear

    freeze(reward, "cpu")
    torch.testing.assert_close(reward(prompts=PROMPTS, completions=COMPLETIONS), exact, **near)
    assert {p.dtype for p in reward.scorer.parameters()} == {torch.float32}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda reward: pickle.loads(pickle.dumps(reward))])
def test_a_copy_has_a_head_of_its_own(tmp_path, duplicate):
    reward = ModelReward(path=save_classifier(tmp_path))
    exact = reward(prompts=PROMPTS, completions=COMPLETIONS)
    other = duplicate(reward)
    assert torch.equal(other(prompts=PROMPTS, completions=COMPLETIONS), exact)
    for parameter in other.scorer.model.classifier.parameters():
        parameter.zero_()
    assert other(prompts=PROMPTS, completions=COMPLETIONS).tolist() == [0.0] * 4
    assert torch.equal(reward(prompts=PROMPTS, completions=COMPLETIONS), exact)


def test_full_precision_keeps_every_bit(tmp_path):
    folder = save_classifier(tmp_path)
    exact = ModelReward(path=folder)(prompts=PROMPTS, completions=COMPLETIONS)
    reward = ModelReward(path=folder, full_precision=True)
    freeze(reward, "cpu", torch.bfloat16)
    assert torch.equal(reward(prompts=PROMPTS, completions=COMPLETIONS), exact)


@pytest.mark.parametrize(("precision", "cast"), [("bf16-mixed", torch.bfloat16), ("32-true", None)])
def test_training_scores_in_its_own_precision(trainer, tmp_path, precision, cast):
    reward, gold = ModelReward(path=save_classifier(tmp_path)), ModelReward(path=str(tmp_path))
    watch = fit(trainer, make(reward=reward, gold=gold), precision=precision, max_epochs=1)
    assert (reward.cast, gold.cast) == (cast, cast)
    texts = [row["prompt"] + row["completion"] for row in watch.samples]
    scores = torch.tensor([row["score"] for row in watch.samples])
    exact = alone(str(tmp_path), texts)[:, 0]
    torch.testing.assert_close(scores, exact, rtol=0, atol=1e-4 if cast is None else 0.1 * float(exact.std()))


def test_long_texts_lose_their_end(tmp_path):
    folder = save_classifier(tmp_path)
    reward = ModelReward(path=folder, max_length=5)
    scores = reward(prompts=["abc", "abcde"], completions=["defgh", ""])
    assert scores[0] == pytest.approx(float(scores[1]))
    torch.testing.assert_close(scores[:1], alone(folder, ["abcde"])[:, 0], rtol=1e-4, atol=1e-5)


def test_a_length_beyond_the_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="max_length=65 must be at least 1 and at most the model's 64 tokens"):
        ModelReward(path=save_classifier(tmp_path), max_length=65)


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a trained sequence classifier"):
        ModelReward(path=save_classifier(tmp_path, head=False))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no sequence classifier could be loaded"):
        ModelReward(path=str(tmp_path))


def test_a_kind_of_model_that_has_no_classifier_is_refused_in_few_words(tmp_path):
    tiny_model("cohere").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no sequence classifier could be loaded: .*SequenceClassification\.$"):
        ModelReward(path=str(tmp_path))


def test_it_has_one_component_named_model(tmp_path):
    reward = ModelReward(path=save_classifier(tmp_path))
    assert list(score(reward, PROMPTS, COMPLETIONS, {"extra": [1, 2, 3, 4]}).components) == ["model"]
