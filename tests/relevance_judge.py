"""A small judge to try ``reward=judge`` with: an OpenAI-compatible server that needs no large model.

    python -m tests.relevance_judge        # on port 8000, until Ctrl-C

The nearer MiniLM finds a reply to the question, the more points it gets: 1 + 9 cos, or 1 where the cosine is negative.
Like every judge it has a taste of its own: a reply that says the question again pleases it.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from lit_rlhf.models.sources import fetch
from tests.local_server import Answer, Server

_QUOTED = re.compile(r"<(prompt|completion) (\w{8})>\n(.*?)\n</\1 \2>", re.DOTALL)


class RelevanceJudge:
    """Answers chat completions, as a server's ``answer``; ``folder`` is a sentence encoder's."""

    def __init__(self, folder: str | Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()

    def __call__(self, request: Any) -> Any:
        quoted = {name: text for name, _, text in _QUOTED.findall(request["messages"][0]["content"])}
        if quoted.keys() != {"prompt", "completion"}:
            return Answer(status=400, body=b"there is no prompt with its completion to judge")
        score = 1 + 9 * max(0.0, self.similarity(quoted["prompt"], quoted["completion"]))
        return {"choices": [{"message": {"role": "assistant", "content": f"Score: {score:.2f}"}}]}

    @torch.no_grad()
    def similarity(self, question: str, reply: str) -> float:
        """The cosine between the means of the two texts' last hidden states."""
        inputs = self._tokenizer([question, reply], padding=True, truncation=True, max_length=256, return_tensors="pt")
        weights = inputs["attention_mask"].unsqueeze(-1)
        means = (self._model(**inputs).last_hidden_state * weights).sum(1) / weights.sum(1)
        return cosine_similarity(means[0], means[1], dim=0).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    server = Server(RelevanceJudge(fetch("minilm")), port=parser.parse_args().port)
    print(f"lit-rlhf train experiment=helpfulness reward.base_url={server.url} reward.model=relevance")
    server.serve_forever()


if __name__ == "__main__":
    main()
